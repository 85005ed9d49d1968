"""The chat formats that we can write and read, as plain tables of strings, and the one writer of them all.

A format is data, never a program: what a conversation looks like is written by ``write`` from a table. A model folder
brings its format as a Jinja template, which is foreign code; ``template`` lets a sandboxed process render that on a few
probes, reads the table off what comes out, and keeps it only if ``write`` then says the same. Without a template the
format is the first one below whose special strings the tokenizer all knows; a tokenizer that knows none gets ``PLAIN``,
in which the roles are ordinary words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sprat.errors import DataError

Part = tuple[str, bool]  # text, and whether we wrote it (then it may hold control tokens)
DATE = re.compile("\0([^\0]*)\0")  # where a format names the day: how to write it, as in strftime


@dataclass(frozen=True)
class Specials:
    """Ids of the special tokens; -1 where the tokenizer has no such single token."""

    bos: int
    eos: int
    pad: int
    system: int
    user: int
    assistant: int
    think_open: int
    think_close: int


@dataclass(frozen=True)
class Format:
    """One chat format. Each pair is what stands before and what stands after that role's text.

    Attributes:
        first: what stands before the first question of a conversation without a system message.
        system: the same with one: before it, and between it and the first question. None: the format has none.
        user, assistant: around later questions, and around answers of the past, whose reasoning is left out.
        opening: opens the answer that is to be written, where nothing is said about thinking.
        thinking, direct: the same where it shall think, and where it shall not. ``thinking`` is None where the model
            does not think, so that nobody can ask it to.
        habit: what ``opening`` means: it opens the reasoning (True), closes it (False), or leaves it to the model.
        think: around reasoning that is written after ``opening``.
        required: the tokens by which the format is recognised.
        system_last: the system message stands before the last question, inside its turn.
        alternates: question and answer take turns, and anything else is refused.
        trims: role → which ends of its text lose their blanks (l, r), or line breaks (n); ``first`` is a question that
            follows a system message.
        sheds: of an answer of the past that holds ``</think>`` only the rest is kept: ``cut`` there, or ``strip`` line
            breaks as well.
    """

    name: str
    bos: str
    eos: str
    pad: str
    first: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str
    thinking: str | None
    direct: str
    think: tuple[str, str]
    required: tuple[str, ...] = ()
    habit: bool | None = None
    think_tokens: tuple[str, str] = ("<think>", "</think>")
    system_last: bool = False
    alternates: bool = False
    trims: tuple[tuple[str, str], ...] = ()
    sheds: str = ""


OWN = Format(
    name="sprat",
    bos="<|bos|>",
    eos="<|eos|>",
    pad="<|pad|>",
    first="<|bos|><|user|>",
    system=("<|bos|><|system|>", "<|user|>"),
    user=("<|user|>", ""),
    assistant=("<|assistant|><think></think>", "<|eos|>"),
    opening="<|assistant|>",
    thinking="<|assistant|><think>",
    direct="<|assistant|><think></think>",
    think=("<think>", "</think>"),
    required=("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"),
)

DEEPSEEK = Format(
    name="deepseek",
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    pad="<｜▁pad▁｜>",
    first="<｜begin▁of▁sentence｜><｜User｜>",
    system=("<｜begin▁of▁sentence｜>", "<｜User｜>"),
    user=("<｜User｜>", ""),
    assistant=("<｜Assistant｜></think>", "<｜end▁of▁sentence｜>"),
    opening="<｜Assistant｜>",
    thinking="<｜Assistant｜><think>",
    direct="<｜Assistant｜></think>",
    think=("<think>", "</think>"),
    required=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
)

CHATML = Format(
    name="chatml",
    bos="",
    eos="<|im_end|>",
    pad="<|endoftext|>",
    first="<|im_start|>user\n",
    system=("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    opening="<|im_start|>assistant\n",
    thinking="<|im_start|>assistant\n<think>\n",
    direct="<|im_start|>assistant\n<think>\n\n</think>\n\n",
    think=("<think>\n", "\n</think>\n\n"),
    required=("<|im_start|>", "<|im_end|>"),
)

_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n".format
LLAMA3 = Format(
    name="llama3",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    pad="<|finetune_right_pad_id|>",
    first="<|begin_of_text|>" + _HEADER("user"),
    system=("<|begin_of_text|>" + _HEADER("system"), "<|eot_id|>" + _HEADER("user")),
    user=(_HEADER("user"), "<|eot_id|>"),
    assistant=(_HEADER("assistant"), "<|eot_id|>"),
    opening=_HEADER("assistant"),
    thinking=_HEADER("assistant") + "<think>\n",
    direct=_HEADER("assistant"),
    think=("<think>\n", "\n</think>\n\n"),
    required=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    trims=(("system", "lr"), ("first", "lr"), ("user", "lr"), ("assistant", "lr")),
)

PLAIN = Format(
    name="plain",
    bos="",
    eos="",
    pad="",
    first="User: ",
    system=("", "\n\nUser: "),
    user=("User: ", "\n\n"),
    assistant=("Assistant: ", "\n\n"),
    opening="Assistant: ",
    thinking="Assistant: <think>\n",
    direct="Assistant: ",
    think=("<think>\n", "\n</think>\n\n"),
)

FORMATS = (OWN, DEEPSEEK, CHATML, LLAMA3, PLAIN)

OWN_SPECIALS = (
    "<|pad|>",
    "<|bos|>",
    "<|eos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<think>",
    "</think>",
)

# The Jinja twin of chat.render for our own format, for other programs that load the folder. We write
# it and never run it; a test renders it with transformers and compares the ids.
OWN_TEMPLATE = (
    "{{- '<|bos|>' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- '<|system|>' + message['content'] -}}"
    "{%- elif message['role'] == 'user' -%}{{- '<|user|>' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<|assistant|><think></think>' + message['content'] + '<|eos|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|assistant|>' -}}"
    "{%- if thinking is defined and thinking is not none -%}"
    "{{- '<think>' if thinking else '<think></think>' -}}"
    "{%- endif -%}"
    "{%- endif -%}"
)


def recognise(tokens: Iterable[str], config: Mapping[str, Any]) -> Format:
    """The format of a tokenizer without a template: its added tokens are ``tokens``, its settings ``config``."""
    known = set(tokens)
    form = next(form for form in FORMATS if known.issuperset(form.required))
    bos = named(config, "bos_token")
    if form is PLAIN and config.get("add_bos_token") is True and bos:
        return replace(form, bos=bos, first=bos + form.first, system=(bos, "\n\nUser: "))
    return form


# The special tokens that a tokenizer_config.json names, and a template may write (transformers' special_tokens_map)
TOKEN_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def named(config: Mapping[str, Any], key: str) -> str:
    """The token that a tokenizer_config.json names under ``key``; "" if none."""
    found = config.get(key)
    found = found.get("content") if isinstance(found, dict) else found
    return found if isinstance(found, str) else ""


def write(form: Format, turns: Sequence[tuple[str, str]], *, thinking: bool | None, generate: bool) -> list[Part]:
    """A conversation as text, in parts.

    Args:
        turns: role and content of each turn, at least one.

    Raises:
        DataError: a role is unknown or stands where the format has no place for it, or the model does not think.
    """
    system = turns[0][1] if turns[0][0] == "system" else None
    rest = turns[1:] if system is not None else turns
    _check(form, system, rest)
    parts: list[Part] = []
    lead = form.first
    inside = form.system_last and system is not None
    if system is not None and form.system is not None and not inside:
        parts += [(form.system[0], True), (_trim(form, "system", system), False)]
        lead = form.system[1]
    last = max((place for place, (role, _) in enumerate(rest) if role == "user"), default=-1)
    for place, (role, content) in enumerate(rest):
        before, after = form.user if role == "user" else form.assistant
        if place == 0:
            before = lead if role == "user" else lead.removesuffix(form.user[0]) + before
        parts.append((before, True))
        if place == last and inside and system is not None and form.system is not None:
            parts += [(form.system[0], True), (_trim(form, "system", system), False), (form.system[1], True)]
        key = "first" if role == "user" and system is not None and (place == last if inside else place == 0) else role
        parts += [(_trim(form, key, _shed(form, role, content)), False), (after, True)]
    if not rest:
        parts.append((lead.removesuffix(form.user[0]), True))
    if generate:
        parts.append((opening(form, thinking), True))
    return [(dated(text) if ours else text, ours) for text, ours in parts]


def opening(form: Format, thinking: bool | None) -> str:
    """What opens the answer.

    Raises:
        DataError: the model shall think and does not know how.
    """
    if thinking and form.thinking is None:
        todo = "ask without thinking, or load a model whose chat template opens a think block"
        raise DataError("this model does not think: its chat template knows no <think>", where="thinking", todo=todo)
    return form.opening if thinking is None else str(form.thinking) if thinking else form.direct


def _check(form: Format, system: str | None, rest: Sequence[tuple[str, str]]) -> None:
    """Raise DataError where the turns have no place in the format."""
    for place, (role, _) in enumerate(rest):
        if role not in ("user", "assistant"):
            todo = "use user and assistant, and system for the first message only"
            fault = f"unknown role {role!r}" if role != "system" else "a system message that is not the first"
            raise DataError(fault, where="messages", todo=todo)
        if form.alternates and role != ("user", "assistant")[place % 2]:
            todo = "let user and assistant take turns, the user first"
            raise DataError("this model's chat format knows only turns that alternate", where="messages", todo=todo)
    if system is not None and form.system is None:
        todo = "put it into the first question"
        raise DataError("this model's chat format has no system message", where="messages", todo=todo)


def _trim(form: Format, role: str, text: str) -> str:
    """``text`` without the blanks that the format takes off."""
    ends = dict(form.trims).get(role, "")
    text = text.lstrip() if "l" in ends else text.lstrip("\n") if "n" in ends else text
    return text.rstrip() if "r" in ends else text


def _shed(form: Format, role: str, text: str) -> str:
    """An answer of the past without reasoning that stands in its text."""
    closing = form.think_tokens[1]
    if role != "assistant" or not form.sheds or closing not in text:
        return text
    text = text.rpartition(closing)[2]
    return text.lstrip("\n") if form.sheds == "strip" else text


def dated(text: str) -> str:
    """``text`` with today's date where a format has one."""
    return DATE.sub(lambda how: datetime.now().strftime(how[1]), text) if "\0" in text else text

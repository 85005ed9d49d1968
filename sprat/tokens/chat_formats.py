"""The chat formats that we can write and read, as plain tables of strings, and the one writer of them all.

A format is data, never a program: what a conversation looks like is written by ``render_parts`` from a table. A model
folder brings its format as a Jinja template, which is foreign code; ``chat_template`` lets a sandboxed process render
that on a few probes, reads the table off what comes out, and keeps it only if ``render_parts`` then says the same.
Without a template the format is the first one below whose special strings the tokenizer all knows; a tokenizer that
knows none gets ``PLAIN``, in which the roles are ordinary words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sprat.errors import DataError

Part = tuple[str, bool]  # text, and whether we wrote it (then it may hold control tokens)
DATE_PATTERN = re.compile("\0([^\0]*)\0")  # where a format names the day: how to write it, as in strftime


@dataclass(frozen=True)
class SpecialTokenIds:
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
class ChatFormat:
    """One chat format. Each pair is what stands before and what stands after that role's text.

    Attributes:
        first_user_prefix: what stands before the first question of a conversation without a system message.
        system: the same with one: before it, and between it and the first question. None: the format has none.
        user, assistant: around later questions, and around answers of the past, whose reasoning is left out.
        generation_prompt: opens the answer that is to be written, where nothing is said about thinking.
        thinking_prompt, no_thinking_prompt: the same where it shall think, and where it shall not. The former is None
            where the model does not think, so that nobody can ask it to.
        default_thinking: what ``generation_prompt`` means: it opens the reasoning (True), closes it (False), or leaves
            it to the model (None).
        think_delimiters: around reasoning that is written after ``generation_prompt``.
        marker_tokens: the tokens by which the format is detected.
        system_in_last_user: the system message stands before the last question, inside its turn.
        strict_alternation: question and answer take turns, and anything else is refused.
        strip_rules: role → which ends of its text lose their blanks (l, r), or line breaks (n); ``first`` is a
            question that follows a system message.
        past_reasoning: of an answer of the past that holds ``</think>`` only the rest is kept: ``cut`` there, or
            ``strip`` line breaks as well. Empty: it stays.
        mismatch: why this stands in the place of the model's own template; empty where it is that, or there is none.
    """

    name: str
    bos: str
    eos: str
    pad: str
    first_user_prefix: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation_prompt: str
    thinking_prompt: str | None
    no_thinking_prompt: str
    think_delimiters: tuple[str, str]
    marker_tokens: tuple[str, ...] = ()
    default_thinking: bool | None = None
    think_tags: tuple[str, str] = ("<think>", "</think>")
    system_in_last_user: bool = False
    strict_alternation: bool = False
    strip_rules: tuple[tuple[str, str], ...] = ()
    past_reasoning: str = ""
    mismatch: str = field(default="", compare=False)


SPRAT = ChatFormat(
    name="sprat",
    bos="<|bos|>",
    eos="<|eos|>",
    pad="<|pad|>",
    first_user_prefix="<|bos|><|user|>",
    system=("<|bos|><|system|>", "<|user|>"),
    user=("<|user|>", ""),
    assistant=("<|assistant|><think></think>", "<|eos|>"),
    generation_prompt="<|assistant|>",
    thinking_prompt="<|assistant|><think>",
    no_thinking_prompt="<|assistant|><think></think>",
    think_delimiters=("<think>", "</think>"),
    marker_tokens=("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"),
)

DEEPSEEK = ChatFormat(
    name="deepseek",
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    pad="<｜▁pad▁｜>",
    first_user_prefix="<｜begin▁of▁sentence｜><｜User｜>",
    system=("<｜begin▁of▁sentence｜>", "<｜User｜>"),
    user=("<｜User｜>", ""),
    assistant=("<｜Assistant｜></think>", "<｜end▁of▁sentence｜>"),
    generation_prompt="<｜Assistant｜>",
    thinking_prompt="<｜Assistant｜><think>",
    no_thinking_prompt="<｜Assistant｜></think>",
    think_delimiters=("<think>", "</think>"),
    marker_tokens=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
)

CHATML = ChatFormat(
    name="chatml",
    bos="",
    eos="<|im_end|>",
    pad="<|endoftext|>",
    first_user_prefix="<|im_start|>user\n",
    system=("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    generation_prompt="<|im_start|>assistant\n",
    thinking_prompt="<|im_start|>assistant\n<think>\n",
    no_thinking_prompt="<|im_start|>assistant\n<think>\n\n</think>\n\n",
    think_delimiters=("<think>\n", "\n</think>\n\n"),
    marker_tokens=("<|im_start|>", "<|im_end|>"),
)

_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n".format
LLAMA3 = ChatFormat(
    name="llama3",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    pad="<|finetune_right_pad_id|>",
    first_user_prefix="<|begin_of_text|>" + _HEADER("user"),
    system=("<|begin_of_text|>" + _HEADER("system"), "<|eot_id|>" + _HEADER("user")),
    user=(_HEADER("user"), "<|eot_id|>"),
    assistant=(_HEADER("assistant"), "<|eot_id|>"),
    generation_prompt=_HEADER("assistant"),
    thinking_prompt=_HEADER("assistant") + "<think>\n",
    no_thinking_prompt=_HEADER("assistant"),
    think_delimiters=("<think>\n", "\n</think>\n\n"),
    marker_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    strip_rules=(("system", "lr"), ("first", "lr"), ("user", "lr"), ("assistant", "lr")),
)

PLAIN = ChatFormat(
    name="plain",
    bos="",
    eos="",
    pad="",
    first_user_prefix="User: ",
    system=("", "\n\nUser: "),
    user=("User: ", "\n\n"),
    assistant=("Assistant: ", "\n\n"),
    generation_prompt="Assistant: ",
    thinking_prompt="Assistant: <think>\n",
    no_thinking_prompt="Assistant: ",
    think_delimiters=("<think>\n", "\n</think>\n\n"),
)

FORMATS = (SPRAT, DEEPSEEK, CHATML, LLAMA3, PLAIN)

SPRAT_SPECIAL_TOKENS = (
    "<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<think>", "</think>",
)  # fmt: skip

# The Jinja twin of chat.render for our own format, for other programs; a test renders it with transformers.
SPRAT_TEMPLATE = (
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


def detect_format(tokens: Iterable[str], config: Mapping[str, Any]) -> ChatFormat:
    """The format of a tokenizer without a template: its added tokens are ``tokens``, its settings ``config``."""
    known = set(tokens)
    chat_format = next(each for each in FORMATS if known.issuperset(each.marker_tokens))
    bos = special_token(config, "bos_token")
    if chat_format is PLAIN and config.get("add_bos_token") is True and bos:
        prefix = bos + chat_format.first_user_prefix
        return replace(chat_format, bos=bos, first_user_prefix=prefix, system=(bos, "\n\nUser: "))
    return chat_format


# The special tokens that a tokenizer_config.json names, and a template may write (transformers' special_tokens_map)
SPECIAL_TOKEN_KEYS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def special_token(config: Mapping[str, Any], key: str) -> str:
    """The token that a tokenizer_config.json names under ``key``; "" if none."""
    value = config.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def render_parts(
    chat_format: ChatFormat, turns: Sequence[tuple[str, str]], *, thinking: bool | None, add_generation_prompt: bool
) -> list[Part]:
    """A conversation as text, in parts.

    Args:
        turns: role and content of each turn, at least one.

    Raises:
        DataError: a role is unknown or stands where the format has no place for it, or the model does not think.
    """
    system = turns[0][1] if turns[0][0] == "system" else None
    other_turns = turns[1:] if system is not None else turns
    _check_turns(chat_format, system, other_turns)
    parts: list[Part] = []
    prefix = chat_format.first_user_prefix
    system_inside = chat_format.system_in_last_user and system is not None
    if system is not None and chat_format.system is not None and not system_inside:
        parts += [(chat_format.system[0], True), (strip_blanks(chat_format, "system", system), False)]
        prefix = chat_format.system[1]
    last_user = max((index for index, (role, _) in enumerate(other_turns) if role == "user"), default=-1)
    for index, (role, content) in enumerate(other_turns):
        before, after = chat_format.user if role == "user" else chat_format.assistant
        if index == 0:
            before = prefix if role == "user" else prefix.removesuffix(chat_format.user[0]) + before
        parts.append((before, True))
        if index == last_user and system_inside and system is not None and chat_format.system is not None:
            before_system, after_system = chat_format.system
            system_text = strip_blanks(chat_format, "system", system)
            parts += [(before_system, True), (system_text, False), (after_system, True)]
        follows_system = system is not None and (index == last_user if system_inside else index == 0)
        key = "first" if role == "user" and follows_system else role
        content = strip_blanks(chat_format, key, drop_past_reasoning(chat_format, role, content))
        parts += [(content, False), (after, True)]
    if not other_turns:
        parts.append((prefix.removesuffix(chat_format.user[0]), True))
    if add_generation_prompt:
        parts.append((select_generation_prompt(chat_format, thinking), True))
    return [(fill_dates(text) if is_template else text, is_template) for text, is_template in parts]


def select_generation_prompt(chat_format: ChatFormat, thinking: bool | None) -> str:
    """What opens the answer.

    Raises:
        DataError: the model shall think and does not know how.
    """
    if thinking and chat_format.thinking_prompt is None:
        todo = "ask without thinking, or load a model whose chat template opens a think block"
        raise DataError("this model does not think: its chat template knows no <think>", where="thinking", todo=todo)
    if thinking is None:
        return chat_format.generation_prompt
    return str(chat_format.thinking_prompt) if thinking else chat_format.no_thinking_prompt


def _check_turns(chat_format: ChatFormat, system: str | None, other_turns: Sequence[tuple[str, str]]) -> None:
    """Raise DataError where the turns have no place in the format."""
    for index, (role, _) in enumerate(other_turns):
        if role not in ("user", "assistant"):
            todo = "use user and assistant, and system for the first message only"
            fault = f"unknown role {role!r}" if role != "system" else "a system message that is not the first"
            raise DataError(fault, where="messages", todo=todo)
        if chat_format.strict_alternation and role != ("user", "assistant")[index % 2]:
            todo = "let user and assistant take turns, the user first"
            raise DataError("this model's chat format knows only turns that alternate", where="messages", todo=todo)
    if system is not None and chat_format.system is None:
        todo = "put it into the first question"
        raise DataError("this model's chat format has no system message", where="messages", todo=todo)


def strip_blanks(chat_format: ChatFormat, role: str, text: str) -> str:
    """``text`` without the blanks that the format takes off."""
    ends = dict(chat_format.strip_rules).get(role, "")
    text = text.lstrip() if "l" in ends else text.lstrip("\n") if "n" in ends else text
    return text.rstrip() if "r" in ends else text


def drop_past_reasoning(chat_format: ChatFormat, role: str, text: str) -> str:
    """An answer of the past without reasoning that stands in its text."""
    closing = chat_format.think_tags[1]
    if role != "assistant" or not chat_format.past_reasoning or closing not in text:
        return text
    text = text.rpartition(closing)[2]
    return text.lstrip("\n") if chat_format.past_reasoning == "strip" else text


def fill_dates(text: str) -> str:
    """``text`` with today's date where a format has one."""
    return DATE_PATTERN.sub(lambda match: datetime.now().strftime(match[1]), text) if "\0" in text else text

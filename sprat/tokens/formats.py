"""The chat formats that we can write and read, as plain tables of strings.

A format is data, never a program: we do not run the Jinja template that a model folder brings,
because a template is foreign code. A tokenizer's format is the first one whose special strings it
all knows; a tokenizer that knows none gets ``PLAIN``, in which the roles are ordinary words. One sentence of a
template we do take over, as text: the system message that it puts before a conversation which has none, since the
model was taught with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any


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
    """One chat format. Each pair is what stands before and what stands after that role's text."""

    name: str
    bos: str
    eos: str
    pad: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    think: tuple[str, str]  # around the reasoning
    direct: str  # opens an answer without reasoning
    past: str  # opens an assistant turn of the past, whose reasoning is left out
    required: tuple[str, ...]  # the tokens by which the format is recognised
    think_tokens: tuple[str, str] = ("<think>", "</think>")
    preamble: str = ""  # the system message of a conversation that brings none


OWN = Format(
    name="sprat",
    bos="<|bos|>",
    eos="<|eos|>",
    pad="<|pad|>",
    system=("<|system|>", ""),
    user=("<|user|>", ""),
    assistant=("<|assistant|>", "<|eos|>"),
    think=("<think>", "</think>"),
    direct="<think></think>",
    past="<think></think>",
    required=("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"),
)

DEEPSEEK = Format(
    name="deepseek",
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    pad="<｜▁pad▁｜>",
    system=("", ""),
    user=("<｜User｜>", ""),
    assistant=("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    think=("<think>", "</think>"),
    direct="</think>",
    past="</think>",
    required=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
)

CHATML = Format(
    name="chatml",
    bos="",
    eos="<|im_end|>",
    pad="<|endoftext|>",
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    think=("<think>\n", "\n</think>\n\n"),
    direct="<think>\n\n</think>\n\n",
    past="",
    required=("<|im_start|>", "<|im_end|>"),
)

LLAMA3 = Format(
    name="llama3",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    pad="<|finetune_right_pad_id|>",
    system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    think=("<think>\n", "\n</think>\n\n"),
    direct="",
    past="",
    required=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

PLAIN = Format(
    name="plain",
    bos="",
    eos="",
    pad="",
    system=("", "\n\n"),
    user=("User: ", "\n\n"),
    assistant=("Assistant: ", "\n\n"),
    think=("<think>\n", "\n</think>\n\n"),
    direct="",
    past="",
    required=(),
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


_PREAMBLE = re.compile(r"<\|im_start\|>system(?:\n|\\n)([^<>{}'\"\\]{1,2000})<\|im_end\|>")


def fitted(form: Format, config: Mapping[str, Any]) -> Format:
    """``form`` with what a tokenizer_config.json adds to it: ChatML's preamble, and the first token of plain text.

    >>> text = "{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}"
    >>> fitted(CHATML, {"chat_template": text}).preamble
    'You are kind.'
    """
    template = config.get("chat_template")
    if form is CHATML and isinstance(template, str) and (found := _PREAMBLE.search(template)):
        return replace(form, preamble=found[1])
    first = config.get("bos_token")
    first = first.get("content") if isinstance(first, dict) else first
    if form is PLAIN and config.get("add_bos_token") is True and isinstance(first, str):
        return replace(form, bos=first)
    return form


def recognise(tokens: Iterable[str]) -> Format:
    """The format of a tokenizer whose added tokens are ``tokens``."""
    known = set(tokens)
    return next(form for form in FORMATS if known.issuperset(form.required))

"""Turns that call tools: written by the model's own chat template, as it stands.

A table of strings says what conversations look like (``chat_formats``), but not how a model writes the schemas of
its tools, its calls and what comes back: there is JSON in it, loops over calls, and no two families do it alike. So
conversations with tools are rendered by the template itself, in the sandboxed process that renders the probes.

Which templates can: a probe shows. It holds a call and a result whose texts are markers, and a template that does not
write them all has no tools. The probe also tells in which form the template takes a call, of four that are in use:
arguments as an object (as transformers hands them on) or as text (DeepSeek-V3), and beside a call that says nothing an
empty content or none.

A template writes the texts of a conversation among its own, so that nobody could tell afterwards who wrote a control
token. A conversation of which a text spells one is therefore refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sprat.errors import DataError
from sprat.tokens.chat_formats import fill_dates
from sprat.tokens.chat_template import run_worker

Row = Mapping[str, Any]  # one message as transformers' templates take it; arguments of calls are JSON text
Tools = Sequence[Mapping[str, Any]]  # JSON schemas of functions
_ID = "Call12345"  # nine letters and digits, as Mistral wants them


@dataclass(frozen=True)
class ChatTemplate:
    """A template with the special tokens that it may name, by name."""

    text: str
    tokens: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ToolSupport:
    """What a template writes.

    Attributes:
        style: the form in which it takes calls: whether arguments are text, and whether a content that says nothing is
            none; None: it takes none.
        has_schemas: whether it writes the schemas of the tools.
    """

    style: tuple[bool, bool] | None
    has_schemas: bool


_STYLES = ((False, False), (False, True), (True, False), (True, True))
_CALL = {"name": "MarkCallKram", "arguments": '{"MarkKeyKram": "MarkValueKram"}'}
_PROBE: tuple[Row, ...] = (
    {"role": "user", "content": "MarkUserKram"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": _ID, "type": "function", "function": _CALL}]},
    {"role": "tool", "content": "MarkResultKram", "tool_call_id": _ID},
    {"role": "assistant", "content": "MarkAnswerKram"},
)
_MARKERS = tuple(f"Mark{name}Kram" for name in ("User", "Call", "Key", "Value", "Result", "Answer"))
_SCHEMA = {
    "type": "function",
    "function": {
        "name": "MarkSchemaKram",
        "description": "Does it.",
        "parameters": {"type": "object", "properties": {"MarkKeyKram": {"type": "string", "description": "It."}}},
    },
}


@lru_cache(maxsize=16)
def tool_support(template: ChatTemplate) -> ToolSupport:
    """What ``template`` writes of tools."""
    probes: list[dict[str, Any]] = [{"messages": style_rows(_PROBE, style)} for style in _STYLES]
    probes.append({"messages": [_PROBE[0]], "tools": [_SCHEMA]})
    answers, _ = run_worker(template.text, dict(template.tokens), probes)
    if not answers:
        return ToolSupport(None, False)
    *texts, with_schema = [answer.get("text", "") for answer in answers]
    styles = (style for style, text in zip(_STYLES, texts, strict=True) if _has_in_order(text))
    return ToolSupport(next(styles, None), "MarkSchemaKram" in with_schema)


def _has_in_order(text: str) -> bool:
    """Whether a text has the markers of the probe, each behind the one before."""
    offsets = [text.find(marker) for marker in _MARKERS]
    return min(offsets) >= 0 and offsets == sorted(offsets)


def render_tool_turns(
    template: ChatTemplate, conversations: Sequence[tuple[Sequence[Row], bool]], tools: Tools
) -> list[str]:
    """The texts of conversations as ``template`` writes them, with today's date where it has one.

    Args:
        conversations: messages, and whether the assistant's opening follows.
        tools: schemas of the functions that may be called, for all of them.

    Raises:
        DataError: the template has no tools, or refuses a conversation.
    """
    support = tool_support(template)
    if any("tool_calls" in row or row["role"] == "tool" for rows, _ in conversations for row in rows):
        _require(support.style is not None, "calls of tools")
    if tools:
        _require(support.has_schemas, "schemas of tools")
    style = support.style or _STYLES[0]
    probes = [
        {"messages": style_rows(rows, style), "tools": list(tools) or None, "add_generation_prompt": is_open}
        for rows, is_open in conversations
    ]
    answers, reason = run_worker(template.text, dict(template.tokens), probes)
    for answer in answers or [{"error": reason}]:
        if "error" in answer:
            todo = "change the conversation, or leave it out"
            raise DataError(f"the chat template refuses this: {answer['error']}", where="messages", todo=todo)
    return [fill_dates(answer["text"]) for answer in answers]


def _require(is_written: bool, what: str) -> None:
    if not is_written:
        todo = "leave out the conversations with tools, or take a model whose template has them"
        raise DataError(f"the model's chat template writes no {what}", where="messages", todo=todo)


def style_rows(rows: Sequence[Row], style: tuple[bool, bool]) -> list[dict[str, Any]]:
    """Messages in one of the forms in use; see ``ToolSupport``."""
    as_text, as_none = style
    styled = []
    for row in rows:
        new = dict(row)
        if "tool_calls" in row:
            new["content"] = row["content"] or (None if as_none else "")
            new["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _arguments(call, as_text)}}
                for call in row["tool_calls"]
            ]
        styled.append(new)
    return styled


def _arguments(call: Row, as_text: bool) -> Any:
    """The arguments of a call as text, or as the object that the text stands for."""
    text = call["function"]["arguments"]
    if as_text:
        return text
    try:
        return json.loads(text)
    except ValueError:
        todo = "give the text of a JSON object"
        raise DataError(f"the arguments {text!r:.60} of a call are no JSON", where="messages", todo=todo) from None


def texts_of(value: Any) -> Iterator[str]:
    """All texts in a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from (key, *texts_of(part))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts_of(part)

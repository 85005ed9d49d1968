"""Turns of a conversation as people write them, to messages; and the rules by which a conversation is one.

A turn is an object with ``role`` and ``content`` (OpenAI, transformers) or ``from`` and ``value`` (ShareGPT); an
assistant's may have ``reasoning_content``, ``reasoning`` or ``thinking``, ``tool_calls`` or ``function_call``, and
``weight`` 0 or 1 (OpenAI's fine-tuning format) or ``train`` true or false (axolotl). Other keys are not read, and null
is as if the key were not there, since Parquet has every key in every turn.

- Content is a string, or a list of text parts, which are joined. A turn that says nothing but blanks is refused, but
  for a tool's, an assistant's that calls tools, and a system turn, which is then left out.
- ``<think>…</think>`` at the beginning of an assistant's content is its reasoning, as Qwen3's chat template reads it;
  reasoning that is not closed is refused.
- Roles: at most one system turn, which is the first; then the user's; then user and assistant take turns. A turn that
  calls tools is followed by one or more of the tools', and those by the assistant's. The last is the assistant's.
- At least one of the assistant's turns is learned (its weight is not 0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sprat.tokens.chat import Message, ToolCall

EMPTY_TURN, NO_CONTENT, NOT_A_STRING = "an empty turn", "a turn without content", "content that is no string"
NO_ASSISTANT, ROLE_ORDER, LAST_TURN = "no assistant turn", "roles out of order", "a last turn not the assistant's"
UNKNOWN_ROLE, NOT_TURNS, NOT_UNICODE = "an unknown role", "no list of turns", "half a surrogate pair"
BAD_TOOLS, BAD_WEIGHT = "tools or tool calls that are none", "a weight that is not 0 or 1"
NOTHING_LEARNED, OPEN_REASONING = "no turn that is learned", "reasoning that is not closed"
TWO_REASONINGS = "reasoning both in the content and beside it"

Role = Literal["system", "user", "assistant", "tool"]
_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip
_NEXT_ROLES = {
    "": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",),
    "assistant that calls tools": ("tool",), "tool": ("tool", "assistant"),
}  # fmt: skip
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_SURROGATE = re.compile("[\ud800-\udfff]")
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"


class Fault(Exception):
    """Why a record is no example. ``reason`` is one of a few, to be counted by; ``detail`` is about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def parse_turns(value: Any, name: str) -> tuple[Message, ...]:
    """The messages of a list of turns, or of its JSON text as tables hold it. Their order is not checked.

    Args:
        name: of the column, for faults.

    Raises:
        Fault: it is no list of turns, or a turn is refused; see the module's text.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parse_json(value, NOT_TURNS, name)
    if not isinstance(value, list):
        raise Fault(NOT_TURNS, f"{name} is {type_name(value)}")
    if not value:
        raise Fault(NOT_TURNS, f"{name} is empty")
    return tuple(_parse_turn(turn, f"{name}[{index}]") for index, turn in enumerate(value))


def drop_empty_system(messages: Sequence[Message]) -> tuple[Message, ...]:
    """``messages`` without a system turn that says nothing."""
    return tuple(message for message in messages if message.role != "system" or message.content.strip())


def check_order(messages: Sequence[Message]) -> None:
    """Whether the turns are a conversation whose last turn is the assistant's.

    Raises:
        Fault: they are not; see the module's text.
    """
    if not any(message.role == "assistant" for message in messages):
        raise Fault(NO_ASSISTANT)
    before = ""
    for index, message in enumerate(messages):
        if message.role not in _NEXT_ROLES[before]:
            raise Fault(ROLE_ORDER, f"turn {index + 1}: {message.role} " + (f"after {before}" if before else "first"))
        before = "assistant that calls tools" if message.tool_calls else message.role
    if messages[-1].role != "assistant":
        raise Fault(LAST_TURN, messages[-1].role)


def check_learned(messages: Sequence[Message]) -> None:
    """Raise Fault where no turn of the assistant's is learned."""
    if not any(message.role == "assistant" and message.weight for message in messages):
        raise Fault(NOTHING_LEARNED)


def assistant_message(content: str, reasoning: str | None, name: str) -> Message:
    """An answer, with the reasoning that stands at its beginning or beside it."""
    if content.lstrip().startswith(_THINK_OPEN):
        inner, close, rest = content.lstrip().removeprefix(_THINK_OPEN).partition(_THINK_CLOSE)
        if not close:
            raise Fault(OPEN_REASONING, name)
        if reasoning and inner.strip():
            raise Fault(TWO_REASONINGS, name)
        reasoning, content = reasoning or inner.strip("\n"), rest.lstrip("\n")
    return Message("assistant", content, reasoning if reasoning and reasoning.strip() else None)


def parse_text(value: Any, name: str) -> str:
    """``value`` as a string that is not blank; a list of text parts is joined.

    Raises:
        Fault: it is none.
    """
    if value is None:
        raise Fault(NO_CONTENT, name)
    text = join_parts(value, name)
    if not text.strip():
        raise Fault(EMPTY_TURN, name)
    return text


def join_parts(value: Any, name: str) -> str:
    """A string as it is, a list of text parts (``{"type": "text", "text": …}``) as one string."""
    if isinstance(value, list):
        return "".join(join_parts(_part_text(part, f"{name}[{n}]"), name) for n, part in enumerate(value))
    if not isinstance(value, str):
        raise Fault(NOT_A_STRING, f"{name} is {type_name(value)}")
    if _SURROGATE.search(value):
        raise Fault(NOT_UNICODE, name)
    return value


def parse_tools(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    """The schemas of the tools that may be called: a list of objects or its JSON text; none where it is empty.

    Keys whose value is null go, at any depth: Parquet has every key of every tool in each of them.
    """
    if isinstance(value, str):
        value = _parse_json(value, BAD_TOOLS, name) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Fault(BAD_TOOLS, name)
    return tuple(_drop_nulls(tool) for tool in value)


def _drop_nulls(value: Any) -> Any:
    """``value`` without the keys of objects that are null; a null in a list (a choice of an ``enum``) stays."""
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


def type_name(value: Any) -> str:
    """What kind of JSON value it is, in a sentence."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return "null" if value is None else names.get(type(value), "a number" if type(value) is float else "no JSON value")


def _parse_turn(turn: Any, name: str) -> Message:
    if not isinstance(turn, Mapping):
        raise Fault(NOT_TURNS, f"{name} is {type_name(turn)}")
    said_role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    role = _ROLES.get(said_role.lower()) if isinstance(said_role, str) else None
    if role is None:
        raise Fault(UNKNOWN_ROLE, f"{name}: {json.dumps(said_role, default=str)[:40]}")
    key = "content" if turn.get("content") is not None or turn.get("value") is None else "value"
    content, content_name = turn.get(key), f"{name}.{key}"
    if role != "assistant":
        is_optional = role in ("tool", "system")
        text = join_parts(content, content_name) if is_optional and content is not None else None
        text = parse_text(content, content_name) if text is None else text
        call_id = turn.get("tool_call_id")
        return Message(role, text, tool_call_id=call_id if isinstance(call_id, str) else "")
    weight = _parse_weight(turn, name)
    if isinstance(said_role, str) and said_role.lower() == "function_call":
        calls = _parse_json(parse_text(content, content_name), BAD_TOOLS, name)
        calls = calls if isinstance(calls, list) else [calls]
        return Message(role, "", tool_calls=_parse_calls(calls, name), weight=weight)
    legacy_call = turn.get("function_call")
    calls = _parse_calls(turn.get("tool_calls") or ([legacy_call] if legacy_call is not None else []), name)
    text = join_parts(content, content_name) if calls and content is not None else ""
    text = text if calls else parse_text(content, content_name)
    message = assistant_message(text, parse_reasoning(turn, name), content_name)
    if not calls and not message.content.strip():
        raise Fault(EMPTY_TURN, f"{content_name}, behind its reasoning")
    return Message(role, message.content, message.reasoning, calls, weight=weight)


def parse_reasoning(turn: Mapping[str, Any], name: str) -> str | None:
    """The reasoning that stands under a key of its own in a turn or a record."""
    key = next((key for key in REASONING_KEYS if turn.get(key) is not None), None)
    return None if key is None else join_parts(turn[key], f"{name}.{key}" if name else key)


def _parse_weight(turn: Mapping[str, Any], name: str) -> float:
    weights = {key: turn[key] for key in ("weight", "train") if turn.get(key) is not None}
    for key, weight in weights.items():
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise Fault(BAD_WEIGHT, f"{name}.{key}")
    if len(set(map(float, weights.values()))) > 1:
        raise Fault(BAD_WEIGHT, f"{name}: weight and train differ")
    return float(next(iter(weights.values()), 1))


def _parse_calls(value: Any, name: str) -> tuple[ToolCall, ...]:
    """Calls as OpenAI has them, with ``function`` around name and arguments, or without it."""
    if not isinstance(value, list):
        raise Fault(BAD_TOOLS, f"{name}.tool_calls is {type_name(value)}")
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        function_name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function_name, str):
            raise Fault(BAD_TOOLS, f"{name}: a call without a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments.strip():
            arguments = _parse_json(arguments, BAD_TOOLS, f"{name}: what a call has as arguments")
        if not isinstance(arguments or {}, dict):
            raise Fault(BAD_TOOLS, f"{name}: the arguments of a call are {type_name(arguments)}")
        text = json.dumps(arguments or {}, ensure_ascii=False, default=str)
        call_id = call.get("id")
        text, function_name = join_parts(text, name), join_parts(function_name, name)
        calls.append(ToolCall(function_name, text, call_id if isinstance(call_id, str) else ""))
    return tuple(calls)


def _part_text(part: Any, name: str) -> Any:
    """The text of one part of a content."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, Mapping) else type_name(part)
        raise Fault(NOT_A_STRING, f"{name} is no text part but {json.dumps(kind, default=str)[:40]}")
    return part["text"]


def _parse_json(text: str, reason: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Fault(reason, f"{name} is no JSON text") from None

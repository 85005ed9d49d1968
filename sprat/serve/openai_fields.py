"""The fields that OpenAI's protocols share: messages, forms of an answer, thinking, sampling (tools: ``openai_tools``).

Any message that an SDK returned may be sent back as it is: what it holds beside text, calls and reasoning means nothing
here and is ignored.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sprat.serve.arguments import whole_arguments
from sprat.serve.custom_tools import input_arguments
from sprat.serve.fields import Reader
from sprat.serve.generation import left_out

if TYPE_CHECKING:
    from sprat.tokens.chat import Message

MAX_STOPS, STOP_CHARACTERS = 64, 256  # as many as the engine takes
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")
INT64 = 2**63 - 1


def read_messages(reader: Reader) -> tuple[tuple[Message, ...], bool]:
    """``messages``, and whether the last one is gone on with (DeepSeek's ``prefix``)."""
    rows = reader.required("messages", reader.objects("messages"))
    if not rows:
        raise reader.error("messages", "must have at least one message")
    messages = tuple(_message(row) for row in rows)
    last = rows[-1]
    continues = bool(last.flag("prefix"))
    if continues and messages[-1].role != "assistant":
        raise last.error("prefix", "only an assistant's message can be gone on with")
    return messages, continues


def _message(row: Reader) -> Message:
    from sprat.tokens.chat import Message

    role = row.required("role", row.choice("role", ROLES))
    role = {"developer": "system", "function": "tool"}.get(role, role)
    content = read_content(row, "content", is_output=role == "tool")
    calls = _calls(row) if role == "assistant" else ()
    if content is None and role not in ("assistant", "tool"):
        raise row.error("content", "is missing", code="missing_required_parameter")
    reasoning = row.text("reasoning_content") if role == "assistant" else None
    call_id = (row.text("tool_call_id") or row.text("name") or "") if role == "tool" else ""
    row.known("name", "refusal", "annotations", "audio", "function_call", "prefix", "reasoning", "reasoning_content")
    return Message(role, content or "", reasoning or None, calls, call_id)  # type: ignore[arg-type]


def read_content(row: Reader, name: str, *, is_output: bool = False) -> str | None:
    """Text, or parts of text; in the output of a tool a note stands in the place of a picture or a file.

    There nobody can leave it out, and it would be sent with every further request of the conversation.
    """
    if not isinstance(row.body.get(name), list):
        return row.text(name)
    texts = []
    for part in row.objects(name) or ():
        kind = part.required("type", part.text("type"))
        if kind in ("text", "input_text", "output_text"):
            texts.append(part.required("text", part.text("text")))
        elif kind == "refusal":
            texts.append(part.text("refusal") or "")
        elif is_output:
            texts.append(left_out(kind.removeprefix("input_").removesuffix("_url")))
        else:
            raise part.not_offered("type", f"parts of the type {kind!r:.40}")
    return "".join(texts)


def _calls(row: Reader) -> tuple[Any, ...]:
    from sprat.tokens.chat import ToolCall

    calls = []
    for call in row.objects("tool_calls") or ():
        is_custom = call.choice("type", ("function", "custom")) == "custom"
        call.known("type", "index")
        kind = "custom" if is_custom else "function"
        row_of_call = call.required(kind, call.object(kind))
        name = row_of_call.required("name", row_of_call.text("name"))
        arguments = input_arguments(row_of_call.text("input") or "") if is_custom else _arguments(row_of_call)
        calls.append(ToolCall(name, arguments, call.text("id") or ""))
    return tuple(calls)


def _arguments(function: Reader) -> str:
    """The text of a JSON object; that of a call that was cut off is closed, as far as it goes."""
    if isinstance(arguments := function.raw("arguments"), dict):  # as Ollama has them
        return json.dumps(arguments, ensure_ascii=False)
    try:
        return whole_arguments(function.text("arguments") or "{}")
    except (ValueError, RecursionError):
        raise function.error("arguments", "must be the text of a JSON object") from None


def read_response_format(reader: Reader) -> dict[str, Any] | None:
    """``response_format``; None: text."""
    row = reader.object("response_format")
    if row is None:
        return None
    kind = row.required("type", row.choice("type", ("text", "json_object", "json_schema")))
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": kind}
    inner = row.required("json_schema", row.object("json_schema"))
    inner.known("name", "description", "strict")
    return {"type": kind, "schema": inner.required("schema", inner.mapping("schema"))}


def read_thinking(reader: Reader) -> tuple[dict[str, Any], dict[str, str]]:
    """What a ``Generation`` has of thinking (whether, how hard, tokens at most, wishes), and where that is said."""
    thinking: bool | None = None
    budget = None
    wishes = []
    if (row := reader.object("thinking")) is not None:
        kind = row.required("type", row.choice("type", ("enabled", "disabled", "adaptive", "auto")))
        thinking = {"enabled": True, "disabled": False}.get(kind)
        wishes += [] if kind == "disabled" else ["thinking"]
        budget = row.integer("budget_tokens", 1, 2**31 - 1)
    path = "thinking"
    if (row := reader.object("chat_template_kwargs")) is not None:
        for name in ("enable_thinking", "thinking"):
            if thinking is None and (said := row.flag(name)) is not None:
                thinking, path = said, f"chat_template_kwargs.{name}"
                wishes += [path] if said else []
    effort = reader.choice("reasoning_effort", EFFORTS) or ""
    wishes += [] if effort in ("", "none") else ["reasoning_effort"]
    fields = {"thinking": thinking, "effort": effort, "max_think_tokens": budget, "thinking_wishes": tuple(wishes)}
    return fields, {"thinking": path, "max_think_tokens": "thinking.budget_tokens"}


def read_limit(reader: Reader, name: str, least: int = 1) -> int | None:
    """Tokens of an answer at most; -1, as LM Studio and llama.cpp have it, is none."""
    return None if reader.raw(name) == -1 else reader.integer(name, least)


def read_sampling(reader: Reader) -> dict[str, Any]:
    """The engine's settings that are said; what is not said is the model's default."""
    top_p = reader.number("top_p", 0, 1)
    top_k = reader.integer("top_k", -1, 1_000_000)
    fields = {
        "temperature": reader.number("temperature", 0, 2),
        "top_p": None if top_p is None else max(top_p, 1e-6),
        "top_k": None if top_k is None else max(top_k, 0),
        "min_p": reader.number("min_p", 0, 1),
        "frequency_penalty": reader.number("frequency_penalty", -2, 2),
        "presence_penalty": reader.number("presence_penalty", -2, 2),
        "repetition_penalty": reader.number("repetition_penalty", 0, 100, above=True),
        "logit_bias": _logit_bias(reader),
        "seed": reader.integer("seed", -INT64 - 1, INT64),
        "stop": reader.texts("stop", most=MAX_STOPS, longest=STOP_CHARACTERS),
        "min_tokens": reader.integer("min_tokens", 0, 2**31 - 1),
        "ignore_eos": reader.flag("ignore_eos"),
        "stop_token_ids": _ids(reader, "stop_token_ids"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _logit_bias(reader: Reader) -> dict[int, float] | None:
    table = reader.object("logit_bias")
    if table is None:
        return None
    biases = {}
    for key in table.body:
        if not key.isdecimal() or len(key) > 9:
            raise table.error(key, "must be the id of a token")
        biases[int(key)] = table.number(key, -100, 100) or 0.0
    return biases


def _ids(reader: Reader, name: str) -> tuple[int, ...] | None:
    values = reader.items(name, most=64)
    for index, value in enumerate(values or ()):
        if type(value) is not int or not 0 <= value < 2**31:
            raise reader.error(f"{name}[{index}]", "must be the id of a token")
    return None if values is None else tuple(values)

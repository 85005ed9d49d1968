"""The fields that OpenAI's protocols share: messages, tools, forms of an answer, thinking, sampling.

Any message that an SDK returned may be sent back as it is: what it holds beside text, calls and reasoning means nothing
here and is ignored.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sprat.serve.arguments import whole_arguments
from sprat.serve.fields import Reader
from sprat.serve.generation import Tool, ToolChoice

if TYPE_CHECKING:
    from sprat.tokens.chat import Message

MAX_TOOLS, MAX_STOPS, STOP_CHARACTERS = 128, 16, 256
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")
TOOL_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
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
    content = read_content(row, "content")
    calls = _calls(row) if role == "assistant" else ()
    if content is None and role != "assistant":
        raise row.error("content", "is missing", code="missing_required_parameter")
    reasoning = row.text("reasoning_content") if role == "assistant" else None
    call_id = (row.text("tool_call_id") or row.text("name") or "") if role == "tool" else ""
    row.known("name", "refusal", "annotations", "audio", "function_call", "prefix", "reasoning", "reasoning_content")
    return Message(role, content or "", reasoning or None, calls, call_id)  # type: ignore[arg-type]


def read_content(row: Reader, name: str) -> str | None:
    """Text, or parts of text."""
    if not isinstance(row.body.get(name), list):
        return row.text(name)
    texts = []
    for part in row.objects(name) or ():
        kind = part.required("type", part.text("type"))
        if kind in ("text", "input_text", "output_text"):
            texts.append(part.required("text", part.text("text")))
        elif kind == "refusal":
            texts.append(part.text("refusal") or "")
        else:
            raise part.not_offered("type", f"parts of the type {kind!r:.40}")
    return "".join(texts)


def _calls(row: Reader) -> tuple[Any, ...]:
    from sprat.tokens.chat import ToolCall

    calls = []
    for call in row.objects("tool_calls") or ():
        if call.choice("type", ("function",)) is None:
            call.known("type")
        function = call.required("function", call.object("function"))
        name = function.required("name", function.text("name"))
        calls.append(ToolCall(name, _arguments(function), call.text("id") or ""))
        call.known("index")
    return tuple(calls)


def _arguments(function: Reader) -> str:
    """The text of a JSON object; that of a call that was cut off is closed, as far as it goes."""
    try:
        return whole_arguments(function.text("arguments") or "{}")
    except (ValueError, RecursionError):
        raise function.error("arguments", "must be the text of a JSON object") from None


def read_tools(reader: Reader) -> tuple[Tool, ...]:
    """``tools``, of which only functions are had."""
    tools = []
    for row in reader.objects("tools", most=MAX_TOOLS) or ():
        if (kind := row.text("type")) not in (None, "function"):
            raise row.not_offered("type", f"tools of the type {kind!r:.40}")
        tools.append(read_function(row.required("function", row.object("function"))))
    return check_tools(reader, tools)


def read_function(row: Reader) -> Tool:
    """A function's name, description, schema and whether it is strict."""
    name = row.required("name", row.text("name"))
    if not TOOL_NAME.fullmatch(name):
        raise row.error("name", "must have 1 to 64 letters, digits, dots, dashes and underscores")
    return Tool(name, row.text("description") or "", row.mapping("parameters"), bool(row.flag("strict")))


def check_tools(reader: Reader, tools: list[Tool]) -> tuple[Tool, ...]:
    """The tools, no two of one name."""
    names = [tool.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise reader.error(f"tools[{index}].function.name", f"{name!r} comes twice")
    return tuple(tools)


def read_tool_choice(reader: Reader, tools: tuple[Tool, ...]) -> tuple[ToolChoice, tuple[Tool, ...]]:
    """``tool_choice``: a mode, the function by name, or a mode for some; and the tools that the model is shown."""
    if isinstance(reader.body.get("tool_choice"), dict):
        row = reader.object("tool_choice")
        assert row is not None
        if row.required("type", row.choice("type", ("function", "allowed_tools"))) == "function":
            return ToolChoice("named", _tool_name(row, tools)), tools
        allowed = row.required("allowed_tools", row.object("allowed_tools"))
        among = allowed.required("mode", allowed.choice("mode", ("auto", "required")))
        rows = allowed.required("tools", allowed.objects("tools"))
        for each in rows:
            each.choice("type", ("function",))
        names = {_tool_name(each, tools) for each in rows}
        if not names:
            raise allowed.error("tools", "names no tool")
        return ToolChoice(among), tuple(tool for tool in tools if tool.name in names)  # type: ignore[arg-type]
    mode = reader.choice("tool_choice", ("none", "auto", "required"))
    if mode == "required" and not tools:
        raise reader.error("tool_choice", "there are no tools to call")
    return ToolChoice(mode or "auto"), tools  # type: ignore[arg-type]


def _tool_name(row: Reader, tools: tuple[Tool, ...]) -> str:
    """The name of the tool that ``row`` refers to."""
    function = row.required("function", row.object("function"))
    name = function.required("name", function.text("name"))
    if name not in [tool.name for tool in tools]:
        raise function.error("name", f"no tool is called {name[:64]!r}")
    return name


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


def read_thinking(reader: Reader) -> tuple[bool | None, str, int | None, dict[str, str]]:
    """Whether to think, how hard ("" : not said), tokens at most, and where that is said."""
    thinking: bool | None = None
    budget = None
    if (row := reader.object("thinking")) is not None:
        kind = row.required("type", row.choice("type", ("enabled", "disabled", "adaptive", "auto")))
        thinking = {"enabled": True, "disabled": False}.get(kind)
        budget = row.integer("budget_tokens", 1, 2**31 - 1)
    path = "thinking"
    if (row := reader.object("chat_template_kwargs")) is not None:
        for name in ("enable_thinking", "thinking"):
            if thinking is None and (said := row.flag(name)) is not None:
                thinking, path = said, f"chat_template_kwargs.{name}"
    effort = reader.choice("reasoning_effort", EFFORTS) or ""
    return thinking, effort, budget, {"thinking": path, "max_think_tokens": "thinking.budget_tokens"}


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

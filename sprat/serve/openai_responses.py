"""OpenAI's Responses: the body of ``POST /v1/responses`` as a ``Generation``, without state.

The input is a list of items, of which several make one turn of ours: reasoning, a message and calls in a row are what
the assistant said and did. An item may be sent back as it came. Nothing is stored: a request that refers to what would
have been (``previous_response_id``, ``conversation``, ``item_reference``, ``prompt``) or shall be answered later
(``background``) is refused, and ``store`` is ignored. Of tools there are functions alone; others beside them are
ignored, as agents list all that they have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sprat.serve.arguments import whole_arguments
from sprat.serve.fields import Reader, shorten
from sprat.serve.generation import Generation, Tool, ToolChoice
from sprat.serve.openai_fields import EFFORTS, MAX_TOOLS, read_content, read_function, read_sampling
from sprat.tokens.chat import Message, ToolCall

LOGPROBS = "message.output_text.logprobs"  # what ``include`` calls them
ADDED_TOOLS = "additional_tools"  # an item with tools beside those of the request
_STATE = ("previous_response_id", "conversation", "prompt", "background")
_PATHS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "thinking": "reasoning.effort",
    "response_format": "text.format",
    "top_logprobs": "top_logprobs",
}
_CHOICES: Mapping[str, ToolChoice] = {
    "auto": ToolChoice("auto"),
    "none": ToolChoice("none"),
    "required": ToolChoice("required"),
}


def parse_responses(body: Mapping[str, Any]) -> Generation:
    """What a body of ``POST /v1/responses`` asks for.

    Raises:
        RequestError: 400; a field is wrong, missing, or of what is not had here; it is named by its JSON path.
    """
    reader = Reader(body)
    for name in _STATE:
        if reader.raw(name):
            what = "it: every request brings its whole conversation along, and is answered at once"
            raise reader.not_offered(name, what)
    tools, others = _tools(reader)
    tool_choice, tools = _tool_choice(reader, tools)
    reasoning = reader.object("reasoning")
    effort = (reasoning.choice("effort", EFFORTS) if reasoning else None) or ""
    logprobs = LOGPROBS in _include(reader)
    top_logprobs = reader.integer("top_logprobs", 0, 20) or 0
    parallel = reader.flag("parallel_tool_calls")
    return Generation(
        model=reader.required("model", reader.text("model", longest=256)),
        messages=tuple(_turns(reader)),
        effort=effort,
        max_tokens=reader.integer("max_output_tokens", 1, 2**31 - 1),
        sampling=read_sampling(reader) | {"top_logprobs": top_logprobs if logprobs else 0},
        logprobs=logprobs,
        response_format=_response_format(reader),
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel is None or parallel,
        stream=bool(reader.flag("stream")),
        user=_user(reader),
        paths=_PATHS,
        ignored=(*_ignored(reader), *others),
    )


def _user(reader: Reader) -> str:
    """Whom the caller asks for; the fields that are repeated are checked by the way."""
    reader.text("prompt_cache_key")
    if metadata := reader.object("metadata"):
        for name in metadata.body:
            metadata.text(name)
    names = [reader.text(name) for name in ("user", "safety_identifier")]
    return names[0] or names[1] or ""


def _include(reader: Reader) -> Sequence[Any]:
    return reader.items("include") or ()


def _ignored(reader: Reader) -> tuple[str, ...]:
    """What of the body means nothing here, with what is known and does nothing."""
    options = reader.object("stream_options")
    if options:
        options.flag("include_obfuscation")
    truncation = reader.choice("truncation", ("auto", "disabled"))
    stored, included = reader.flag("store"), [name for name in _include(reader) if name != LOGPROBS]
    ignored = [("store", stored), ("truncation", truncation == "auto"), ("include", included)]
    return (*reader.rest(), *(name for name, is_asked in ignored if is_asked))


@dataclass
class _Assistant:
    """An assistant's turn, of which items keep coming."""

    reasoning: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    def turn(self) -> Message:
        reasoning = "\n".join(filter(None, self.reasoning)) or None
        return Message("assistant", "\n".join(filter(None, self.texts)), reasoning, tuple(self.calls))


def _turns(reader: Reader) -> list[Message]:
    """The conversation, the instructions first."""
    turns: list[Message] = []
    if instructions := reader.text("instructions"):
        turns.append(Message("system", instructions))
    if isinstance(reader.raw("input"), str):
        return [*turns, Message("user", reader.body["input"])]
    assistant: _Assistant | None = None
    for item in reader.required("input", reader.objects("input")):
        if (kind := _kind(item)) == ADDED_TOOLS:
            continue
        is_assistant = kind in ("reasoning", "function_call") or item.body.get("role") == "assistant"
        if assistant and (not is_assistant or (kind == "reasoning" and (assistant.texts or assistant.calls))):
            turns.append(assistant.turn())
            assistant = None
        if not is_assistant:
            turns.append(_function_output(item) if kind == "function_call_output" else _message(item))
            continue
        assistant = assistant or _Assistant()
        if kind == "reasoning":
            assistant.reasoning.append(_reasoning(item))
        elif kind == "function_call":
            assistant.calls.append(_call(item))
        else:
            assistant.texts.append(_message(item).content)
    if assistant and assistant.calls:
        raise reader.error("input", "no function_call_output follows the last function_call", code="invalid_messages")
    turns += [assistant.turn()] if assistant else []
    if not turns or turns[-1].role == "system":
        raise reader.error("input", "needs at least one message to answer")
    return turns


def _kind(item: Reader) -> str:
    """The type of an item: a message needs not say so, nor does a reference."""
    kind = item.text("type") or ("message" if item.has("role") else "item_reference")
    if kind == "item_reference":
        raise item.error("", "refers to an item that was not stored; send the item itself", code="not_offered")
    if kind not in ("message", "reasoning", "function_call", "function_call_output", ADDED_TOOLS):
        raise item.not_offered("type", f"items of type {shorten(kind)!r}")
    item.known("id", "status")
    return kind


def _message(item: Reader) -> Message:
    role = item.required("role", item.choice("role", ("user", "assistant", "system", "developer")))
    item.known("phase")
    text = _text(item, "content")
    if role == "assistant":
        return Message("assistant", text)
    return Message("user" if role == "user" else "system", text)


def _text(item: Reader, name: str) -> str:
    """A string, or parts of text as one."""
    text = item.required(name, read_content(item, name))
    for part in item.objects(name) or () if isinstance(item.body[name], list) else ():
        part.known("annotations", "logprobs")
    return text


def _reasoning(item: Reader) -> str:
    """What was thought; the summary where that is all there is."""
    item.known("encrypted_content")
    parts = [*(item.objects("content") or ()), *(() if item.body.get("content") else item.objects("summary") or ())]
    item.known("summary")
    for part in parts:
        part.known("type")
    return "\n".join(part.required("text", part.text("text")) for part in parts)


def _call(item: Reader) -> ToolCall:
    item.known("caller")
    name = item.required("name", item.text("name"))
    try:
        arguments = whole_arguments(item.required("arguments", item.text("arguments")))
    except ValueError:
        raise item.error("arguments", "must be the text of a JSON object") from None
    return ToolCall(name, arguments, item.required("call_id", item.text("call_id")))


def _function_output(item: Reader) -> Message:
    call_id = item.required("call_id", item.text("call_id"))
    item.known("name")
    return Message("tool", _text(item, "output"), tool_call_id=call_id)


def _response_format(reader: Reader) -> Mapping[str, Any] | None:
    text = reader.object("text")
    form = text.object("format") if text else None
    if form is None:
        return None
    kind = form.required("type", form.choice("type", ("text", "json_object", "json_schema")))
    if kind != "json_schema":
        return None if kind == "text" else {"type": kind}
    form.required("name", form.text("name"))
    form.text("description")
    form.flag("strict")
    return {"type": kind, "schema": form.required("schema", form.mapping("schema"))}


def _tools(reader: Reader) -> tuple[tuple[Tool, ...], tuple[str, ...]]:
    """The functions, and the paths of tools that are none; those alone are refused."""
    tools: dict[str, Tool] = {}
    others: dict[str, Reader] = {}
    for item in [*(reader.objects("tools") or ()), *_added_tools(reader)]:
        if item.required("type", item.text("type")) != "function":
            item.known(*item.body)
            others[item.path] = item
            continue
        tool = read_function(item)
        if tool.name in tools:
            raise item.error("name", "stands twice; names of tools must be unique")
        tools[tool.name] = tool
    if len(tools) > MAX_TOOLS:
        raise reader.error("tools", f"must have at most {MAX_TOOLS} functions, not {len(tools)}")
    if reader.raw("tools") and not tools:
        first = next(iter(others.values()))
        raise first.not_offered("type", f"the tool {shorten(first.body['type'])!r}, only functions")
    return tuple(tools.values()), tuple(others)


def _added_tools(reader: Reader) -> list[Reader]:
    """Tools that come as items, which agents add to those of the request."""
    items = reader.objects("input") if isinstance(reader.raw("input"), list) else None
    rows: list[Reader] = []
    for item in items or ():
        if item.body.get("type") == ADDED_TOOLS:
            item.known("type", "role")
            rows += item.required("tools", item.objects("tools"))
    return rows


def _tool_choice(reader: Reader, tools: tuple[Tool, ...]) -> tuple[ToolChoice, tuple[Tool, ...]]:
    """Which tools are called, and which of them the model is shown."""
    names = {tool.name for tool in tools}
    if reader.raw("tool_choice") is None:
        return ToolChoice(), tools
    if isinstance(reader.raw("tool_choice"), str):
        mode = reader.required("tool_choice", reader.choice("tool_choice", tuple(_CHOICES)))
        if mode == "required" and not tools:
            raise reader.error("tool_choice", "'required' needs tools, and there are none")
        return _CHOICES[mode], tools
    choice = reader.required("tool_choice", reader.object("tool_choice"))
    kind = choice.required("type", choice.text("type"))
    if kind == "function":
        name = choice.required("name", choice.text("name"))
        if name not in names:
            raise choice.error("name", "names none of the tools")
        return ToolChoice("named", name), tools
    if kind != "allowed_tools":
        raise choice.not_offered("type", f"the choice {shorten(kind)!r}")
    mode = choice.required("mode", choice.choice("mode", ("auto", "required")))
    allowed = {_allowed(item, names) for item in choice.required("tools", choice.objects("tools"))}
    if not allowed:
        raise choice.error("tools", "names no tool")
    return _CHOICES[mode], tuple(tool for tool in tools if tool.name in allowed)


def _allowed(item: Reader, names: set[str]) -> str:
    """The name of an allowed tool."""
    item.known("type")
    name = item.required("name", item.text("name"))
    if name not in names:
        raise item.error("name", "names none of the tools")
    return name

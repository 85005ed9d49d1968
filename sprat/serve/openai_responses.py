"""OpenAI's Responses: the body of ``POST /v1/responses`` as a ``Generation``, without state.

The input is a list of items, of which several make one turn of ours: reasoning, a message and calls in a row are what
the assistant said and did. An item may be sent back as it came. Nothing is stored: a request that refers to what would
have been (``previous_response_id``, ``conversation``, ``item_reference``, ``prompt``) or shall be answered later
(``background``) is refused, and ``store`` is ignored. Tools are read in ``openai_responses_tools``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sprat.serve.arguments import whole_arguments
from sprat.serve.custom_tools import input_arguments
from sprat.serve.fields import Reader, shorten
from sprat.serve.generation import Generation
from sprat.serve.openai_fields import EFFORTS, read_content, read_sampling
from sprat.serve.openai_responses_tools import ADDED_TOOLS, qualified, read_tool_choice, read_tools
from sprat.tokens.chat import Message, ToolCall

LOGPROBS = "message.output_text.logprobs"  # what ``include`` calls them
_STATE = ("previous_response_id", "conversation", "prompt", "background")
_CALLS = ("function_call", "custom_tool_call")
_OUTPUTS = ("function_call_output", "custom_tool_call_output")
_HOSTED = (  # what somebody else's server called for itself: what came of it was said
    *("web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call"),
    *("mcp_call", "mcp_list_tools", "tool_search_call", "tool_search_output"),
)
_PATHS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "thinking": "reasoning.effort",
    "response_format": "text.format",
    "top_logprobs": "top_logprobs",
}


def parse_input_tokens(body: Mapping[str, Any], model: str) -> Generation:
    """What a body of ``POST /v1/responses/input_tokens`` asks to count; ``model`` where it names none.

    Raises:
        RequestError: as ``parse_responses``, which reads the same fields.
    """
    return parse_responses(body if body.get("model") is not None else {**body, "model": model})


def input_tokens(prompt_tokens: int) -> dict[str, Any]:
    """The body that answers it."""
    return {"object": "response.input_tokens", "input_tokens": prompt_tokens}


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
    tools, others = read_tools(reader)
    tool_choice, tools = read_tool_choice(reader, tools)
    reasoning = reader.object("reasoning")
    effort = (reasoning.choice("effort", EFFORTS) if reasoning else None) or ""
    logprobs = LOGPROBS in _include(reader)
    top_logprobs = reader.integer("top_logprobs", 0, 20) or 0
    parallel = reader.flag("parallel_tool_calls")
    return Generation(
        model=reader.required("model", reader.text("model", longest=256)),
        messages=tuple(_turns(reader)),
        effort=effort,
        thinking_wishes=() if effort in ("", "none") else ("reasoning.effort",),
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
        if (kind := _kind(item)) == ADDED_TOOLS or kind in _HOSTED:
            continue
        is_assistant = kind in ("reasoning", *_CALLS) or item.body.get("role") == "assistant"
        if assistant and (not is_assistant or (kind == "reasoning" and (assistant.texts or assistant.calls))):
            turns.append(assistant.turn())
            assistant = None
        if not is_assistant:
            turns.append(_call_output(item) if kind in _OUTPUTS else _message(item))
            continue
        assistant = assistant or _Assistant()
        if kind == "reasoning":
            assistant.reasoning.append(_reasoning(item))
        elif kind in _CALLS:
            assistant.calls.append(_call(item))
        else:
            assistant.texts.append(_message(item).content)
    if assistant and assistant.calls:
        raise reader.error("input", "no function_call_output follows the last function_call", code="invalid_messages")
    turns += [assistant.turn()] if assistant else []
    if all(turn.role == "system" for turn in turns):
        raise reader.error("input", "needs at least one message to answer")
    return turns


def _kind(item: Reader) -> str:
    """The type of an item: a message needs not say so, nor does a reference."""
    kind = item.text("type") or ("message" if item.has("role") else "item_reference")
    if kind == "item_reference":
        raise item.error("", "refers to an item that was not stored; send the item itself", code="not_offered")
    if kind not in _HOSTED and kind not in ("message", "reasoning", *_CALLS, *_OUTPUTS, ADDED_TOOLS):
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


def _text(item: Reader, name: str, *, is_output: bool = False) -> str:
    """A string, or parts of text as one."""
    text = item.required(name, read_content(item, name, is_output=is_output))
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
    name = qualified(item.text("namespace") or "", item.required("name", item.text("name")))
    if item.body.get("type") == "custom_tool_call":
        arguments = input_arguments(item.required("input", item.text("input")))
        return ToolCall(name, arguments, item.required("call_id", item.text("call_id")))
    try:
        arguments = whole_arguments(item.required("arguments", item.text("arguments")))
    except ValueError:
        raise item.error("arguments", "must be the text of a JSON object") from None
    return ToolCall(name, arguments, item.required("call_id", item.text("call_id")))


def _call_output(item: Reader) -> Message:
    call_id = item.required("call_id", item.text("call_id"))
    item.known("name")
    return Message("tool", _text(item, "output", is_output=True), tool_call_id=call_id)


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

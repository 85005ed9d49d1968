"""OpenAI's chat completions, with what DeepSeek and vLLM add: bodies to a ``Generation``, events to chunks.

Whether the model thinks is said by DeepSeek's ``thinking`` or by OpenAI's ``reasoning_effort``; where both are there,
``thinking`` decides. An effort is a wish: a model that does not think answers without. Exactly one chunk carries the
usage: the one without choices where ``stream_options.include_usage`` asks for it, else the one that finishes.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sprat.serve.events import (
    ChoiceFinished,
    CollectedCall,
    CollectedChoice,
    Collector,
    Event,
    Finished,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from sprat.serve.fields import Reader
from sprat.serve.generation import Generation
from sprat.serve.openai_fields import (
    read_limit,
    read_messages,
    read_response_format,
    read_sampling,
    read_thinking,
)
from sprat.serve.openai_tools import read_tool_choice, read_tools
from sprat.serve.sse import json_text

MAX_N = 8
DONE = "data: [DONE]\n\n"
NOT_OFFERED = ("audio", "web_search_options", "functions", "function_call")
Extension = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """What all that is sent of an answer is made with.

    Attributes:
        id: of the answer.
        model: its name as the caller gave it.
        include_usage: whether the usage has a chunk of its own.
        body: the request's, of which some protocols repeat fields.
        request_id: as in ``x-request-id``.
    """

    id: str
    model: str
    include_usage: bool = False
    body: Mapping[str, Any] = field(default_factory=dict)
    request_id: str = ""

    def fields(self, kind: str) -> dict[str, Any]:
        """The fields of an object of ``kind``."""
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model}


def parse_chat(body: dict[str, Any]) -> Generation:
    """A body of ``POST /chat/completions``.

    Raises:
        RequestError: 400; names the field by its JSON path.
    """
    reader = Reader(body)
    model = reader.required("model", reader.text("model", longest=256))
    messages, continues = read_messages(reader)
    for name in NOT_OFFERED:
        if reader.raw(name) not in (None, [], "none", "auto"):
            raise reader.not_offered(name)
    for item in reader.items("modalities") or ():
        if item != "text":
            raise reader.not_offered("modalities", f"{item!r:.40}")
    tool_choice, tools = read_tool_choice(reader, read_tools(reader))
    limits = {name: read_limit(reader, name) for name in ("max_tokens", "max_completion_tokens")}
    limit_name = "max_tokens" if limits["max_completion_tokens"] is None else "max_completion_tokens"
    thinking, paths = read_thinking(reader)
    sampling = read_sampling(reader)
    logprobs = bool(reader.flag("logprobs"))
    top_logprobs = reader.integer("top_logprobs", 0, 20)
    if top_logprobs and not logprobs:
        raise reader.error("top_logprobs", "needs logprobs: true")
    response_format = read_response_format(reader)
    if continues and response_format is not None:
        raise reader.error("response_format", "has no beginning where a message is gone on with; leave prefix out")
    options = reader.object("stream_options")
    generation = Generation(
        model=model,
        messages=messages,
        continues=continues,
        **thinking,
        max_tokens=limits[limit_name],
        sampling={**sampling, "top_logprobs": top_logprobs or 0},
        n=reader.integer("n", 1, MAX_N) or 1,
        logprobs=logprobs,
        response_format=response_format,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=reader.flag("parallel_tool_calls") is not False,
        stream=bool(reader.flag("stream")),
        include_usage=bool(options and options.flag("include_usage")),
        user=reader.text("user") or reader.text("user_id") or reader.text("safety_identifier") or "",
        paths={"max_tokens": limit_name, **paths},
    )
    return generation.with_ignored(reader.rest())


def usage_body(usage: Usage) -> dict[str, Any]:
    """The ``usage`` object, in OpenAI's and DeepSeek's names; counts are tokens, zeros included."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _logprob_rows(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    def row(token: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}

    return [{**row(each.token, each.logprob), "top_logprobs": [row(*top) for top in each.top]} for each in tokens]


def _logprobs(reasoning: Sequence[TokenLogprob], content: Sequence[TokenLogprob]) -> dict[str, Any]:
    """OpenAI's ``logprobs``, with DeepSeek's list of the reasoning's tokens where there are any."""
    rows: dict[str, Any] = {"content": _logprob_rows(content), "refusal": None}
    if reasoning:
        rows["reasoning_content"] = _logprob_rows(reasoning)
    return rows


def _whole_choice(generation: Generation, index: int, choice: CollectedChoice) -> dict[str, Any]:
    text: dict[str, Any] = {"content": choice.content, "reasoning_content": choice.reasoning or None}
    message = {"role": "assistant", **text, "refusal": None}
    if choice.calls:
        message["content"] = choice.content or None
        message["tool_calls"] = [_whole_call(call) for call in choice.calls]
    tokens = [*choice.content_logprobs, *choice.call_logprobs]
    logprobs = _logprobs(choice.reasoning_logprobs, tokens) if generation.logprobs else None
    reason = choice.finish.reason if choice.finish else "stop"
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def _whole_call(call: CollectedCall) -> dict[str, Any]:
    if call.is_custom:
        return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def whole(generation: Generation, collector: Collector, head: Head, extension: Extension) -> dict[str, Any]:
    """The answer as one object; ``extension`` is its ``sprat`` object."""
    assert collector.finished is not None
    choices = [_whole_choice(generation, index, choice) for index, choice in enumerate(collector.choices)]
    body = {**head.fields("chat.completion"), "choices": choices, "usage": usage_body(collector.finished.usage)}
    return {**body, "sprat": extension}


class ChunkWriter:
    """Events to server-sent events, each as it comes; by hand, since a chunk is written for each token.

    Every delta has ``reasoning_content``, if only as null: DeepSeek's own example reads it off each.
    """

    def __init__(self, generation: Generation, head: Head) -> None:
        fields = json.dumps(head.fields("chat.completion.chunk"))
        self._prefix = f"data: {fields[:-1]}, "
        self._null_usage = ', "usage": null' if head.include_usage else ""
        self._generation, self._head = generation, head
        self._pending: ChoiceFinished | None = None

    def _chunk(self, choice: int, delta: str, logprobs: str = "null", finish: str = "null", more: str = "") -> str:
        body = f'"index": {choice}, "delta": {delta}, "logprobs": {logprobs}, "finish_reason": {finish}'
        return f'{self._prefix}"choices": [{{{body}}}]{more or self._null_usage}}}\n\n'

    def write(self, event: Event, extension: Extension | None = None) -> str:
        """What ``event`` sends, perhaps nothing; ``extension`` goes with the usage."""
        if isinstance(event, TextDelta):
            own, other = ("content", "reasoning_content")[:: 1 if event.kind == "content" else -1]
            if not event.text and not event.logprobs:
                return ""
            tokens = event.logprobs
            split = (tokens, ()) if event.kind == "reasoning" else ((), tokens)
            logprobs = json.dumps(_logprobs(*split)) if self._generation.logprobs else "null"
            return self._chunk(event.choice, f'{{"{own}": {json_text(event.text)}, "{other}": null}}', logprobs)
        if isinstance(event, ToolCallDelta):
            return self._chunk(event.choice, json_text({"reasoning_content": None, "tool_calls": [_call_delta(event)]}))
        if isinstance(event, Started):
            begin = '{"role": "assistant", "content": "", "reasoning_content": null}'
            return "".join(self._chunk(choice, begin) for choice in range(self._generation.n))
        if isinstance(event, ChoiceFinished):
            before, self._pending = self._finish_chunk(), event
            return before
        if isinstance(event, Finished):
            return self._write_usage(event, extension or {}) + DONE
        return f"data: {json.dumps(event.error.body())}\n\n"

    def _finish_chunk(self, more: str = "") -> str:
        """The finish of a choice, which waits for the next event: the last one may carry the usage."""
        event, self._pending = self._pending, None
        return (
            ""
            if event is None
            else self._chunk(event.choice, '{"reasoning_content": null}', finish=f'"{event.reason}"', more=more)
        )

    def _write_usage(self, event: Finished, extension: Extension) -> str:
        usage = f', "usage": {json.dumps(usage_body(event.usage))}, "sprat": {json.dumps(extension)}'
        if not self._head.include_usage:
            return self._finish_chunk(usage)
        return f'{self._finish_chunk()}{self._prefix}"choices": []{usage}}}\n\n'


def _call_delta(event: ToolCallDelta) -> dict[str, Any]:
    kind, text = ("custom", "input") if event.is_custom else ("function", "arguments")
    said: dict[str, Any] = {text: event.arguments}
    if not event.name:
        return {"index": event.index, kind: said}
    return {"index": event.index, "id": event.id, "type": kind, kind: {"name": event.name, **said}}


async def stream_events(
    generation: Generation, batches: AsyncIterator[list[Event] | None], head: Head, extension: Any
) -> AsyncIterator[str]:
    """The answer as text/event-stream.

    Args:
        batches: events as they come; None is answered with a comment that keeps the connection alive.
        extension: called at the end for the ``sprat`` object.
    """
    writer = ChunkWriter(generation, head)
    async for batch in batches:
        if batch is None:
            yield ": keep-alive\n\n"
            continue
        last = batch[-1]
        text = "".join(writer.write(event, extension() if event is last else None) for event in batch)
        if text:
            yield text

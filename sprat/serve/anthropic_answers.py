"""Anthropic's Messages: the events of an answer as their stream, and as one message.

A message is a list of blocks: thinking, text, and one for each call. In a stream a block is begun, gets its deltas and
is ended before the next one is begun. A thinking block is signed with a digest of what it says; it may be sent back and
is not checked. An answer without a word is one empty block of text, since clients read the first block.

The tokens of the prompt that were in the cache are not among ``input_tokens``. Counts come with ``message_start`` and
once more, whole, with ``message_delta``: they replace each other and are never added up.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from sprat.serve.arguments import parse_arguments
from sprat.serve.errors import anthropic_body
from sprat.serve.events import (
    ChoiceFinished,
    Collector,
    Event,
    Failed,
    Finished,
    Started,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from sprat.serve.sse import server_sent

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def token_count(prompt_tokens: int) -> dict[str, Any]:
    """The body that answers ``count_tokens``."""
    return {"input_tokens": prompt_tokens}


def whole(collector: Collector, *, message_id: str, model: str) -> dict[str, Any]:
    """The whole answer, as one message.

    Args:
        collector: it has followed all events.
        message_id: ``msg_…``.
        model: as the caller wrote it.
    """
    choice, finished = collector.choices[0], collector.finished
    if choice.finish is None or finished is None:
        raise RuntimeError("the answer has not ended")
    blocks: list[dict[str, Any]] = []
    if choice.reasoning:
        signature = _signature(choice.reasoning)
        blocks.append({"type": "thinking", "thinking": choice.reasoning, "signature": signature})
    if choice.content:
        blocks.append(_empty_text() | {"text": choice.content})
    blocks += [_empty_call(call.id, call.name) | {"input": _input(call.arguments)} for call in choice.calls]
    message = _message(message_id, model, _usage(finished.usage))
    return message | {"content": blocks or [_empty_text()], **_stop(choice.finish)}


async def stream_events(
    events: AsyncIterator[Event | None], *, message_id: str, model: str, request_id: str = ""
) -> AsyncIterator[str]:
    """The answer as server-sent events.

    Args:
        events: of one choice; None where none came for a while, which is answered with a ping: 4 seconds at most, for
            a client to see one in 5.
        message_id, model, request_id: as in ``whole`` and ``anthropic_body``.
    """
    stream = _Stream(message_id, model)
    async for event in events:
        if event is None:
            yield _sent({"type": "ping"})
        elif isinstance(event, Failed):
            yield _sent(anthropic_body(event.error, request_id))
            return
        else:
            for body in stream.push(event):
                yield _sent(body)


class _Stream:
    """Where a stream is: the block that is open, and how many there were."""

    def __init__(self, message_id: str, model: str) -> None:
        self.message_id, self.model = message_id, model
        self.finish: ChoiceFinished | None = None
        self._open: str | int | None = None  # "reasoning", "content", or the index of a call
        self._index = -1
        self._thinking = hashlib.sha256()

    def push(self, event: Event) -> list[dict[str, Any]]:
        """The bodies of what one event makes."""
        if isinstance(event, Started):
            usage = _usage(Usage(event.prompt_tokens, event.cached_tokens, 0, 0))
            message = _message(self.message_id, self.model, usage)
            return [{"type": "message_start", "message": message}, {"type": "ping"}]
        if isinstance(event, TextDelta):
            return self._text(event)
        if isinstance(event, ToolCallDelta):
            bodies = [] if self._open == event.index else self._begin(event.index, _empty_call(event.id, event.name))
            return bodies + self._delta({"type": "input_json_delta", "partial_json": event.arguments}, event.arguments)
        if isinstance(event, ChoiceFinished):
            self.finish = event
            bodies = [] if self._index >= 0 else self._begin("content", _empty_text())
            return bodies + self._end()
        if isinstance(event, Finished):
            if self.finish is None:
                raise RuntimeError("the answer has not ended")
            usage = _usage(event.usage)
            return [{"type": "message_delta", "delta": _stop(self.finish), "usage": usage}, {"type": "message_stop"}]
        return []

    def _text(self, event: TextDelta) -> list[dict[str, Any]]:
        if not event.text:  # log-probabilities alone
            return []
        is_thinking = event.kind == "reasoning"
        empty = {"type": "thinking", "thinking": "", "signature": ""} if is_thinking else _empty_text()
        bodies = [] if self._open == event.kind else self._begin(event.kind, empty)
        if is_thinking:
            self._thinking.update(event.text.encode())
            return bodies + self._delta({"type": "thinking_delta", "thinking": event.text}, event.text)
        return bodies + self._delta({"type": "text_delta", "text": event.text}, event.text)

    def _begin(self, name: str | int, block: Mapping[str, Any]) -> list[dict[str, Any]]:
        bodies = self._end()
        self._open, self._index, self._thinking = name, self._index + 1, hashlib.sha256()
        return [*bodies, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _delta(self, delta: Mapping[str, Any], text: str) -> list[dict[str, Any]]:
        return [{"type": "content_block_delta", "index": self._index, "delta": delta}] if text else []

    def _end(self) -> list[dict[str, Any]]:
        if self._open is None:
            return []
        bodies: list[dict[str, Any]] = []
        if self._open == "reasoning":
            signature = _encode(self._thinking.digest())
            bodies = self._delta({"type": "signature_delta", "signature": signature}, signature)
        self._open = None
        return [*bodies, {"type": "content_block_stop", "index": self._index}]


def _sent(body: Mapping[str, Any]) -> str:
    return server_sent(body, str(body["type"]))


def _message(message_id: str, model: str, usage: Mapping[str, Any]) -> dict[str, Any]:
    """A message that has not begun."""
    head = {"id": message_id, "type": "message", "role": "assistant", "model": model, "content": []}
    return {**head, "stop_reason": None, "stop_sequence": None, "usage": usage}


def _empty_text() -> dict[str, Any]:
    return {"type": "text", "text": ""}


def _empty_call(call_id: str, name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": {}, "caller": {"type": "direct"}}


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call as their clients read them off the stream."""
    try:
        return parse_arguments(arguments)
    except ValueError:
        return {}


def _stop(finish: ChoiceFinished) -> dict[str, Any]:
    """Why it ended. An answer that was ended from outside is a paused turn: it may be sent back and gone on with."""
    if finish.ended_by:
        return {"stop_reason": "pause_turn", "stop_sequence": None}
    if finish.stop and finish.reason == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.stop}
    return {"stop_reason": _STOP_REASONS[finish.reason], "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _signature(thinking: str) -> str:
    return _encode(hashlib.sha256(thinking.encode()).digest())


def _encode(digest: bytes) -> str:
    return base64.b64encode(digest[:24]).decode()

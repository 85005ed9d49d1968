"""What others' SDKs make of our bodies and streams: a server that replies what a test says, and random answers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hypothesis import strategies as st

from sprat.serve.events import (
    ChoiceFinished,
    Event,
    Finished,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)


class Replies:
    """An HTTP server that replies ``body`` to whatever it is asked, and remembers what that was."""

    def __init__(self) -> None:
        self.body, self.content_type, self.status = b"", "application/json", 200
        self.asked: dict[str, Any] = {}
        replies = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet

            def do_POST(self) -> None:
                replies.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(replies.status)
                self.send_header("Content-Type", replies.content_type)
                self.send_header("Content-Length", str(len(replies.body)))
                self.end_headers()
                self.wfile.write(replies.body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def say(self, body: Any, status: int = 200) -> None:
        """Reply a JSON object, or the text of a stream."""
        is_stream = isinstance(body, str)
        self.body = (body if is_stream else json.dumps(body)).encode()
        self.content_type = "text/event-stream" if is_stream else "application/json"
        self.status = status


@contextmanager
def replying() -> Iterator[Replies]:
    """A server while it is needed."""
    replies = Replies()
    try:
        yield replies
    finally:
        replies.server.shutdown()
        replies.server.server_close()


def streamed(translate: Callable[[AsyncIterator[Event | None]], AsyncIterator[str]], events: Sequence[Any]) -> str:
    """The text of a whole stream of ``events``."""

    async def source() -> AsyncIterator[Event | None]:
        for event in events:
            yield event

    async def read() -> str:
        return "".join([piece async for piece in translate(source())])

    return asyncio.run(read())


def sent(stream: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and data of each event of a stream."""
    events = []
    for block in stream.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        events.append((fields.get("event", ""), json.loads(fields["data"])))
    return events


def nothing_extra(model: Any) -> None:
    """Fail where an SDK's own type has no field for what was sent."""
    if isinstance(model, (list, tuple)):
        for item in model:
            nothing_extra(item)
    elif hasattr(model, "model_extra"):
        assert not model.model_extra, f"{type(model).__name__} does not know {sorted(model.model_extra)}"
        for name in model.model_fields_set:
            nothing_extra(getattr(model, name))


def pieces_of(text: str, cuts: Sequence[int]) -> list[str]:
    """``text`` cut at some places."""
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[low:high] for low, high in zip(places, places[1:], strict=False)]


_CUTS = st.lists(st.integers(0, 200), max_size=5)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_ARGUMENTS = st.dictionaries(st.text(max_size=5), _VALUES, max_size=3)
_PROBABILITY = st.floats(-30, 0, allow_nan=False)
_TOKENS = st.binary(min_size=1, max_size=4)
_LOGPROBS = st.builds(
    TokenLogprob, _TOKENS, _PROBABILITY, st.lists(st.tuples(_TOKENS, _PROBABILITY), max_size=2).map(tuple)
)


@st.composite
def answers(draw: st.DrawFn, *, with_logprobs: bool = False) -> list[Event]:
    """The events of an answer: thinking, text and calls in pieces, ended for any reason, perhaps cut off anywhere."""
    parts: list[Event] = []
    for kind in ("reasoning", "content"):
        for text in pieces_of(draw(st.text(max_size=40)), draw(_CUTS)):
            logprobs = tuple(draw(st.lists(_LOGPROBS, max_size=2))) if with_logprobs and kind == "content" else ()
            parts.append(TextDelta(0, kind, text, logprobs))
    calls = draw(st.lists(st.tuples(st.sampled_from(["add", "get_weather"]), _ARGUMENTS), max_size=3))
    for index, (name, arguments) in enumerate(calls):
        parts.append(ToolCallDelta(0, index, id=f"call_{index}", name=name))
        text = json.dumps(arguments, ensure_ascii=draw(st.booleans()))
        parts += [ToolCallDelta(0, index, piece) for piece in pieces_of(text, draw(_CUTS))]
    cut = draw(st.integers(0, len(parts)))
    if cut < len(parts):
        end = ChoiceFinished(0, *draw(st.sampled_from([("length",), ("length", "", "shutdown")])))
    elif calls:
        end = ChoiceFinished(0, "tool_calls")
    else:
        end = ChoiceFinished(
            0, *draw(st.sampled_from([("stop",), ("stop", "END"), ("length",), ("stop", "", "cancel")]))
        )
    prompt, output = draw(st.integers(1, 10**6)), draw(st.integers(0, 10**6))
    cached, thought = draw(st.integers(0, prompt)), draw(st.integers(0, output))
    return [Started(prompt, cached), *parts[:cut], end, Finished(Usage(prompt, cached, output, thought), 0.5)]


def said(events: Sequence[Event], kind: str) -> str:
    """All text of a kind, read off the events."""
    return "".join(event.text for event in events if isinstance(event, TextDelta) and event.kind == kind)


def called(events: Sequence[Event]) -> list[tuple[str, str, str]]:
    """Id, name and arguments of each call, read off the events."""
    calls: dict[int, tuple[str, str, str]] = {}
    for event in events:
        if isinstance(event, ToolCallDelta):
            call_id, name, arguments = calls.get(event.index, (event.id, event.name, ""))
            calls[event.index] = (call_id, name, arguments + event.arguments)
    return list(calls.values())


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in _places(item, (*path, key)))]


@st.composite
def spoiled(draw: st.DrawFn, body: dict[str, Any]) -> dict[str, Any]:
    """A body of which one value somewhere is another one, or which says one thing more."""
    result: dict[str, Any] = json.loads(json.dumps(body))
    *path, last = draw(st.sampled_from(_places(result)[1:]))
    container: Any = result
    for key in path:
        container = container[key]
    if isinstance(container, dict) and draw(st.booleans()):
        last = draw(st.text(max_size=5))
    container[last] = draw(_VALUES)
    return result

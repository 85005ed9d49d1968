"""Who does not read is dropped, who leaves ends the request, and who only stops sending gets the answer."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from sprat.engine.sampling_params import Sampling
from sprat.serve import ServeConfig
from sprat.serve.server import raise_file_limit
from tests.unit.serve.live import live, serving
from tests.unit.serve.scripted import ScriptedEngine, within
from tests.unit.serve.test_connections import POST, answered, connect, read_all

WORD = "x" * 2000


def request(text: str = "add 3 and 4", version: bytes = b"1.1", **more: Any) -> bytes:
    """One whole request."""
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": text}], **more}).encode()
    return POST.replace(b"HTTP/1.1", b"HTTP/" + version) + b"Content-Length: %d\r\n\r\n" % len(body) + body


def words(count: int) -> Callable[[str, Sampling], tuple[str, str]]:
    """A script that says ``count`` long words."""
    return lambda question, sampling: ("", f"{WORD} " * count)


@contextmanager
def small_window(address: str) -> Iterator[socket.socket]:
    """A connection whose system takes little before the program reads it."""
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.settimeout(20)
        caller.connect((host, int(port)))
        yield caller


def test_a_stream_that_nobody_reads_is_dropped_and_its_request_ends() -> None:
    engine = ScriptedEngine(words(20_000), pause=0.0005)
    with live(engine, max_unread_bytes=100_000, max_tokens=30_000) as address, small_window(address) as caller:
        caller.sendall(request(stream=True))
        assert within(5, lambda: len(engine.handles) == 1)
        assert within(12, engine.handles[0].ended.is_set)
        assert engine.handles[0].cancelled.is_set() and engine.handles[0].said < 15_000
        assert b"[DONE]" not in read_all(caller)


def test_a_reader_that_pauses_gets_the_whole_stream() -> None:
    engine = ScriptedEngine(words(1000), pause=0.0001)
    with live(engine, max_unread_bytes=100_000, max_tokens=30_000) as address, small_window(address) as caller:
        caller.sendall(request(stream=True).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        time.sleep(1)
        got = read_all(caller)
        assert got.count(WORD.encode()) == 1000 and got.rstrip().endswith(b"0")


def test_an_answer_that_nobody_takes_is_given_up_and_one_that_is_taken_slowly_is_not() -> None:
    engine = ScriptedEngine(words(1000))
    with live(engine, write_timeout_seconds=1, max_tokens=30_000) as address, ExitStack() as stack:
        silent, slow = (stack.enter_context(small_window(address)) for _ in range(2))
        for caller in (silent, slow):
            caller.sendall(request().replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        got = len(slow.recv(100))
        began = time.monotonic()
        while piece := slow.recv(65536):
            got += len(piece)
            if time.monotonic() - began < 3:
                time.sleep(0.02)
        assert got > 2_000_000
        assert within(10, lambda: len(engine.handles) == 2 and engine.handles[1].ended.is_set())
        time.sleep(2.5)
        assert len(read_all(silent)) < 2_000_000


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_who_leaves_while_nothing_is_said_is_noticed_within_a_second(stream: bool, reset: bool) -> None:
    engine = ScriptedEngine(hold=True)
    with live(engine) as address:
        caller = connect(address)
        caller.sendall(request(stream=stream))
        assert within(5, lambda: len(engine.handles) == 1)
        time.sleep(0.2)
        if reset:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        caller.close()
        assert engine.handles[0].cancelled.wait(1.0)


@pytest.mark.parametrize("more", [b"\r\n", b"GET /healthz HTTP/1.1\r\n", b"x" * 100])
def test_who_leaves_after_bytes_of_a_next_request_is_noticed_too(more: bytes) -> None:
    engine = ScriptedEngine(hold=True)
    with live(engine) as address:
        with connect(address) as caller:
            caller.sendall(request())
            assert within(5, lambda: len(engine.handles) == 1)
            caller.sendall(more)
            time.sleep(0.2)
        assert engine.handles[0].cancelled.wait(1.0)


@pytest.mark.parametrize("stream", [False, True])
def test_who_only_stops_sending_gets_the_whole_answer(stream: bool) -> None:
    engine = ScriptedEngine(hold=True)
    with live(engine) as address, connect(address) as caller:
        caller.sendall(request(stream=stream))
        assert within(5, lambda: len(engine.handles) == 1)
        caller.shutdown(socket.SHUT_WR)
        time.sleep(1.5)
        assert not engine.handles[0].cancelled.is_set()
        engine.release()
        if stream:
            got = read_all(caller)
            events = [json.loads(event) for event in re.findall(rb"data: (\{.*\})\n", got)]
            deltas = [choice["delta"] for event in events for choice in event["choices"]]
            content = "".join(delta.get("content") or "" for delta in deltas)
            assert content == "The sum is 7" and b"data: [DONE]" in got and got.endswith(b"0\r\n\r\n")
        else:
            answer, body = answered(caller)
            assert answer.status == 200 and body["choices"][0]["message"]["content"] == "The sum is 7"
            assert caller.recv(1) == b"", "and then the server closes too"


@pytest.mark.parametrize("stream", [False, True])
def test_who_stops_sending_and_then_leaves_is_noticed(stream: bool) -> None:
    engine = ScriptedEngine(hold=True)
    with live(engine) as address:
        with connect(address) as caller:
            caller.sendall(request(stream=stream))
            assert within(5, lambda: len(engine.handles) == 1)
            caller.shutdown(socket.SHUT_WR)
            time.sleep(0.5)
            assert not engine.handles[0].cancelled.is_set()
        assert engine.handles[0].cancelled.wait(2.5)


def test_what_is_asked_at_once_and_then_ended_is_answered_as_a_whole() -> None:
    get = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with live(ScriptedEngine()) as address, connect(address) as caller:
        caller.sendall(get * 3)
        caller.shutdown(socket.SHUT_WR)
        assert read_all(caller).count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize("part", [POST[:30], POST + b"Content-Length: 5000\r\n\r\n{"])
def test_a_request_that_ends_in_its_midst_is_answered_400(part: bytes) -> None:
    with live(ScriptedEngine()) as address, connect(address) as caller:
        caller.sendall(part)
        caller.shutdown(socket.SHUT_WR)
        answer, body = answered(caller)
        assert answer.status == 400 and body["error"]["code"] == "incomplete_request"


def test_a_client_of_http_1_0_that_leaves_is_noticed() -> None:
    engine = ScriptedEngine(hold=True)
    with live(engine) as address:
        with connect(address) as caller:
            caller.sendall(request(version=b"1.0"))
            assert within(5, lambda: len(engine.handles) == 1)
        assert engine.handles[0].cancelled.wait(1.0)


def test_a_large_answer_reaches_a_client_that_reads() -> None:
    with live(ScriptedEngine(words(800)), max_tokens=30_000) as address:
        answer = httpx.post(f"{address}/v1/chat/completions", content=request().split(b"\r\n\r\n")[1],
                            headers={"Content-Type": "application/json"}, timeout=60)  # fmt: skip
        assert answer.json()["choices"][0]["message"]["content"] == f"{WORD} " * 800


class Watched:
    """An application that answers once its caller has left, and counts those who have."""

    failure = None

    def __init__(self) -> None:
        self.running, self.left = 0, list[float]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.running += 1
        if scope["path"] == "/stream":
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.append(time.monotonic())

    async def drain(self, timeout: float) -> None:
        return None

    def abort(self) -> None:
        return None


def test_a_thousand_who_leave_at_once_are_noticed_within_a_second() -> None:
    watched, app = Watched(), FastAPI()
    app.state.serving = watched
    app.mount("/", watched)
    raise_file_limit(4096)
    with serving(app, ServeConfig(port=0)) as address, ExitStack() as stack:
        callers = [stack.enter_context(connect(address)) for _ in range(1000)]
        for number, caller in enumerate(callers):
            path = b"/stream" if number % 2 else b"/whole"
            caller.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            if number % 4 == 1:  # what it has not read makes of its leaving a reset
                caller.recv(65536)
        assert within(30, lambda: watched.running == 1000)
        for caller in callers:
            caller.close()
        closed = time.monotonic()
        assert within(20, lambda: len(watched.left) == 1000)
    assert max(watched.left) - closed < 1.0

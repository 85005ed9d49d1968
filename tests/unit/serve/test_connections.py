"""Connections that say nothing, or drip, or do not read, shut nobody out; what is no HTTP is answered in JSON."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from sprat.engine import Engine
from sprat.engine.backend import Batch
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.unit.engine.fake import Fake
from tests.unit.serve.live import live
from tests.unit.serve.scripted import ScriptedEngine, within

CHAT = "/v1/chat/completions"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def connect(address: str) -> socket.socket:
    """A connection that has said nothing yet."""
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


@contextlib.contextmanager
def crowd(address: str, count: int, first: bytes) -> Iterator[list[socket.socket]]:
    """Connections that begin with ``first`` and then say no more."""
    with contextlib.ExitStack() as stack:
        callers = [stack.enter_context(connect(address)) for _ in range(count)]
        for caller in callers:
            caller.sendall(first)
        time.sleep(0.1)
        yield callers


def put_out(caller: socket.socket) -> bool:
    """Whether the server has closed it."""
    caller.setblocking(False)
    try:
        while caller.recv(4096):
            continue
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


@pytest.mark.parametrize(
    "first",
    [b"", b"POST /v1", POST + b"Content-Length: 5000\r\n\r\n{", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"],
    ids=["nothing", "half a head", "half a body", "a request long ago"],
)
def test_silent_connections_shut_nobody_out(first: bytes) -> None:
    with live(ScriptedEngine(), max_connections=20) as address, crowd(address, 60, first) as callers:
        for _ in range(3):
            answer = httpx.get(f"{address}/healthz", timeout=10)
            assert answer.status_code == 200 and answer.json()["status"] == "ok"
        assert within(5, lambda: sum(map(put_out, callers)) >= 40), "no more than 20 are held"


def test_who_waits_for_an_answer_is_not_put_out() -> None:
    engine = ScriptedEngine(hold=True)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "add 3 and 4"}]}
    answers: list[httpx.Response] = []
    with live(engine, max_connections=20) as address:
        asks = [
            threading.Thread(target=lambda: answers.append(httpx.post(address + CHAT, json=body, timeout=30)))
            for _ in range(5)
        ]
        for thread in asks:
            thread.start()
        assert within(10, lambda: len(engine.handles) == 5)
        with crowd(address, 60, b""):
            engine.release()
            for thread in asks:
                thread.join()
    assert [answer.status_code for answer in answers] == [200] * 5


@pytest.mark.parametrize("before", [b"", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"])
def test_a_head_that_drips_is_cut_off(before: bytes) -> None:
    with live(ScriptedEngine(), header_timeout_seconds=0.3) as address, connect(address) as caller:
        caller.sendall(before)
        if before:  # a second request on a connection that was used properly
            time.sleep(0.1)
            assert caller.recv(4096).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for drip in b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 50:
                caller.sendall(bytes([drip]))
                time.sleep(0.05)
        assert 0.2 < time.monotonic() - began < 3


def test_a_connection_that_is_used_properly_outlives_the_deadline() -> None:
    with live(ScriptedEngine(pause=0.05), header_timeout_seconds=0.3) as address, connect(address) as silent:
        with httpx.Client(base_url=address, timeout=10) as client:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "add 3"}]}
            for _ in range(2):
                answer = client.post(CHAT, json=body)
                assert answer.json()["choices"][0]["message"]["content"] == "The sum is 3"
                time.sleep(0.4)
        assert silent.recv(1) == b"", "one that says nothing does not"


class Slow(Fake):
    """Ten milliseconds a step."""

    def run(self, batch: Batch):  # type: ignore[no-untyped-def]
        time.sleep(0.01)
        return super().run(batch)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_tokens_flow_frees_its_blocks_within_a_second(
    parts: tuple[Transformer, Tokenizer], stream: bool
) -> None:
    model, tokenizer = parts
    engine = Engine(model, tokenizer, backend=Slow(model.config.vocab_size), frozen=True, speculate="off")
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "tell me all"}], "max_tokens": 900}
    body = json.dumps({**ask, "stream": stream, "temperature": 2, "seed": 1}).encode()
    with live(engine) as address:
        with connect(address) as caller:
            caller.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert within(10, lambda: engine.stats().sampled_tokens > 10)
        assert within(1.0, lambda: engine.stats().running == 0 and engine.stats().blocks_used == 0)
        assert engine.stats().sampled_tokens < 120
        assert within(5, lambda: httpx.get(f"{address}/healthz", timeout=30).json()["answered"] == 1), (
            "and it is metered"
        )


HOST = b"Host: 127.0.0.1\r\n"
MALFORMED = {
    "no request line": (b"HELLO\r\n\r\n", 400),
    "no HTTP at all": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", 400),
    "a header without a colon": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"nonsense\r\n\r\n", 400),
    "no Host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "headers without an end": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 20_000, 431),
    "a length that is none": (POST + b"Content-Length: many\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345", 400),
    "a chunk without a size": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n", 400),
    "another encoding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
}


def answered(caller: socket.socket) -> tuple[http.client.HTTPResponse, Any]:
    """The answer that Python's own client reads, and its JSON."""
    answer = http.client.HTTPResponse(caller)
    answer.begin()
    return answer, json.loads(answer.read())


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """One server for all that is no HTTP: it has to answer the next caller after each of them."""
    with live(ScriptedEngine()) as address:
        yield address


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("before", [b"", b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"], ids=["first", "later"])
def test_what_is_no_http_is_answered_as_any_other_error(served: str, name: str, before: bytes) -> None:
    request, status = MALFORMED[name]
    with connect(served) as caller:
        if before:
            caller.sendall(before)
            assert answered(caller)[0].status == 200
        caller.sendall(request)
        answer, body = answered(caller)
        assert (answer.status, answer.getheader("Content-Type")) == (status, "application/json")
        assert answer.getheader("Connection") == "close" and caller.recv(1) == b""
        assert body["error"].keys() == {"message", "type", "param", "code"}
        assert body["error"]["type"] == "invalid_request_error" and "HTTP" in body["error"]["message"]
        assert httpx.get(f"{served}/healthz", timeout=10).status_code == 200


def test_a_body_that_goes_wrong_after_its_answer_gets_no_second_one(caplog: pytest.LogCaptureFixture) -> None:
    wrong = POST.replace(b"application/json", b"text/plain") + b"Transfer-Encoding: chunked\r\n\r\n"
    with live(ScriptedEngine()) as address, connect(address) as caller:
        caller.sendall(wrong)
        answer, body = answered(caller)
        assert answer.status == 415 and body["error"]["param"] == "Content-Type"
        caller.sendall(b"zz\r\n")
        assert caller.recv(1) == b""
    assert not [record for record in caplog.records if record.exc_info], "and no traceback in the log"


def test_where_all_connections_wait_for_answers_one_more_is_told_so() -> None:
    engine = ScriptedEngine(hold=True)
    ask = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "add 3 and 4"}]}).encode()
    with live(engine, max_connections=3) as address, contextlib.ExitStack() as stack:
        callers = [stack.enter_context(connect(address)) for _ in range(3)]
        for caller in callers:
            caller.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(ask) + ask)
        assert within(10, lambda: len(engine.handles) == 3)
        refused = httpx.get(f"{address}/healthz", timeout=10)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "too_many_connections"
        engine.release()
        assert [answered(caller)[0].status for caller in callers] == [200] * 3
        assert httpx.get(f"{address}/healthz", timeout=10).status_code == 200

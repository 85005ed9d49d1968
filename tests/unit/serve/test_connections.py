"""Connections that say nothing, or drip, or do not read, shut nobody out; what is no HTTP is answered in JSON."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
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
GET = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
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


def read_all(caller: socket.socket) -> bytes:
    """All that comes until the server closes."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while piece := caller.recv(65536):
            got += piece
    return got


def drip(caller: socket.socket, data: bytes, pause: float) -> bytes:
    """Send byte by byte until the server answers, and read all of that."""
    caller.settimeout(pause)
    for byte in data:
        with contextlib.suppress(ConnectionError):
            caller.sendall(bytes([byte]))
        with contextlib.suppress(TimeoutError, ConnectionError):
            if caller.recv(1, socket.MSG_PEEK) is not None:
                break
    caller.settimeout(10)
    return read_all(caller)


@pytest.mark.parametrize("before", [b"", GET])
@pytest.mark.parametrize("path", ["/healthz", "/v1/messages"])
def test_a_head_that_drips_is_answered_408(before: bytes, path: str) -> None:
    with live(ScriptedEngine(), header_timeout_seconds=0.3) as address, connect(address) as caller:
        caller.sendall(before)
        if before:  # a second request on a connection that was used properly
            time.sleep(0.1)
            assert caller.recv(4096).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        caller.sendall(f"GET {path} HTTP/1.1\r\nX: ".encode())
        answer = drip(caller, b"x" * 50, 0.04)
        assert 0.2 < time.monotonic() - began < 2.5
    head, body = answer.split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ") and b"connection: close" in head and b"x-request-id: " in head
    is_anthropic = path == "/v1/messages"
    assert json.loads(body)["error"]["type"] == ("timeout_error" if is_anthropic else "invalid_request_error")
    assert ("request_id" in json.loads(body)) == is_anthropic


def test_a_connection_that_says_nothing_is_closed_without_a_word() -> None:
    with live(ScriptedEngine(), header_timeout_seconds=0.3) as address, connect(address) as caller:
        assert read_all(caller) == b""


@pytest.mark.parametrize("pause", [10.0, 0.02], ids=["silent", "dripping"])
def test_a_body_that_does_not_come_is_answered_408(pause: float) -> None:
    with live(ScriptedEngine(), body_timeout_seconds=0.4) as address, connect(address) as caller:
        caller.sendall(POST + b"X-Request-Id: mine\r\nContent-Length: 5000\r\n\r\n")
        began = time.monotonic()
        answer = read_all(caller) if pause == 10 else drip(caller, b"{" + b" " * 400, pause)
        assert 0.35 < time.monotonic() - began < 3
    head, body = answer.split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ") and b"x-request-id: mine" in head
    assert json.loads(body)["error"]["code"] == "request_timeout"


def test_a_long_body_may_take_longer_than_its_deadline_while_it_comes() -> None:
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "add 3 and 4" + " " * 500_000}]}
    body = json.dumps(ask).encode()
    with live(ScriptedEngine(), body_timeout_seconds=0.4) as address, connect(address) as caller:
        caller.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 4000):  # two hundred thousand bytes a second
            caller.sendall(body[start : start + 4000])
            time.sleep(0.02)
        assert answered(caller)[0].status == 200


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
        said = engine.stats().sampled_tokens
        counted = f'sprat:generation_tokens_total{{model_name="tiny"}} {said}.0'
        metrics = httpx.Client(base_url=address, follow_redirects=True, timeout=30)
        assert within(5, lambda: counted in metrics.get("/metrics").text), "and it is metered to the token"


HOST = b"Host: 127.0.0.1\r\n"
MALFORMED = {
    "no request line": (b"HELLO\r\n\r\n", 400),
    "no HTTP at all": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", 400),
    "a header without a colon": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"nonsense\r\n\r\n", 400),
    "no Host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "headers without an end": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 20_000, 431),
    "a thousand headers": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 1000 + b"\r\n", 431),
    "a hundred thousand headers": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"a:\r\n" * 100_000, 431),
    "a path without an end": (b"GET /" + b"x" * 40_000, 414),
    "NUL in a header": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"X: a\0b\r\n\r\n", 400),
    "NUL in the path": (b"GET /\0 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "two hosts": (b"GET /healthz HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    "a chunk of a negative size": (POST + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n{}\r\n", 400),
    "a chunk larger than any number": (POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 50 + b"\r\n", 400),
    "a length larger than any number": (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
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
        assert body["error"]["type"] == "invalid_request_error" and "request" in body["error"]["message"]
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
        refused = httpx.get(f"{address}/v1/models", timeout=10)
        assert httpx.get(f"{address}/healthz", timeout=10).status_code == 200, "health is told to the last"
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "too_many_connections"
        engine.release()
        assert [answered(caller)[0].status for caller in callers] == [200] * 3
        assert httpx.get(f"{address}/healthz", timeout=10).status_code == 200


FINE = {  # unusual, and answered all the same
    "an upgrade": (b"GET /healthz HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", [200]),
    "HTTP/2 in plain text": (
        b"GET /healthz HTTP/1.1\r\n" + HOST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        [200],
    ),
    "ten thousand bytes of headers": (
        b"GET /healthz HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 10_000 + b"\r\n\r\n",
        [200],
    ),
    "two requests at once": (GET + GET, [200, 200]),
    "three, the last cut off": (GET + GET + GET[:20], [200, 200, 408]),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", [505]),
    "a tunnel": (b"CONNECT example.com:443 HTTP/1.1\r\n" + HOST + b"\r\n", [404]),
    "all of the server": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", [404]),
    "a method of nobody": (b"BREW /healthz HTTP/1.1\r\n" + HOST + b"\r\n", [405]),
    "a chunked body": (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", [400]),
    "more than is asked": (GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + b"\r\n" + GET * 2000, [200]),
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_unusual_is_answered_in_turn_and_leaves_no_trace(
    name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    request, statuses = FINE[name]
    with live(ScriptedEngine(), header_timeout_seconds=0.5) as address, connect(address) as caller:
        caller.sendall(request)
        answers = caller.makefile("rb")  # one for all: it reads ahead
        for status in statuses:
            line = answers.readline().split()
            assert line[0] == b"HTTP/1.1" and int(line[1]) == status
            headers = http.client.parse_headers(answers)
            assert headers["Content-Type"] == "application/json"
            assert ("error" in json.loads(answers.read(int(headers["Content-Length"])))) == (status != 200)
        assert httpx.get(f"{address}/healthz", timeout=10).status_code == 200
    assert not [record for record in caplog.records if record.exc_info] and "Traceback" not in capfd.readouterr().err


def test_noise_of_any_kind_is_answered_or_closed_and_leaves_no_trace(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    dice = random.Random(1)
    seeds = [request for request, _ in (*MALFORMED.values(), *FINE.values()) if len(request) < 2000]
    with live(ScriptedEngine(), header_timeout_seconds=0.2, body_timeout_seconds=0.2) as address:
        for _ in range(300):
            noise = bytearray(dice.choice(seeds))
            for _ in range(dice.randrange(6)):
                at = dice.randrange(len(noise))
                noise[at : at + dice.randrange(3)] = dice.choice(
                    [b"", b"\r\n", b"\0", b"\n", dice.randbytes(4), b"\r", b":"]
                )
            with connect(address) as caller, contextlib.suppress(ConnectionError):
                caller.sendall(noise)
                caller.shutdown(socket.SHUT_WR)
                got = read_all(caller)
                assert got == b"" or got.startswith(b"HTTP/1.1 "), noise
                assert not re.search(rb"\r\ncontent-type: text/plain", got), noise
        assert httpx.get(f"{address}/healthz", timeout=10).status_code == 200
    assert not [record for record in caplog.records if record.exc_info] and "Traceback" not in capfd.readouterr().err


def test_whoever_sends_a_body_is_not_put_out_by_those_who_say_nothing() -> None:
    body = json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": "add 3 and 4" + " " * 400_000}]}
    ).encode()
    with (
        live(ScriptedEngine(), max_connections=20) as address,
        connect(address) as caller,
        contextlib.ExitStack() as stack,
    ):
        caller.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 50_000):
            caller.sendall(body[start : start + 50_000])
            stack.enter_context(crowd(address, 15, b""))
        assert answered(caller)[0].status == 200


@pytest.mark.parametrize("declared", [True, False])
def test_whoever_sends_too_much_reads_why(declared: bool) -> None:
    pieces = [b" " * 1_000_000] * 20
    headers = {"Content-Type": "application/json"} | ({"Content-Length": "20000000"} if declared else {})
    with live(ScriptedEngine(), max_body_bytes=1000) as address:
        answer = httpx.post(address + CHAT, content=iter(pieces), headers=headers, timeout=30)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_a_request_that_gives_way_is_told_so() -> None:
    with live(ScriptedEngine(), max_connections=2) as address, contextlib.ExitStack() as stack:
        callers = [stack.enter_context(connect(address)) for _ in range(2)]
        for caller in callers:
            caller.sendall(POST + b"Content-Length: 5000\r\n\r\n{")
            time.sleep(0.05)
        assert httpx.get(f"{address}/healthz", timeout=10).status_code == 200
        answer, told = answered(callers[0])
        assert answer.status == 503 and told["error"]["code"] == "too_many_connections"
        assert answer.getheader("retry-after") == "1" and not put_out(callers[1])


@pytest.mark.slow
def test_nine_hundred_half_open_connections_hold_up_nobody() -> None:
    half_open = [b"", b"POST /v1", POST + b"Content-Length: 5000\r\n\r\n{", b"G"]
    engine = ScriptedEngine(pause=0.02)
    ask = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "add " + "3 " * 40}]}

    def stream(address: str, results: list[tuple[float, str]]) -> None:
        began = time.monotonic()
        with httpx.stream("POST", address + CHAT, json=ask, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            first = time.monotonic() - began
            results.append((first, [line for line in lines if line][-1]))

    with live(engine, header_timeout_seconds=3, body_timeout_seconds=4) as address, contextlib.ExitStack() as stack:
        callers = [stack.enter_context(connect(address)) for _ in range(900)]
        for number, caller in enumerate(callers):
            caller.sendall(half_open[number % 4])
        results: list[tuple[float, str]] = []
        threads = [threading.Thread(target=stream, args=(address, results)) for _ in range(50)]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            for caller in callers[3::4]:
                with contextlib.suppress(OSError):
                    caller.send(b"E")
            time.sleep(0.5)
        assert [last for _, last in results] == ["data: [DONE]"] * 50, "no stream is lost"
        assert within(max(0.1, began + 7.5 - time.monotonic()), lambda: all(map(put_out, callers)))

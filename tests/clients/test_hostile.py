"""Whatever is sent, the answer is an error in JSON and never a 500, and the server goes on without a trace."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bench.serving.server import KEY, Server, running
from tests.clients import hostile
from tests.clients.hostile import Attempt
from tests.clients.workers.conversations import HELLO_ANSWER, MODEL, user

SECONDS, BIG_SECONDS = 15, 30
FULL = (429, 503)  # may be said at any time


@pytest.fixture(scope="module")
def attacked(model: Path) -> Iterator[Server]:
    """A server of its own, so that the clients' does not suffer."""
    with running(model) as server:
        yield server


def answer_of(url: str, attempt: Attempt) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; status 0 where the connection was closed without a word."""
    place = urlsplit(url)
    assert place.hostname == "127.0.0.1" and place.port
    limit = BIG_SECONDS if attempt.big else SECONDS
    if attempt.raw:
        with socket.create_connection((place.hostname, place.port), timeout=limit) as connection:
            try:
                connection.sendall(attempt.raw)
                response = http.client.HTTPResponse(connection, method=attempt.raw.split(b" ")[0].decode("latin-1"))
                response.begin()
                return response.status, dict(response.headers), response.read()
            except (ConnectionError, http.client.HTTPException):
                return 0, {}, b""
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=limit)
    headers = {"Authorization": f"Bearer {KEY}", **attempt.headers}
    try:
        connection.request(attempt.method, attempt.path, attempt.body or None, headers)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    except (BrokenPipeError, ConnectionResetError):  # refused before the body was read
        return 0, {}, b""
    finally:
        connection.close()


def fault_of(attempt: Attempt, status: int, headers: dict[str, str], body: bytes) -> str:
    """What is wrong with an answer; empty: nothing."""
    if status == 0:
        return "" if attempt.raw or attempt.big else "closed without a word"
    if status >= 500 and status not in (*FULL, 501, 505):
        return f"{status}: {body[:300]!r}"
    if b"Traceback" in body or b'\n  File "' in body:
        return f"a trace in the answer: {body[:300]!r}"
    if status < 400 or attempt.method == "HEAD" or not body and attempt.method in ("OPTIONS", "TRACE"):
        return ""
    try:
        error = json.loads(body)["error"]
        message = error if isinstance(error, str) else error["message"]
    except (ValueError, KeyError, TypeError):
        return f"{status} that is not an error in JSON: {body[:300]!r}"
    kind = {k.lower(): v for k, v in headers.items()}.get("content-type", "")
    return "" if kind.startswith("application/json") and message else f"{status} as {kind!r}: {body[:200]!r}"


def faults(url: str, attempts: Iterable[Attempt]) -> tuple[int, list[str]]:
    """How many there were, and the faults."""
    count, found = 0, []
    for attempt in attempts:
        count += 1
        began = time.monotonic()
        try:
            fault = fault_of(attempt, *answer_of(url, attempt))
        except TimeoutError:
            fault = f"no answer in {time.monotonic() - began:.0f} s"
        if fault:
            found.append(f"{attempt.name}: {fault}")
    return count, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("corpus", "least"),
    [
        (hostile.wrong_types, 2_500),
        (hostile.broken_bodies, 150),
        (hostile.too_much, 60),
        (hostile.strange_paths, 140),
    ],
)
def test_no_request_makes_it_stumble(corpus: Callable[[], Iterator[Attempt]], least: int, attacked: Server) -> None:
    count, found = faults(attacked.url, corpus())
    assert count >= least
    assert not found, f"{len(found)} of {count}:\n" + "\n".join(found[:40])
    check_well(attacked)


def test_a_sample_of_them(attacked: Server) -> None:
    every = list(chain(hostile.wrong_types(), hostile.broken_bodies(), hostile.strange_paths()))
    count, found = faults(attacked.url, every[::37])
    assert count > 50 and not found, "\n".join(found[:40])
    check_well(attacked)


def test_broken_http(attacked: Server) -> None:
    count, found = faults(attacked.url, hostile.broken_http(urlsplit(attacked.url).netloc, KEY))
    assert count > 20 and not found, "\n".join(found)
    check_well(attacked)


def check_well(server: Server) -> None:
    """It runs, has shown no trace, and answers rightly; raises AssertionError otherwise."""
    body = json.dumps({"model": MODEL, "messages": user("Say hello."), "temperature": 0}).encode()
    status, _, answer = answer_of(server.url, Attempt("well", body=body))
    assert status == 200, answer
    assert json.loads(answer)["choices"][0]["message"]["content"] == HELLO_ANSWER
    assert server.process.poll() is None and not server.trace, server.trace

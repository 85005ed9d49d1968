"""Who may ask, and what one who asks can learn of another: nothing, not even from the count of cached tokens."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sprat.engine import Engine
from sprat.errors import ServeError
from sprat.model import Transformer
from sprat.serve import ServeConfig, bind_socket
from sprat.serve.api_keys import ApiKeys
from sprat.serve.server import run
from sprat.tokens import Tokenizer
from tests.unit.engine.fake import Fake
from tests.unit.serve.live import live
from tests.unit.serve.scripted import ScriptedEngine

CHAT = "/v1/chat/completions"
ALICE, BOB = "sk-alice-0123456789", "sk-bob-9876543210"
SECRET = "please keep to yourself what opens the cellar door of our house by the harbor: swordfish-4"
GUESSES = [SECRET[:-1] + digit for digit in "945"] + [SECRET]


def engine_of(parts: tuple[Transformer, Tokenizer]) -> Engine:
    """The real engine around a back end that costs nothing."""
    return Engine(*parts, backend=Fake(parts[0].config.vocab_size), frozen=True)


def ask(address: str, key: str | None, text: str, **more: Any) -> httpx.Response:
    """One question by somebody."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 2, "seed": 1, **more}
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{address}{CHAT}", json=body, headers=headers, timeout=30)


def hits(address: str, key: str | None, text: str, *, stream: bool = False) -> int:
    """How many tokens of a question were in the cache, as the client is told."""
    if not stream:
        return int(ask(address, key, text).json()["usage"]["prompt_cache_hit_tokens"])
    lines = ask(address, key, text, stream=True, stream_options={"include_usage": True}).text.split("\n\n")
    return int(json.loads(lines[-3].removeprefix("data: "))["usage"]["prompt_cache_hit_tokens"])


@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_tell_one_key_nothing_of_what_another_asked(
    parts: tuple[Transformer, Tokenizer], stream: bool
) -> None:
    seen = []
    for strangers in (0, 1):
        with live(engine_of(parts), api_keys=[ALICE, BOB]) as address:
            for _ in range(strangers):
                assert hits(address, ALICE, SECRET) == 0
                assert hits(address, ALICE, SECRET) > 20, "her own prompt is still found"
            seen.append([hits(address, BOB, guess, stream=stream) for guess in GUESSES])
    assert seen[0] == seen[1] and seen[0][0] == 0


def test_without_keys_everybody_is_one_tenant(parts: tuple[Transformer, Tokenizer]) -> None:
    with live(engine_of(parts)) as address:
        assert hits(address, None, SECRET) == 0
        assert hits(address, "anything", SECRET) > 20


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(hold=True)


@pytest.fixture
def address(engine: ScriptedEngine) -> Iterator[str]:
    with live(engine, api_keys=[ALICE, BOB]) as address:
        yield address


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer ", f"Bearer {ALICE}x", ALICE, f"Basic {ALICE}", f"Bearer {ALICE[:-1]}"]
)
def test_who_has_no_key_is_refused_before_the_body_is_read(
    engine: ScriptedEngine, address: str, header: str | None
) -> None:
    host, port = address.removeprefix("http://").split(":")
    more = f"Authorization: {header}\r\n" if header is not None else ""
    with socket.create_connection((host, int(port)), timeout=5) as caller:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 999\r\n"
        caller.sendall(f"{head}{more}\r\n".encode())
        answer = b""
        while b"invalid_api_key" not in answer and (piece := caller.recv(4096)):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 401") and b"www-authenticate: Bearer" in answer and not engine.asked


def test_what_needs_a_key_and_what_does_not(address: str) -> None:
    for path, status in (("/", 200), ("/healthz", 200), ("/openapi.json", 200), ("/v1/models", 401), ("/no", 401)):
        assert httpx.get(address + path).status_code == status
    key = {"Authorization": f"bearer {BOB}"}
    assert httpx.get(f"{address}/v1/models", headers=key).json()["data"][0]["id"] == "tiny"
    assert httpx.get(f"{address}/healthz", headers=key).json() == {"status": "ok", "model": "tiny"}, (
        "no totals of others"
    )


def test_nobody_ends_the_answer_of_another(engine: ScriptedEngine, address: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "add 1 and 2"}], "stream": True}
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in (ALICE, BOB))
    with httpx.stream("POST", address + CHAT, json=body, headers=alice, timeout=30) as answer:
        lines = answer.iter_lines()
        name = json.loads(next(lines).removeprefix("data: "))["id"]
        assert httpx.post(f"{address}{CHAT}/{name}/cancel", headers=bob).status_code == 404
        assert not engine.handles[0].cancelled.is_set()
        assert httpx.post(f"{address}{CHAT}/{name}/cancel", headers=alice).status_code == 204
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_keys_and_what_stands_for_them_are_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    def broken(question: str, sampling: Any) -> tuple[str, str]:
        raise KeyError("oops")

    tenant = ApiKeys([ALICE]).tenant(f"Bearer {ALICE}")
    assert tenant is not None and len(tenant.secret) == 32
    with caplog.at_level(logging.DEBUG), live(ScriptedEngine(broken), api_keys=[ALICE]) as address:
        assert ask(address, ALICE, "hello").status_code == 500
        assert ask(address, "sk-wrong-key", "hello").status_code == 401
    for secret in (ALICE, "sk-wrong-key", tenant.name, tenant.secret.hex(), repr(tenant.secret)):
        assert secret not in caplog.text


@pytest.mark.parametrize("key", ["", " ", "two words", "schlüssel", "tab\t", "line\n"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ServeError, match="API key"):
        ServeConfig(api_keys=(ALICE, key))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_the_network_is_served_with_a_key_only(tmp_path: Path, host: str) -> None:
    with pytest.raises(ServeError, match=r"without a key .*give a key with --api-key"):
        run(tmp_path / "no-such-model", ServeConfig(host=host, port=0))
    with pytest.raises(ServeError, match="without a key"):
        bind_socket(ServeConfig(host=host, port=0))
    try:
        bind_socket(ServeConfig(host=host, port=0, api_keys=(ALICE,))).close()
    except ServeError as error:
        assert "cannot listen" in str(error), "this machine may have no IPv6"

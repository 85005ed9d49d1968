"""What is the server's own state or fault is told as such, in every protocol; nobody is blamed for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from sprat.engine import Engine, Sampling
from sprat.engine.backend import BLOCK_SIZE
from sprat.errors import EngineError, MachineError, SpratError
from sprat.model import Transformer
from sprat.serve import ServeConfig, create_app
from sprat.serve.app import ServedModel, serve_engine
from sprat.serve.engine_client import EngineDied
from sprat.tokens import Tokenizer
from tests.unit.serve.live import serving
from tests.unit.serve.scripted import ScriptedEngine

ROOM = 16 * BLOCK_SIZE  # tokens that there turns out to be memory for
LONG = [5 + place % 300 for place in range(ROOM + 200)]
SHORT = "what opens the door"
TEXT = "what opens the door of our house " * 200

PROTOCOLS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "{}"}]},
    "/v1/completions": {"prompt": "{}"},
    "/v1/responses": {"input": "{}"},
    "/v1/messages": {"messages": [{"role": "user", "content": "{}"}], "max_tokens": 3000},
}


def body(path: str, text: str, tokens: int, **fields: Any) -> dict[str, Any]:
    """A request of exactly so many tokens, in the protocol of ``path``."""
    limit = {"/v1/responses": "max_output_tokens"}.get(path, "max_tokens")
    said = json.loads(json.dumps(PROTOCOLS[path]).replace("{}", text))
    thinking = {} if path == "/v1/completions" else {"thinking": {"type": "disabled"}}
    return {"model": "tiny", **said, limit: tokens, **thinking, **fields}


def kind(path: str, answer: dict[str, Any]) -> tuple[str, str]:
    """The type of an error and its code; Anthropic's have none."""
    if path == "/v1/messages":
        assert answer["type"] == "error"
    return answer["error"]["type"], answer["error"].get("code", "")


UNAVAILABLE = {path: ("server_error", "out_of_memory") for path in PROTOCOLS} | {
    "/v1/messages": ("overloaded_error", "")
}


@pytest.fixture(scope="module")
def client(parts: tuple[Transformer, Tokenizer]) -> Iterator[httpx.Client]:
    """A server that finds out, when it needs more, that the machine has no more memory."""
    engine = Engine(*parts, frozen=True)
    reserve = engine.backend.reserve

    def refuse(num_blocks: int) -> None:
        if num_blocks * BLOCK_SIZE > ROOM:
            raise MachineError(f"no memory for {num_blocks} blocks", where="engine")
        reserve(num_blocks)

    engine.backend.reserve = refuse  # type: ignore[method-assign]
    config = ServeConfig(port=0, served_model_name="tiny", shutdown_timeout_seconds=0)
    model = replace(serve_engine(engine, config), default_sampling={"ignore_eos": True})
    with serving(create_app([model], config), config) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.mark.parametrize("path", PROTOCOLS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_memory_turns_out_too_small_for_is_no_fault_of_the_caller(
    client: httpx.Client, path: str, stream: bool
) -> None:
    answer = client.post(path, json=body(path, TEXT, 5, stream=stream))
    assert answer.status_code == 503 and kind(path, answer.json()) == UNAVAILABLE[path], answer.text
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", PROTOCOLS)
def test_nor_is_an_answer_that_grows_out_of_it(client: httpx.Client, path: str) -> None:
    answer = client.post(path, json=body(path, SHORT, 2000))
    assert answer.status_code == 503 and kind(path, answer.json()) == UNAVAILABLE[path], answer.text
    assert int(answer.headers["retry-after"]) >= 1
    lines = list[str]()
    with client.stream("POST", path, json=body(path, SHORT, 2000, stream=True)) as streamed:
        assert streamed.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            lines += streamed.iter_lines()
    last = json.loads([line for line in lines if line.startswith("data: ")][-1].removeprefix("data: "))
    if path == "/v1/responses":
        assert last["type"] == "response.failed" and last["response"]["error"]["code"] == "server_error"
    else:
        assert kind(path, last) == UNAVAILABLE[path]


def test_nor_is_it_where_a_text_is_embedded(client: httpx.Client) -> None:
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": LONG})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "out_of_memory", answer.text
    assert int(answer.headers["retry-after"]) >= 1
    assert client.post("/v1/embeddings", json={"model": "tiny", "input": LONG[:50]}).status_code == 200


def test_who_asks_for_less_is_answered(client: httpx.Client) -> None:
    for path in PROTOCOLS:
        assert client.post(path, json=body(path, SHORT, 5)).status_code == 200


ENGINES: list[tuple[SpratError, int, str]] = [
    (EngineError("9 tokens do not fit into the memory that there is", where="KV cache"), 503, "out_of_memory"),
    (EngineError("the step failed: RuntimeError: x", where="engine"), 500, "engine_error"),
    (MachineError("structured output needs llguidance", where="response"), 500, "engine_error"),
    (EngineDied("the engine is being stopped"), 503, "engine_died"),
]


@pytest.mark.parametrize(("error", "status", "code"), ENGINES, ids=lambda value: getattr(value, "what", None))
def test_an_engine_that_fails_is_never_the_callers_fault(error: SpratError, status: int, code: str) -> None:
    """Whatever asks for it: an answer, a grammar, or an embedding."""

    def script(question: str, sampling: Sampling) -> tuple[str, str]:
        raise error

    class Failing(ScriptedEngine):
        async def compile(self, *_: Any) -> None:
            raise error

        async def embed(self, *_: Any, **__: Any) -> list[list[float]]:
            raise error

    engine = Failing(script)
    app = create_app([ServedModel(engine, engine.tokenizer, ("tiny",))], ServeConfig())
    form = {"response_format": {"type": "json_object"}}
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        for path in PROTOCOLS:
            answer = client.post(path, json=body(path, "a", 5))
            assert answer.status_code == status, answer.text
        for path, asked in (
            ("/v1/chat/completions", body("/v1/chat/completions", "a", 5, **form)),
            ("/v1/embeddings", {"model": "tiny", "input": "a boat"}),
        ):
            answer = client.post(path, json=asked)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text

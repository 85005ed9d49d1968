"""What the routes beside answers say: cards of models, ids of texts, and what of a request was ignored."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest

from sprat.engine.sequence import DEFAULT_TENANT, Tenant
from tests.unit.serve.live import live
from tests.unit.serve.scripted import ScriptedEngine

MESSAGES = [{"role": "user", "content": "add 3 and 4 and 5"}]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with live(ScriptedEngine()) as address, httpx.Client(base_url=address, timeout=30) as client:
        yield client


def test_a_slash_behind_the_models_lists_them(client: httpx.Client) -> None:
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()


def test_a_model_says_its_limits_in_anthropics_names(client: httpx.Client) -> None:
    card = client.get("/v1/models/tiny", headers={"anthropic-version": "2023-06-01"}).json()
    context = client.get("/v1/models/tiny").json()["max_model_len"]
    assert (card["max_input_tokens"], card["max_tokens"]) == (context, context)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize", {"messages": MESSAGES}),
        ("/detokenize", {"tokens": [5]}),
        ("/v1/embeddings", {"model": "tiny", "input": "a", "user": "u"}),
        ("/v1/messages/count_tokens", {"model": "tiny", "messages": MESSAGES}),
        ("/v1/responses/input_tokens", {"model": "tiny", "input": "a"}),
        ("/v1/responses/input_tokens", {"input": "a"}),
    ],
)
def test_what_is_ignored_is_listed_on_every_path(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = client.post(path, json={**body, "colour": "blue"})
    assert (answer.status_code, answer.headers.get("x-ignored-fields")) == (200, "colour")
    assert "x-ignored-fields" not in client.post(path, json=body).headers


class Embedder(ScriptedEngine):
    """Its vectors have three dimensions and length 1."""

    async def embed(
        self, prompts: Sequence[Sequence[int]], adapter: str | None = None, tenant: Tenant = DEFAULT_TENANT
    ) -> list[list[float]]:
        return [[0.48, -0.64, 0.6] for _ in prompts]


@pytest.mark.parametrize("form", ["float", "base64"])
def test_fewer_dimensions_are_the_first_ones_at_length_1(form: str) -> None:
    ask = {"model": "tiny", "input": ["a", "b"], "encoding_format": form}
    with live(Embedder()) as address, httpx.Client(base_url=address, timeout=30) as client:
        for dimensions, expected in ((1, [1.0]), (2, [0.6, -0.8]), (3, [0.48, -0.64, 0.6]), (None, [0.48, -0.64, 0.6])):
            answer = client.post("/v1/embeddings", json={**ask, "dimensions": dimensions})
            assert answer.status_code == 200, answer.text
            for row in answer.json()["data"]:
                vector = row["embedding"]
                if form == "base64":
                    vector = list(struct.unpack(f"<{len(expected)}f", base64.b64decode(vector)))
                assert vector == pytest.approx(expected, abs=1e-6)
        for wrong in (0, -1, 4, 10**9, 1.5, "2", True):
            answer = client.post("/v1/embeddings", json={**ask, "dimensions": wrong})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "dimensions"), wrong


def test_tokens_of_a_request_are_counted_as_they_are_answered(client: httpx.Client) -> None:
    counted = client.post("/v1/responses/input_tokens", json={"model": "tiny", "input": "add 3 and 4"})
    assert counted.json() == {"object": "response.input_tokens", "input_tokens": counted.json()["input_tokens"]}
    chat = {"messages": [{"role": "user", "content": "add 3 and 4"}]}
    assert counted.json()["input_tokens"] == client.post("/tokenize", json=chat).json()["count"] > 0
    for body, param in (({"model": "tiny"}, "input"), ({"model": "tiny", "input": []}, "input")):
        refused = client.post("/v1/responses/input_tokens", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    missing = client.post("/v1/responses/input_tokens", json={"model": "none", "input": "a"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")

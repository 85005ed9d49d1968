"""What the routes beside answers say: cards of models, ids of texts, and what of a request was ignored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

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
    ],
)
def test_what_is_ignored_is_listed_on_every_path(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = client.post(path, json={**body, "colour": "blue"})
    assert (answer.status_code, answer.headers.get("x-ignored-fields")) == (200, "colour")
    assert "x-ignored-fields" not in client.post(path, json=body).headers

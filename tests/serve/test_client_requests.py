"""What agents and libraries send is answered by a real ``sprat serve``, and the model reads what is meant by it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from bench.serving.server import Server
from tests.serve.answers import events_of, streamed, whole
from tests.serve.client_requests import CHAT, MESSAGES, REQUESTS, RESPONSES, Json, Sent

PROTOCOLS = {CHAT: "chat", RESPONSES: "responses", MESSAGES: "messages", "//v1/chat/completions": "chat"}
COUNTS = {CHAT: "/tokenize", RESPONSES: "/v1/responses/input_tokens", MESSAGES: "/v1/messages/count_tokens"}
LIMITS = {CHAT: "max_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}
FEW = 8  # tokens of an answer of which nothing is asked


def post(served: Server, path: str, body: Json) -> httpx.Response:
    return httpx.post(
        served.url + path, json={"model": "smol", **body}, timeout=120,
        headers={"Authorization": "Bearer secret", "anthropic-version": "2023-06-01"},
    )  # fmt: skip


def tokens(served: Server, path: str, body: Json) -> int:
    """Of a prompt, as it is counted."""
    answer = post(served, COUNTS[path], body)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return int(body["count"] if path == CHAT else body["input_tokens"])


def called(answer: Any) -> list[tuple[str, str]]:
    return [(name, arguments) for choice in answer.choices for name, arguments in choice.calls]


@pytest.mark.slow
@pytest.mark.parametrize("sent", REQUESTS, ids=lambda sent: sent.client)
def test_a_request_of_a_client_is_answered(served: Server, sent: Sent) -> None:
    limit = LIMITS.get(sent.path)
    body = {limit: FEW, **sent.body} if limit and not {limit, "max_completion_tokens"} & sent.body.keys() else sent.body
    answer = post(served, sent.path, body)
    assert answer.status_code == sent.status, answer.text
    if sent.status != 200:
        assert sent.param in answer.json()["error"]["message"]
        return
    listed = answer.headers.get("x-ignored-fields", "").split(", ")
    assert set(sent.ignored) <= set(listed), listed
    protocol = PROTOCOLS.get(sent.path)
    if protocol is None:
        text = list(events_of(answer.text)) if body.get("stream") else answer.json()
        assert "error" not in json.dumps(text)
        return
    said = streamed(protocol, answer.text) if body.get("stream") else whole(protocol, answer.json())
    assert [name for name, _ in called(said)] == list(sent.calls)
    if "pick" in sent.calls:
        assert [text for _, text in called(said)] in (["red"], ["blue"])
    usage, path = said.usage, sent.path if sent.path in COUNTS else CHAT
    read = usage.get("prompt_tokens") or usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)
    if path != CHAT or not body["messages"][-1].get("prefix"):
        assert read == tokens(served, path, body), "what is counted is what is computed"
    if sent.reads is not None:
        assert read == tokens(served, path, sent.reads)


@pytest.mark.slow
def test_what_agents_look_for_beside_answers(served: Server) -> None:
    """Claude Code asks whether anybody is there, and Codex, Zed and Open WebUI list the models."""
    key = {"Authorization": "Bearer secret"}
    assert httpx.head(served.url, timeout=30).status_code == 200
    assert httpx.post(f"{served.url}/api/event_logging/batch", json={}, headers=key, timeout=30).status_code == 404
    for path in ("/v1/models?limit=1000", "/v1/models", "/models"):
        assert [card["id"] for card in httpx.get(served.url + path, headers=key, timeout=30).json()["data"]] == ["smol"]

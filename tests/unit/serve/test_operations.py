"""What an operator reads of a server: counters that tell apart what happened, and health that tells the truth."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from sprat.engine.sampling_params import Sampling
from sprat.engine.sequence import DEFAULT_TENANT, Tenant
from sprat.errors import CheckpointError, ServeError
from sprat.serve import ServeConfig, create_app
from sprat.serve.access_log import log as access_log
from sprat.serve.access_log import write_lines_to
from sprat.serve.app import ServedModel
from sprat.serve.app_state import AppState
from sprat.serve.engine_client import EngineDied
from tests.unit.serve.scripted import ScriptedEngine

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "add 3 and 4 and 5"}]}
EMBED: dict[str, Any] = {"model": "tiny", "input": "a boat"}


def client_of(*engines: Any, adapters: Sequence[str] = (), **settings: Any) -> TestClient:
    names = ("tiny", "other")
    models = [
        ServedModel(engine, engine.tokenizer, (names[index],), adapters=adapters)
        for index, engine in enumerate(engines)
    ]
    return TestClient(create_app(models, ServeConfig(**settings)), base_url="http://127.0.0.1:8000")


def counts(client: TestClient, name: str) -> dict[str, float]:
    """Values of a counter above 0, by the last of their labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == f"sprat:{name}_total"]
    return {
        each.labels.get("finished_reason", each.labels.get("reason", "")): each.value for each in samples if each.value
    }


class Dying(ScriptedEngine):
    """Its process ends at the first word, or before an embedding."""

    def __init__(self) -> None:
        def script(question: str, sampling: Sampling) -> tuple[str, str]:
            raise EngineDied("the engine's process ended (signal 9, Killed)")

        super().__init__(script)

    async def embed(
        self, prompts: Sequence[Sequence[int]], adapter: str | None = None, tenant: Tenant = DEFAULT_TENANT
    ) -> list[list[float]]:
        raise EngineDied("the engine's process ended (signal 9, Killed)")


def test_an_answer_that_was_cut_by_max_tokens_counts_as_length() -> None:
    with client_of(ScriptedEngine()) as client:
        for limit in (3, 100):
            assert client.post(CHAT, json={**ASK, "max_tokens": limit}).status_code == 200
        assert counts(client, "request_success") == {"length": 1, "stop": 1}


def test_what_broke_off_is_no_abort() -> None:
    with client_of(Dying()) as client:
        assert client.post(CHAT, json=ASK).status_code == 503
        assert client.post("/v1/embeddings", json=EMBED).status_code == 503
        assert counts(client, "request_success") == {"error": 2}


def test_embeddings_are_counted_and_are_of_their_tenant() -> None:
    tenants: list[Tenant] = []

    class Noting(ScriptedEngine):
        async def embed(
            self, prompts: Sequence[Sequence[int]], adapter: str | None = None, tenant: Tenant = DEFAULT_TENANT
        ) -> list[list[float]]:
            tenants.append(tenant)
            return await super().embed(prompts, adapter, tenant)

    with client_of(Noting(), api_keys=("k1", "k2")) as client:
        tokens = 0
        for key in ("k1", "k2"):
            client.headers["authorization"] = f"Bearer {key}"
            tokens += client.post("/v1/embeddings", json=EMBED).json()["usage"]["prompt_tokens"]
        assert counts(client, "request_success") == {"stop": 2}
        assert counts(client, "prompt_tokens") == {"": tokens}
        assert counts(client, "prefix_cache_queries") == {}  # none is looked for
    assert len({tenant.name for tenant in tenants}) == 2 and DEFAULT_TENANT not in tenants


def test_refusals_are_counted_by_their_code() -> None:
    engine = ScriptedEngine()
    engine.info = type(engine.info)(8, 8, 1, engine.info.vocab_size, ())
    with client_of(engine) as client:
        assert client.post(CHAT, json=ASK).json()["error"]["code"] == "context_length_exceeded"
        engine.alive = False
        assert client.post(CHAT, json=ASK).json()["error"]["code"] == "engine_not_ready"
        assert client.post("/v1/embeddings", json={"model": "tiny", "input": [5]}).status_code == 503
        assert counts(client, "admission_rejections") == {"context_length_exceeded": 1, "engine_not_ready": 2}


def test_an_engine_that_stays_down_is_no_engine_that_starts() -> None:
    engine: Any = ScriptedEngine()
    with client_of(engine) as client:
        engine.alive = False
        assert client.get("/health").json()["status"] == "starting"
        engine.failure = CheckpointError("no weights")
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "failed")
        answer = client.post(CHAT, json=ASK)
        assert answer.status_code == 503 and "not started again" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) == 60  # what the SDKs still obey


def test_no_engine_comes_up_after_another_one_failed() -> None:
    class Broken(ScriptedEngine):
        async def start(self) -> None:
            raise CheckpointError("no weights")

    class Slow(ScriptedEngine):
        async def start(self) -> None:
            await asyncio.sleep(0.2)
            await super().start()

    async def start() -> bool:
        slow = Slow()
        app = create_app([ServedModel(e, e.tokenizer, (n,)) for e, n in ((slow, "a"), (Broken(), "b"))], ServeConfig())
        state: AppState = app.state.serving
        with pytest.raises(CheckpointError):
            await state.start()
        await state.stop()
        await asyncio.sleep(0.4)
        return slow.alive

    assert not asyncio.run(start())


def test_no_name_hides_behind_an_adapter() -> None:
    one, two = ScriptedEngine(), ScriptedEngine()
    models = [
        ServedModel(one, one.tokenizer, ("a",), adapters=("x",)),
        ServedModel(two, two.tokenizer, ("a:x",)),
    ]
    with pytest.raises(ServeError, match="'a:x'"):
        create_app(models, ServeConfig())
    with pytest.raises(ServeError, match="empty"):
        create_app([ServedModel(one, one.tokenizer, ("",))], ServeConfig())


def test_what_is_refused_or_computed_has_a_line_and_what_is_read_again_and_again_has_none() -> None:
    stream = io.StringIO()
    handler, propagates = write_lines_to(stream), access_log.propagate
    try:
        with client_of(ScriptedEngine(), api_keys=("k1",)) as client:
            assert client.post(CHAT, json=ASK).status_code == 401
            assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
            client.headers["authorization"] = "Bearer k1"
            assert client.post(CHAT, json=ASK).status_code == 200
            assert client.post(CHAT, json={**ASK, "model": "none"}).status_code == 404
            assert client.post("/v1/embeddings", json={**EMBED, "input": ""}).status_code == 400
            assert client.post(CHAT, json={**ASK, "temperature": 9}).status_code == 400
            embedded = client.post("/v1/embeddings", json=EMBED).json()["usage"]["prompt_tokens"]
            for path, body in (
                ("/v1/messages/count_tokens", ASK), ("/v1/responses/input_tokens", {"model": "tiny", "input": "Hi"}),
                ("/tokenize", {"prompt": "Hi"}), ("/detokenize", {"tokens": [5]}),
            ):  # fmt: skip
                assert client.post(path, json=body).status_code == 200
            assert client.get("/v1/models?key=k1").status_code == 200
            for path in ("/health", "/health/live", "/metrics"):
                assert client.get(path).status_code == 200
    finally:
        access_log.removeHandler(handler)
        access_log.propagate = propagates
        access_log.setLevel(logging.NOTSET)
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    said = [(row["path"], row["status"], row["code"], bool(row["tenant"]), row["model"]) for row in rows]
    assert sorted(said) == sorted([
        (CHAT, 401, "invalid_api_key", False, ""),
        ("/v1/models", 403, "host_not_allowed", False, ""),
        (CHAT, 200, "", True, "tiny"),
        (CHAT, 404, "model_not_found", True, "none"),
        (CHAT, 400, "invalid_value", True, "tiny"),
        ("/v1/embeddings", 400, "invalid_value", True, "tiny"),
        ("/v1/embeddings", 200, "", True, "tiny"),
        ("/v1/messages/count_tokens", 200, "", True, "tiny"),
        ("/v1/responses/input_tokens", 200, "", True, "tiny"),
        ("/tokenize", 200, "", True, "tiny"),
        ("/detokenize", 200, "", True, "tiny"),
    ])  # fmt: skip
    computed = {row["path"]: row["prompt_tokens"] for row in rows if row["status"] == 200}
    assert computed.pop("/v1/embeddings") == embedded > 0
    assert computed.pop(CHAT) > 0 and set(computed.values()) == {0}, "what is counted is not computed"
    assert "k1" not in stream.getvalue()


def test_more_than_the_context_holds_is_said_when_the_engine_is_there(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine()
    engine.info = replace(engine.info, context=128)
    with caplog.at_level(logging.WARNING, "sprat.serve"), client_of(engine, max_model_len=128, max_tokens=100_000):
        pass
    assert [record.getMessage() for record in caplog.records] == [
        "tiny: max_tokens is 100000, but there is room for 128 tokens"
    ]

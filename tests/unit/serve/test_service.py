"""What is promised between a request and the engine: counts, ends, places and lines of log, with the real engine."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from torch import Tensor

from sprat.engine import Engine
from sprat.engine.backend import Batch
from sprat.errors import ServeError
from sprat.model import Transformer
from sprat.serve import ServeConfig, create_app
from sprat.serve.app import ServedModel
from sprat.serve.engine_client import EngineDied, Job, JobEvent
from sprat.serve.engine_thread import ThreadEngineClient
from sprat.tokens import Tokenizer
from tests.unit.engine.fake import Fake
from tests.unit.serve.live import live, serving
from tests.unit.serve.scripted import ScriptedEngine, ScriptedHandle, within

Parts = tuple[Transformer, Tokenizer]
CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "please keep the door of our house"}],
    "max_tokens": 12,
    "seed": 5,
    "ignore_eos": True,
}
LONG = {**ASK, "max_tokens": 3000, "stream": True}


class Slow(Fake):
    """Two milliseconds a step."""

    def run(self, batch: Batch) -> Tensor:
        time.sleep(0.002)
        return super().run(batch)


def engine_of(parts: Parts) -> Engine:
    """The real engine around a back end that costs nothing but time."""
    return Engine(*parts, backend=Slow(parts[0].config.vocab_size), frozen=True)


@pytest.fixture
def engine(parts: Parts) -> Engine:
    return engine_of(parts)


@pytest.fixture
def client(engine: Engine) -> Iterator[httpx.Client]:
    with live(engine) as address, httpx.Client(base_url=address, timeout=30) as client:
        yield client


def chunks_of(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def number(client: httpx.Client, name: str, labels: str = "") -> float:
    """One number of /metrics."""
    want = f'sprat:{name}{{{labels}model_name="tiny"}} '
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith(want)]
    return float(line.removeprefix(want))


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_counts_as_the_whole_answer_does(parts: Parts, n: int) -> None:
    usages = []
    for stream in (False, True):  # each with an empty cache
        with live(engine_of(parts)) as address:
            ask = {**ASK, "n": n, "stream": stream, "stream_options": {"include_usage": True}}
            answer = httpx.post(f"{address}{CHAT}", json=ask, timeout=30)
            usages.append((chunks_of(answer.text)[-1] if stream else answer.json())["usage"])
    assert usages[0] == usages[1]
    assert usages[0]["completion_tokens"] == 12 * n, "of all answers; the prompt counts once"
    assert usages[0]["prompt_tokens"] < 40


def test_the_second_of_several_answers_is_that_of_the_next_seed(client: httpx.Client) -> None:
    several = client.post(CHAT, json={**ASK, "n": 3}).json()
    single = [client.post(CHAT, json={**ASK, "seed": 5 + index}).json()["choices"][0] for index in range(3)]
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    assert [choice["message"] for choice in several["choices"]] == [choice["message"] for choice in single]
    assert len({choice["message"]["content"] for choice in single}) == 3
    assert several["sprat"]["seed"] == 5


def test_who_cancels_gets_what_there_is_and_pays_no_more(client: httpx.Client) -> None:
    with client.stream("POST", CHAT, json=LONG) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        name = json.loads(next(lines))["id"]
        next(lines)
        assert client.post(f"{CHAT}/{name}/cancel").status_code == 204
        *_, last, done = lines
    chunk = json.loads(last)
    assert done == "[DONE]" and chunk["sprat"]["ended_by"] == "cancel"
    assert chunk["choices"][0]["finish_reason"] == "stop"
    assert 0 < chunk["usage"]["completion_tokens"] < 3000
    assert chunk["sprat"]["cost"]["output"] == 16000 * chunk["usage"]["completion_tokens"]
    assert client.post(f"{CHAT}/{name}/cancel").status_code == 404
    assert within(10, lambda: number(client, "num_requests_running") == 0)
    assert number(client, "request_success_total", 'finished_reason="abort",') == 1


def test_who_leaves_while_waiting_leaves_the_queue(engine: Engine) -> None:
    with live(engine, max_num_seqs=1, max_num_queued_reqs=1) as address:
        with httpx.Client(base_url=address, timeout=30) as client, client.stream("POST", CHAT, json=LONG) as first:
            begun = first.iter_lines()
            next(begun)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}{CHAT}", json=ASK, timeout=0.5)
            assert within(10, lambda: number(client, "num_requests_waiting") == 0)
            with pytest.raises(httpx.ReadTimeout):  # the one place to wait is free again: it waits, too
                httpx.post(f"{address}{CHAT}", json=ASK, timeout=0.5)
            assert within(10, lambda: number(client, "num_requests_waiting") == 0)
        with httpx.Client(base_url=address, timeout=30) as client:
            assert within(10, lambda: number(client, "num_requests_running") == 0)
            prompts = number(client, "prompt_tokens_total")
            assert client.post(CHAT, json=ASK).json()["usage"]["prompt_tokens"] == prompts, "only the first was begun"


def test_a_step_that_breaks_is_an_error_in_the_stream_and_tells_nothing(engine: Engine) -> None:
    with live(engine) as address, httpx.Client(base_url=address, timeout=30) as client:
        got: list[str] = []
        with pytest.raises(httpx.RemoteProtocolError), client.stream("POST", CHAT, json=LONG) as answer:
            lines = answer.iter_lines()
            got.append(next(lines))
            engine.backend.fails = RuntimeError("a secret address 0x1234")  # type: ignore[attr-defined]
            got += lines
        last = [line for line in got if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"
        assert "secret" not in last and not any("[DONE]" in line for line in got)
        whole = client.post(CHAT, json=ASK)
        assert whole.status_code == 500 and "secret" not in whole.text
        engine.backend.fails = None  # type: ignore[attr-defined]
        assert client.post(CHAT, json=ASK).status_code == 200


class Dying(ScriptedEngine):
    """Dies in the middle of its answers, as a process does."""

    def submit(self, job: Job) -> Any:
        return DyingStream(self, super().submit(job))


class DyingStream:
    """Two events, and no more."""

    def __init__(self, engine: Dying, stream: ScriptedHandle) -> None:
        self.engine, self.stream, self.cancel = engine, stream, stream.cancel

    async def __aiter__(self) -> AsyncIterator[JobEvent]:
        async for event in self.stream:
            yield event
            if event.kind != "started":
                self.engine.alive = False
                raise EngineDied("the engine's process 7 was killed", where="engine", todo="see the log")


def test_an_engine_that_dies_is_an_error_in_the_stream_and_503_afterwards() -> None:
    with live(Dying()) as address, httpx.Client(base_url=address, timeout=30) as client:
        got: list[str] = []
        with pytest.raises(httpx.RemoteProtocolError), client.stream("POST", CHAT, json=LONG) as answer:
            got += answer.iter_lines()
        last = [line for line in got if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_died"
        assert "killed" not in last
        refused = client.post(CHAT, json=ASK)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "engine_not_ready"
        assert client.get("/health/ready").status_code == 503 and client.get("/health/live").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_is_said_in_the_words_that_clients_know(client: httpx.Client, stream: bool) -> None:
    said = {**ASK, "messages": [{"role": "user", "content": "please keep to yourself " * 2000}], "stream": stream}
    refused = client.post(CHAT, json=said)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert re.match(r"This model's maximum context length is \d+ tokens\.", refused.json()["error"]["message"])
    anthropic = client.post("/v1/messages", json={**said, "max_tokens": 5})
    assert anthropic.status_code == 400 and "prompt is too long" in anthropic.json()["error"]["message"]


def test_two_models_each_answer_by_their_name(parts: Parts) -> None:
    config = ServeConfig(port=0, shutdown_timeout_seconds=0)
    other = Transformer.create(parts[0].config, 1)
    models = [
        ServedModel(ThreadEngineClient(Engine(model, parts[1])), parts[1], names, {"temperature": 0.0})
        for model, names in ((parts[0], ("one", "uno")), (other, ("two",)))
    ]
    with serving(create_app(models, config), config) as address, httpx.Client(base_url=address, timeout=30) as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["one", "uno", "two"]
        answers = [client.post(CHAT, json={**ASK, "model": name}).json() for name in ("one", "uno", "two")]
        assert [answer["model"] for answer in answers] == ["one", "uno", "two"]
        one, uno, two = (answer["choices"][0]["message"] for answer in answers)
        assert one == uno != two
        assert client.post(CHAT, json=ASK).status_code == 404
        text = client.get("/metrics").text
        assert 'prompt_tokens_total{model_name="one"}' in text and 'prompt_tokens_total{model_name="two"}' in text
    with pytest.raises(ServeError, match="called 'one'"):
        create_app([models[0], ServedModel(models[1].engine, parts[1], ("two", "one"))], config)


def test_metrics_count_what_was_asked_and_answered(client: httpx.Client) -> None:
    usages = [client.post(CHAT, json={**ASK, "n": n}).json()["usage"] for n in (1, 2)]
    assert client.post(CHAT, json={**ASK, "max_tokens": 10**6}).status_code == 400
    prompt, cached = (sum(usage[name] for usage in usages) for name in ("prompt_tokens", "prompt_cache_hit_tokens"))
    assert number(client, "prompt_tokens_total") == number(client, "prefix_cache_queries_total") == prompt
    assert number(client, "prefix_cache_hits_total") == cached > 0
    assert number(client, "generation_tokens_total") == 36
    assert number(client, "request_success_total", 'finished_reason="length",') == 2
    assert number(client, "time_to_first_token_seconds_count") == 2
    assert number(client, "e2e_request_latency_seconds_count") == 2
    assert number(client, "num_requests_running") == number(client, "num_requests_waiting") == 0


@pytest.mark.parametrize("ask", [ASK, {**ASK, "n": 3}, {**ASK, "ignore_eos": False, "max_tokens": 200, "seed": 1}])
@pytest.mark.parametrize("drafts", [False, True])
def test_of_each_answer_one_interval_less_than_tokens_is_measured(
    parts: Parts, ask: dict[str, Any], drafts: bool
) -> None:
    """Tokens are parts of characters here, and of drafts two come at a time."""
    backend = Slow(parts[0].config.vocab_size, num_mtp_modules=int(drafts))
    engine = Engine(*parts, backend=backend, frozen=True, speculate="mtp" if drafts else "off")
    with live(engine) as address, httpx.Client(base_url=address, timeout=30) as client:
        begun = time.monotonic()
        body = {**ask, "stream": True, "temperature": 0, "stream_options": {"include_usage": True}}
        chunks = chunks_of(client.post(CHAT, json=body).text)
        seconds, tokens = time.monotonic() - begun, chunks[-1]["usage"]["completion_tokens"]
        pieces = sum(bool(choice["delta"].get("content")) for chunk in chunks for choice in chunk["choices"])
        assert tokens > pieces > 0, "else there would be nothing to see"
        answers = ask.get("n", 1)
        assert number(client, "inter_token_latency_seconds_count") == tokens - answers
        assert 0 < number(client, "inter_token_latency_seconds_sum") < seconds * answers
        assert number(client, "generation_tokens_total") == tokens


def test_tokens_that_come_together_have_their_part_of_the_time_each(parts: Parts) -> None:
    class Slower(Fake):
        def run(self, batch: Batch) -> Tensor:
            time.sleep(0.04)
            return super().run(batch)

    backend = Slower(parts[0].config.vocab_size, num_mtp_modules=1)
    engine = Engine(*parts, backend=backend, frozen=True, speculate="mtp")
    with live(engine) as address, httpx.Client(base_url=address, timeout=30) as client:
        client.post(CHAT, json={**ASK, "max_tokens": 60, "temperature": 0})
        assert len(backend.batches) < 40, "two at a time"
        at_once = number(client, "inter_token_latency_seconds_bucket", 'le="0.01",')
        assert at_once < 15, "of 59; every second one, were each measured by itself"


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_a_prompt_that_is_scored_and_said_again_is_no_token_of_the_answer(
    client: httpx.Client, max_tokens: int
) -> None:
    """As lm-eval asks: the prompt's log-probabilities come first, in an event of their own."""
    ask = {"model": "tiny", "prompt": "please keep the door", "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    answer = client.post("/v1/completions", json={**ask, "ignore_eos": True}).json()
    assert answer["choices"][0]["text"].startswith("please keep the door")
    assert number(client, "generation_tokens_total") == answer["usage"]["completion_tokens"] == max_tokens
    assert number(client, "time_to_first_token_seconds_count") == min(1, max_tokens)
    assert number(client, "inter_token_latency_seconds_count") == max(0, max_tokens - 1)


class Lines(logging.Handler):
    """The lines of the access log."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def wait(self, count: int) -> list[dict[str, Any]]:
        assert within(10, lambda: len(self.texts) >= count), self.texts
        return [json.loads(text) for text in self.texts]


@pytest.fixture
def lines() -> Iterator[Lines]:
    logger, handler = logging.getLogger("sprat.serve.access"), Lines()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_each_request_has_one_line_with_its_counts_and_nothing_that_was_said(
    client: httpx.Client, lines: Lines
) -> None:
    whole = client.post(CHAT, json=ASK, headers={"x-request-id": "job 7"}).json()
    client.post(CHAT, json={**ASK, "stream": True}).read()
    (first, second) = lines.wait(2)
    for line, stream in ((first, False), (second, True)):
        assert (line["status"], line["model"], line["stream"], line["path"]) == (200, "tiny", stream, CHAT)
        assert line["prompt_tokens"] == whole["usage"]["prompt_tokens"] and line["completion_tokens"] == 12
        assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]
        assert (line["finish_reason"], line["ended_by"], line["code"]) == ("length", "", "")
    assert first["request_id"] == "job 7" and second["cached_tokens"] > 0
    client.get("/v1/models")
    said = whole["choices"][0]["message"]["content"]
    assert len(lines.texts) == 2 and said
    for secret in ("please keep", "door of our house", said[:20]):
        assert all(secret not in text for text in lines.texts)


def test_what_is_refused_or_left_has_its_line_too(client: httpx.Client, lines: Lines) -> None:
    client.post(CHAT, json={**ASK, "model": "gpt"})
    client.post(CHAT, content=b"{", headers={"content-type": "application/json"})
    client.post("/v1/messages", json={"model": "tiny"})
    refused = [(line["status"], line["code"], line["model"]) for line in lines.wait(3)]
    assert refused[0] == (404, "model_not_found", "gpt") and refused[1][:2] == (400, "invalid_json")
    assert refused[2][0] == 400
    with client.stream("POST", CHAT, json=LONG) as answer:
        next(answer.iter_lines())
    left = lines.wait(4)[-1]
    assert (left["status"], left["ended_by"]) == (200, "disconnect") and 0 < left["completion_tokens"] < 3000
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{client.base_url}{CHAT}", json={**LONG, "stream": False}, timeout=0.5)
    left = lines.wait(5)[-1]
    assert (left["status"], left["ended_by"]) == (499, "disconnect") and 0 < left["completion_tokens"] < 3000


def test_many_at_once_are_counted_apart(client: httpx.Client, lines: Lines) -> None:
    def ask(tokens: int) -> None:
        client.post(CHAT, json={**ASK, "max_tokens": tokens})

    threads = [threading.Thread(target=ask, args=(tokens,)) for tokens in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line["completion_tokens"] for line in lines.wait(8)) == list(range(1, 9))


def test_a_grammar_is_compiled_outside_of_places_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, compiled = ScriptedEngine(), list[tuple[int, int]]()
    app = create_app([ServedModel(engine, engine.tokenizer, ("tiny",))], ServeConfig(port=0))
    (service,) = app.state.serving.services

    async def compile_grammar(*_: Any) -> None:
        compiled.append((service.admission.num_running, service.compiling.num_running))

    monkeypatch.setattr(engine, "compile", compile_grammar)
    told: list[tuple[int, bool]] = []
    service.on_usage = lambda answer: told.append((answer.usage.completion_tokens, answer.ended.is_set()))
    with serving(app, app.state.config) as url:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
        body = {"model": "tiny", "messages": [{"role": "user", "content": "1 + 2"}], "response_format": form}
        usages = [httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()["usage"] for _ in range(2)]
    assert compiled == [(0, 1)], "no place was held, and the second request knew it"
    assert told == [(usage["completion_tokens"], False) for usage in usages], "once each, before it has ended"

"""What /metrics says, read by prometheus-client's own parser, is what happened."""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sprat.serve.metrics import CONTENT_TYPE, Metrics, RequestMetrics, metrics_app

VLLM = {  # name -> type; of vllm/v1/metrics/loggers.py, and what a server refuses
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
    "admission_rejections": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
}


class Clock:
    """Seconds that pass where the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics(clock)


def read(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample: name without the prefix, labels but the model's → value."""
    samples = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            assert sample.labels["model_name"] == "smol"
            labels = frozenset((key, value) for key, value in sample.labels.items() if key != "model_name")
            samples[sample.name.removeprefix("sprat:"), labels] = sample.value
    return samples


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return read(metrics)[name, frozenset(labels.items())]


def test_names_and_types_are_vllm_s(metrics: Metrics) -> None:
    metrics.model("smol")
    families = {family.name: family.type for family in text_string_to_metric_families(metrics.exposition().decode())}
    assert {f"sprat:{name}": kind for name, kind in VLLM.items()}.items() <= families.items()


def test_all_that_has_no_other_label_is_there_at_0_from_the_start(metrics: Metrics) -> None:
    metrics.model("smol")
    for name in ("num_requests_running", "prompt_tokens_total", "time_to_first_token_seconds_count"):
        assert value(metrics, name) == 0


def test_a_request_from_arrival_to_end(metrics: Metrics, clock: Clock) -> None:
    request = metrics.request_started("smol")
    assert (value(metrics, "num_requests_waiting"), value(metrics, "num_requests_running")) == (1, 0)
    clock.now += 2
    request.began(prompt_tokens=120, cached_tokens=96)
    assert (value(metrics, "num_requests_waiting"), value(metrics, "num_requests_running")) == (0, 1)
    clock.now += 1
    request.token()
    clock.now += 0.6
    request.begin_step()
    for _ in range(3):  # three in 0.6 s: three times 0.2
        request.token()
        clock.now += 0.001
    request.end_step()
    clock.now += 0.067
    request.token()
    clock.now += 0.02
    request.choice_finished(completion_tokens=6)
    clock.now += 0.31
    request.finished(completion_tokens=6, reason="length")
    assert (value(metrics, "num_requests_waiting"), value(metrics, "num_requests_running")) == (0, 0)
    assert value(metrics, "prompt_tokens_total") == value(metrics, "prefix_cache_queries_total") == 120
    assert value(metrics, "prefix_cache_hits_total") == 96
    assert value(metrics, "generation_tokens_total") == 6
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "time_to_first_token_seconds_sum") == pytest.approx(3)
    assert value(metrics, "time_to_first_token_seconds_bucket", le="2.5") == 0
    assert value(metrics, "time_to_first_token_seconds_bucket", le="5.0") == 1
    assert value(metrics, "inter_token_latency_seconds_count") == 5
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(0.69)
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.01") == 0
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.025") == 1, "the token that ended it"
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.075") == 2
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.15") == 2
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.3") == 5
    assert value(metrics, "e2e_request_latency_seconds_count") == 1
    assert value(metrics, "e2e_request_latency_seconds_sum") == pytest.approx(4)
    assert value(metrics, "request_success_total", finished_reason="length") == 1


def test_choices_have_a_rhythm_each_and_one_first_token(metrics: Metrics, clock: Clock) -> None:
    request = metrics.request_started("smol")
    for choice in (0, 1, 0):
        clock.now += 1
        request.token(choice=choice)
    request.choice_finished(2, 0)
    clock.now += 3
    request.choice_finished(2, 1)
    assert value(metrics, "time_to_first_token_seconds_sum") == pytest.approx(1)
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "inter_token_latency_seconds_count") == 2
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(2 + 4)


def test_tokens_without_text_have_their_part_of_the_time(metrics: Metrics, clock: Clock) -> None:
    """Ten seconds a token; the text of every third one comes with it, that of the others with the next third one."""
    request = metrics.request_started("smol")
    for token in range(1, 13):
        clock.now += 10
        if token % 3 == 0:
            request.token()
    clock.now += 10
    request.choice_finished(completion_tokens=13)
    assert value(metrics, "inter_token_latency_seconds_count") == 12
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(100), "from the first text on"
    assert value(metrics, "inter_token_latency_seconds_bucket", le="5.0") == 0
    assert value(metrics, "inter_token_latency_seconds_bucket", le="10.0") == 12


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 9])
def test_there_is_one_interval_less_than_tokens_whatever_was_seen(metrics: Metrics, clock: Clock, tokens: int) -> None:
    for pieces, pause in ((0, 1.0), (1, 1.0), (3, 1.0), (3, 0.0)):
        before = (
            metrics.registry.get_sample_value("sprat:inter_token_latency_seconds_count", {"model_name": "smol"}) or 0
        )
        request = metrics.request_started("smol")
        for _ in range(pieces):
            clock.now += pause
            request.token()
        clock.now += pause
        request.choice_finished(tokens)
        assert value(metrics, "inter_token_latency_seconds_count") - before == max(0, tokens - 1)


def test_what_broke_off_has_the_times_that_were_seen(metrics: Metrics, clock: Clock) -> None:
    request = metrics.request_started("smol")
    for _ in range(3):
        clock.now += 2
        request.token()
    clock.now += 50
    request.failed()
    request.failed()
    assert value(metrics, "inter_token_latency_seconds_count") == 2
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(4)


def test_a_cancelled_request_counts_its_tokens_and_no_latency(metrics: Metrics) -> None:
    request = metrics.request_started("smol")
    request.began(10, 0)
    request.token(2)
    request.cancelled(completion_tokens=5)
    assert value(metrics, "generation_tokens_total") == 5
    assert value(metrics, "request_success_total", finished_reason="abort") == 1
    assert value(metrics, "e2e_request_latency_seconds_count") == 0
    assert value(metrics, "num_requests_running") == 0


def test_refusals_by_reason(metrics: Metrics) -> None:
    for reason in ("overloaded", "overloaded", "queue_timeout"):
        metrics.request_started("smol").rejected(reason)
    metrics.model("smol").rejected("shutting_down")
    assert value(metrics, "admission_rejections_total", reason="overloaded") == 2
    assert value(metrics, "admission_rejections_total", reason="queue_timeout") == 1
    assert value(metrics, "admission_rejections_total", reason="shutting_down") == 1
    assert value(metrics, "num_requests_waiting") == 0


@pytest.mark.parametrize("began", [False, True])
def test_only_the_first_end_counts(metrics: Metrics, began: bool) -> None:
    def end(request: RequestMetrics, how: str) -> None:
        {
            "finished": lambda: request.finished(4),
            "cancelled": lambda: request.cancelled(4),
            "rejected": lambda: request.rejected("x"),
        }[how]()

    ends = ("finished", "cancelled", "rejected")
    for first in ends:
        for second in ends:
            request = metrics.request_started("smol")
            if began:
                request.began(1, 0)
            end(request, first)
            end(request, second)
            request.began(1, 0)
    assert value(metrics, "num_requests_running") == value(metrics, "num_requests_waiting") == 0
    assert value(metrics, "e2e_request_latency_seconds_count") == 3
    assert value(metrics, "generation_tokens_total") == 6 * 4
    assert value(metrics, "request_success_total", finished_reason="abort") == 3
    assert value(metrics, "admission_rejections_total", reason="x") == 3


def test_kv_cache_usage_is_a_fraction(metrics: Metrics) -> None:
    stats: Any = SimpleNamespace(blocks_used=3, blocks=12)
    metrics.model("smol").observe_stats(stats)
    assert value(metrics, "kv_cache_usage_perc") == 0.25


def test_two_servers_in_one_process_count_apart(metrics: Metrics) -> None:
    other = Metrics()
    metrics.request_started("smol").finished(3)
    other.request_started("smol").finished(4)
    assert (value(metrics, "generation_tokens_total"), value(other, "generation_tokens_total")) == (3, 4)


def test_a_token_costs_little() -> None:
    """Counted in what the same processor needs for an inner loop, so that a slow one does not fail."""
    request = Metrics().request_started("smol")
    request.token()

    def best(action: Any) -> float:
        times = []
        for _ in range(20):
            start = time.process_time_ns()
            action()
            times.append(time.process_time_ns() - start)
        return min(times)

    def tokens() -> None:
        for _ in range(200):
            request.token()

    def loop() -> None:
        total = 0
        for number in range(200 * 500):
            total += number

    assert best(tokens) < best(loop)  # 500 additions a token


def ask(app: Any, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
    """What an ASGI application answers."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    asyncio.run(app({"type": "http", "method": method, "path": path}, receive, send))
    headers = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
    return sent[0]["status"], headers, sent[1]["body"]


def test_the_app(metrics: Metrics) -> None:
    calls = []

    async def refresh() -> None:
        calls.append(1)
        metrics.model("smol").observe_stats(SimpleNamespace(blocks_used=1, blocks=2))  # type: ignore[arg-type]

    app = metrics_app(metrics, refresh)
    status, headers, body = ask(app, "GET", "/metrics")
    assert status == 200 and headers["content-type"] == CONTENT_TYPE and int(headers["content-length"]) == len(body)
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert families["sprat:kv_cache_usage_perc"].samples[0].value == 0.5
    head = ask(app, "HEAD", "/metrics")
    assert head[0] == 200 and head[2] == b"" and int(head[1]["content-length"]) > 0
    assert len(calls) == 2
    status, headers, body = ask(app, "POST", "/metrics")
    assert (
        status == 405 and headers["allow"] == "GET, HEAD" and json.loads(body)["error"]["code"] == "method_not_allowed"
    )
    status, _, body = ask(app, "GET", "/")
    assert status == 404 and "message" in json.loads(body)["error"]


def test_the_app_on_a_port_of_its_own_starts_and_stops(metrics: Metrics) -> None:
    sent: list[str] = []
    messages = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Any:
        return {"type": next(messages)}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    asyncio.run(metrics_app(metrics)({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]

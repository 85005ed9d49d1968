"""What a server does, in numbers, for Prometheus: vLLM's names and buckets with our prefix, label ``model_name``.

    request = metrics.request_started("smol")                 # waits from now on
    request.began(prompt_tokens=120, cached_tokens=96)        # or request.rejected(reason)
    request.token()                                           # for each piece; the first one is the time to first token
    request.choice_finished(completion_tokens=57)             # now the time of each token is known
    request.finished(completion_tokens=57, reason="stop")     # or request.cancelled(completion_tokens=3)

A registry belongs to one server, so that two in one process count apart. A model's name is one that is served, never
what a caller wrote: each new one would be a new series.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from sprat.serve.errors import RequestError
from sprat.serve.token_times import TokenTimes

if TYPE_CHECKING:
    from prometheus_client import Gauge
    from starlette.types import ASGIApp, Receive, Scope, Send

    from sprat.engine.stats import Stats

PREFIX = "sprat:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# vLLM's, in seconds (vllm/v1/metrics/loggers.py).
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class Metrics:
    """All series of one server.

    Args:
        clock: seconds; only differences count.

    >>> metrics = Metrics()
    >>> metrics.request_started("smol").finished(completion_tokens=5)
    >>> metrics.registry.get_sample_value("sprat:generation_tokens_total", {"model_name": "smol"})
    5.0
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.clock = clock
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(PREFIX + name, text, ["model_name"], registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, ["model_name", *labels], registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=registry)

        self._running = gauge("num_requests_running", "Requests that the engine has begun and not ended.")
        self._waiting = gauge("num_requests_waiting", "Requests that wait for their turn.")
        self._cache_usage = gauge("kv_cache_usage_perc", "KV cache in use by requests; 1 is all of it.")
        self._queries = counter("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Tokens of prompts that were found in the prefix cache.")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._generation = counter("generation_tokens", "Tokens of answers, thinking included.")
        self._success = counter("request_success", "Requests that ended, by how.", "finished_reason")
        self._rejections = counter("admission_rejections", "Requests that were refused, by the code.", "reason")
        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_BUCKETS)
        self._between = histogram(
            "inter_token_latency_seconds", "From a token to the next one, known at the end.", INTER_TOKEN_BUCKETS
        )
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", REQUEST_BUCKETS)
        self._models: dict[str, ModelMetrics] = {}

    def model(self, model_name: str) -> ModelMetrics:
        """The series of one model; they stand at 0 from the first call on."""
        if model_name not in self._models:
            self._models[model_name] = ModelMetrics(self, model_name)
        return self._models[model_name]

    def request_started(self, model_name: str) -> RequestMetrics:
        """A request has come; it waits."""
        return RequestMetrics(self.model(model_name), self.clock)

    def exposition(self) -> bytes:
        """All series in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class ModelMetrics:
    """The series of one model; made by ``Metrics.model``."""

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        self.running, self.waiting = metrics._running.labels(model_name), metrics._waiting.labels(model_name)
        self.queries, self.hits = metrics._queries.labels(model_name), metrics._hits.labels(model_name)
        self.prompt, self.generation = metrics._prompt.labels(model_name), metrics._generation.labels(model_name)
        self.first, self.between = metrics._first.labels(model_name), metrics._between.labels(model_name)
        self.whole, self._cache_usage = metrics._whole.labels(model_name), metrics._cache_usage.labels(model_name)
        self._success, self._rejections, self._name = metrics._success, metrics._rejections, model_name

    def observe_stats(self, stats: Stats) -> None:
        """Take over how full the engine's KV cache is."""
        self._cache_usage.set(stats.blocks_used / stats.blocks if stats.blocks else 0.0)

    def ended(self, reason: str) -> None:
        """Count a request that ended, by how."""
        self._success.labels(self._name, reason).inc()

    def rejected(self, reason: str) -> None:
        """Count a request that was refused, by why: the ``code`` of its error."""
        self._rejections.labels(self._name, reason).inc()


class RequestMetrics:
    """One request; made by ``Metrics.request_started``. After its end nothing more is counted."""

    __slots__ = ("_clock", "_generated", "_has_token", "_model", "_start", "_state", "_step_time", "_times")

    def __init__(self, model: ModelMetrics, clock: Callable[[], float]) -> None:
        self._model, self._clock, self._start = model, clock, clock()
        self._times: dict[int, TokenTimes] = {}  # of each choice that has begun and not ended
        self._generated, self._has_token = 0, False
        self._step_time: float | None = None
        self._state: Gauge | None = model.waiting
        model.waiting.inc()

    def began(self, prompt_tokens: int, cached_tokens: int | None) -> None:
        """The engine has begun; ``cached_tokens`` of the prompt were in its cache, None: that is not asked."""
        model = self._model
        if self._state is model.waiting:
            model.waiting.dec()
            model.running.inc()
            self._state = model.running
            model.prompt.inc(prompt_tokens)
            if cached_tokens is not None:
                model.queries.inc(prompt_tokens)
                model.hits.inc(cached_tokens)

    @property
    def is_in_step(self) -> bool:
        """Whether what comes now comes together with what came last."""
        return self._step_time is not None

    def begin_step(self) -> None:
        """What comes from now on until ``end_step`` comes together."""
        self._step_time = self._clock()

    def end_step(self) -> None:
        """See ``begin_step``."""
        self._step_time = None

    def token(self, n: int = 1, choice: int = 0) -> None:
        """A piece of a choice has come, of ``n`` tokens as far as that is known."""
        now = self._now()
        if not self._has_token:
            self._has_token = True
            self._model.first.observe(now - self._start)
        self._times.setdefault(choice, TokenTimes()).add(now, n)
        self._generated += n
        self._model.generation.inc(n)

    def choice_finished(self, completion_tokens: int, choice: int = 0) -> None:
        """A choice has come to its end; now the time from each of its tokens to the next one is known."""
        self._observe_between(self._times.pop(choice, TokenTimes()), completion_tokens)

    def _now(self) -> float:
        return self._clock() if self._step_time is None else self._step_time

    def _observe_between(self, times: TokenTimes, completion_tokens: int | None) -> None:
        """Observe the time from token to token; None: of those that were seen."""
        for seconds in times.intervals(completion_tokens, None if completion_tokens is None else self._now()):
            self._model.between.observe(seconds)

    def finished(self, completion_tokens: int, reason: str = "stop") -> None:
        """The answer is whole; ``completion_tokens`` is the exact count."""
        if self._end(completion_tokens):
            self._model.ended(reason)
            self._model.whole.observe(self._clock() - self._start)

    def cancelled(self, completion_tokens: int = 0) -> None:
        """Somebody ended it early, after ``completion_tokens``."""
        if self._end(completion_tokens):
            self._model.ended("abort")

    def failed(self, completion_tokens: int = 0) -> None:
        """It broke off by a fault of ours, after ``completion_tokens``."""
        if self._end(completion_tokens):
            self._model.ended("error")

    def rejected(self, reason: str) -> None:
        """It was refused, and nothing was computed."""
        if self._end(0):
            self._model.rejected(reason)

    def _end(self, completion_tokens: int) -> bool:
        """Let it be counted nowhere any more; False: it has ended before."""
        if self._state is None:
            return False
        self._state.dec()
        self._state = None
        for times in self._times.values():  # of choices that broke off
            self._observe_between(times, None)
        self._times.clear()
        self._model.generation.inc(max(completion_tokens - self._generated, 0))
        return True


def metrics_app(metrics: Metrics, refresh: Callable[[], Awaitable[None]] | None = None) -> ASGIApp:
    """An application that answers ``GET /metrics``, to be mounted or served on a port of its own.

    Args:
        refresh: awaited before each answer, to bring in what is asked of the engine.
    """

    async def lifespan(receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    async def answer(scope: Scope) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
        if not scope["path"].rstrip("/").endswith("/metrics"):
            error = RequestError(404, "there is nothing here but /metrics", code="not_found")
        elif scope["method"] not in ("GET", "HEAD"):
            error = RequestError(405, "use GET", code="method_not_allowed")
        else:
            if refresh is not None:
                await refresh()
            return 200, metrics.exposition(), [(b"content-type", CONTENT_TYPE.encode())]
        headers = [(b"content-type", b"application/json")]
        return (
            error.status,
            json.dumps(error.body()).encode(),
            headers + [(b"allow", b"GET, HEAD")] * (error.status == 405),
        )

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"a {scope['type']} connection came to /metrics, which speaks http")
        status, body, headers = await answer(scope)
        headers += [(b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    return app

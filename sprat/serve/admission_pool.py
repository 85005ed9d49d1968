"""Between the event loop and the engine: admission, waiting, cancelling, metering.

An engine's handle is a blocking iterator; the web side is asynchronous. Each admitted request owns
one thread of a bounded pool, which does nothing but wait for the handle and hand each delta to
the event loop. The bound is the admission rule: a request beyond it is refused at once (HTTP 429)
and never queued out of sight. A slot is freed when the *engine* has let go of the request, not
when the client has, so that clients who hang up cannot pile work on the engine.

The last delta carries the usage. It is metered here, in the event loop, before anybody can send it:
the cost that a client reads has been recorded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from sprat.errors import EngineError, SpratError
from sprat.serve.errors import RequestError
from sprat.serve.meter import Cost, Meter
from sprat.serve.protocol import usage_body

if TYPE_CHECKING:
    from sprat.engine.sampling_params import Sampling
    from sprat.engine.sequence import Delta, Tenant
    from sprat.tokens.chat import Message

log = logging.getLogger(__name__)


class HandleLike(Protocol):
    """One running request: iterating blocks until the next delta; any thread may cancel it."""

    def __iter__(self) -> Iterator[Delta]:
        """Deltas as they come; the last is of kind "done" and carries the output."""

    def cancel(self) -> None:
        """Stop soon; "done" still comes."""


class EngineLike(Protocol):
    """What serving needs of an engine (``sprat.engine.Engine`` has it); any thread may submit."""

    def submit(
        self,
        prompt: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        tenant: Tenant,
        adapter: str | None = None,
    ) -> HandleLike:
        """Take a request of ``tenant``, for one of the engine's adapters or for none."""

    def start(self) -> None:
        """Work in the background from now on."""

    def stop(self) -> None:
        """End the background work."""


class StreamingRequest:
    """One admitted request, seen from the event loop. Iterate it with ``deltas``."""

    def __init__(
        self,
        engine: EngineLike,
        messages: Sequence[Message],
        sampling: Sampling,
        meter: Meter,
        tenant: Tenant,
        adapter: str | None = None,
    ) -> None:
        self.start_time, self.tenant = time.monotonic(), tenant
        self.usage: dict[str, Any] | None = None
        self.cost: Cost | None = None
        self.seconds = 0.0
        self.finish_reason = "stop"
        self.shutting_down = False
        self._engine, self._messages, self._sampling, self._meter = engine, messages, sampling, meter
        self._adapter = adapter
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._handle: HandleLike | None = None
        self._cancel_requested = False
        self.finished = False

    def pump(self) -> None:
        """Submit and wait, in a thread of its own; every delta is handed to the event loop."""
        try:
            handle = self._engine.submit(self._messages, self._sampling, tenant=self.tenant, adapter=self._adapter)
            self._call_in_loop(self._on_start, handle)
            for delta in handle:
                self._call_in_loop(self._on_delta, delta)
        except Exception as error:
            self._call_in_loop(self._on_error, error)
        finally:
            self._call_in_loop(self._on_end)

    def _call_in_loop(self, callback: Any, *arguments: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _on_start(self, handle: HandleLike) -> None:
        self._handle = handle
        if self._cancel_requested:
            handle.cancel()
        if not self._started.done():
            self._started.set_result(None)

    def _on_delta(self, delta: Delta) -> None:
        if delta.kind == "done" and self.usage is None:
            self._record_usage(delta)
        self._queue.put_nowait(delta)

    def _record_usage(self, done: Delta) -> None:
        if done.output is None:
            raise RuntimeError("the engine finished without an output")
        usage = done.output.usage
        self.seconds = time.monotonic() - self.start_time
        self.usage = usage_body(usage)
        hit, miss = self.usage["prompt_cache_hit_tokens"], self.usage["prompt_cache_miss_tokens"]
        self.cost = self._meter.record(hit=hit, miss=miss, output=usage.completion_tokens)
        self.finish_reason = str(done.output.finish_reason)
        if self.finish_reason == "cancelled":  # by the caller: an early stop; by us: DeepSeek's word for it
            self.finish_reason = "insufficient_system_resource" if self.shutting_down else "stop"

    def _on_error(self, error: Exception) -> None:
        if not self._started.done():
            self._started.set_exception(error)
            return
        log.error("an answer broke off", exc_info=error)
        self._queue.put_nowait(error)

    def _on_end(self) -> None:
        self.finished = True
        self._queue.put_nowait(None)

    async def wait_started(self) -> None:
        """Wait until the engine has taken the request.

        Raises:
            SpratError: the engine refuses it.
        """
        await self._started

    def cancel(self) -> None:
        """Stop generating; the last delta still comes. Does nothing once the answer has ended."""
        self._cancel_requested = True
        if self._handle is not None and not self.finished:
            self._handle.cancel()

    async def deltas(self, idle_seconds: float) -> AsyncIterator[Delta | None]:
        """Deltas as they come, up to "done"; None after each ``idle_seconds`` without one.

        Raises:
            RequestError: status 500; the engine broke off.
        """
        while True:
            try:
                item = await asyncio.wait_for(self._queue.get(), idle_seconds)
            except TimeoutError:
                yield None
                continue
            if item is None or isinstance(item, Exception):
                raise RequestError(500, "the engine broke off", code="engine_error", kind="server_error")
            yield item
            if item.kind == "done":
                return


class AdmissionPool:
    """Admits at most ``max_concurrent_requests`` at a time to ``engine``; knows all that run."""

    def __init__(self, engine: EngineLike, meter: Meter, *, max_concurrent_requests: int) -> None:
        self.engine, self.meter, self.max_concurrent_requests = engine, meter, max_concurrent_requests
        self.running: dict[str, StreamingRequest] = {}
        self.closed = False
        self._executor = ThreadPoolExecutor(max_workers=max_concurrent_requests, thread_name_prefix="sprat-answer")

    async def admit(
        self,
        request_id: str,
        messages: Sequence[Message],
        sampling: Sampling,
        tenant: Tenant,
        field_names: Mapping[str, str],
        adapter: str | None = None,
    ) -> StreamingRequest:
        """Hand a request of ``tenant`` to the engine under the unique ``request_id``.

        Args:
            field_names: the engine's max_tokens and thinking → the fields of the request that said them.
            adapter: name of the engine's adapter that answers; None: the model alone.

        Raises:
            RequestError: 429 when all slots are taken, 503 when closing, 400 when the engine refuses it.
        """
        if self.closed:
            message = "the server is shutting down"
            raise RequestError(503, message, code="shutting_down", kind="server_error", retry_after=5)
        if len(self.running) >= self.max_concurrent_requests:
            message = f"all {self.max_concurrent_requests} places are taken; try again in a moment"
            raise RequestError(429, message, code="too_many_requests", kind="rate_limit_error", retry_after=1)
        streaming_request = StreamingRequest(self.engine, messages, sampling, self.meter, tenant, adapter)
        self.running[request_id] = streaming_request
        future = asyncio.get_running_loop().run_in_executor(self._executor, streaming_request.pump)
        future.add_done_callback(lambda _: self.running.pop(request_id, None))
        try:
            await streaming_request.wait_started()
        except EngineError as error:
            param = field_names.get(error.where, "messages")
            text = str(EngineError(error.what, where=param, todo=error.todo))
            message = text.replace("max_tokens", field_names["max_tokens"])
            raise RequestError(400, message, param=param, code="not_possible") from error
        except SpratError as error:
            raise RequestError(500, str(error), code="engine_error", kind="server_error") from error
        except asyncio.CancelledError:
            streaming_request.cancel()
            raise
        return streaming_request

    def close(self) -> None:
        """Admit nobody more and stop all that run; their streams end in good order."""
        self.closed = True
        for streaming_request in list(self.running.values()):
            streaming_request.shutting_down = True
            streaming_request.cancel()
        self._executor.shutdown(wait=False)

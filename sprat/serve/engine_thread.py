"""An ``EngineClient`` whose engine is stepped by a thread of this process: for scripts and tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from sprat.engine.engine import Engine
from sprat.engine.response import Response
from sprat.engine.sequence import DEFAULT_TENANT, Tenant
from sprat.engine.stats import Stats
from sprat.serve.engine_client import EngineDied, Job
from sprat.serve.engine_jobs import Jobs, Notice, QueuedStream
from sprat.serve.engine_worker import EngineWorker


class ThreadEngineClient:
    """See ``EngineClient``. Nobody watches over it: a thread that hangs cannot be ended.

    Args:
        engine: not started; it is stepped from ``start`` to ``stop``, once.
    """

    def __init__(self, engine: Engine) -> None:
        self._jobs, self.alive, self.stalled, self.failure = Jobs(), False, False, None
        self._worker = EngineWorker(engine, self._receive)
        self.info = self._worker.info()
        self._loop: asyncio.AbstractEventLoop | None = None
        # Commands in their order; making a request of a long prompt takes milliseconds.
        self._commands = ThreadPoolExecutor(1, thread_name_prefix="sprat-commands")

    async def start(self) -> None:
        """See ``EngineClient``."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()
        self.alive = True

    async def stop(self) -> None:
        """See ``EngineClient``."""
        if not self.alive:
            return
        self.alive = False
        await asyncio.to_thread(self._commands.shutdown)
        await asyncio.to_thread(self._worker.stop)
        self._jobs.fail(_stopped())

    def submit(self, job: Job) -> QueuedStream:
        """See ``EngineClient``."""
        number, stream = self._jobs.open(len(job.samplings), self._cancel)
        if self.alive:
            self._commands.submit(self._worker.submit, number, job)
        else:
            self._jobs.deliver([(number, _stopped())])
        return stream

    async def stats(self) -> Stats:
        """See ``EngineClient``."""
        return await asyncio.to_thread(self._worker.stats)  # its books may be locked for a moment

    async def compile(self, response: Response, tenant: Tenant) -> None:
        """See ``EngineClient``."""
        if not self.alive:
            raise _stopped()
        await asyncio.wrap_future(self._worker.compile(response, tenant))

    async def embed(
        self, prompts: Sequence[Sequence[int]], adapter: str | None = None, tenant: Tenant = DEFAULT_TENANT
    ) -> list[list[float]]:
        """See ``EngineClient``."""
        if not self.alive:
            raise _stopped()
        vectors = self._worker.embed(prompts, tenant, adapter)
        try:
            return await asyncio.wrap_future(vectors)
        except asyncio.CancelledError:
            if self.alive or not vectors.cancelled():  # it is the caller who was cancelled
                raise
            raise _stopped() from None

    def _cancel(self, number: int) -> None:
        """Tell the worker; the job was submitted before."""
        if self.alive:
            self._commands.submit(self._worker.cancel, number)

    def _receive(self, notices: list[Notice]) -> None:
        """In any thread: hand events over to the loop, those of a step by one call."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop was closed without ``stop``: nobody reads
            self._loop.call_soon_threadsafe(self._jobs.deliver, notices)


def _stopped() -> EngineDied:
    """Why nothing is answered."""
    return EngineDied("the engine is not running", where="engine", todo="start it")

"""An ``EngineClient`` whose engine is a process of its own: what ``sprat serve`` uses.

The two share nothing but a socket, so a step never waits for the event loop, nor the event loop for a step, and what
breaks the engine (a bug in a kernel, the system's out-of-memory killer) leaves the server standing. It is noticed by
the end of the socket, or by a watchdog where the process hangs; who waited hears of it, and the engine is started again
after a pause that grows.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sprat.engine.response import Response
from sprat.engine.sequence import DEFAULT_TENANT, Tenant
from sprat.engine.stats import Stats
from sprat.errors import SpratError
from sprat.serve.engine_child import EngineProcess
from sprat.serve.engine_client import EngineDied, EngineInfo, Job
from sprat.serve.engine_jobs import Jobs, QueuedStream
from sprat.serve.engine_watchdog import ITERATION_TIMEOUT_SECONDS
from sprat.serve.engine_wire import Message, pack_grammar, pack_job, pack_prompts

STATS_SECONDS = 1.0  # then the last known ones are good enough
STOP_SECONDS = 10.0  # for an engine to end its jobs before it is killed
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds before it is started again; doubled from death to death
QUICK_SECONDS = 60.0  # who lived longer did not die of its start
MAX_QUICK_DEATHS = 8  # in a row; then it stays down

log = logging.getLogger("sprat.serve.engine")


class ProcessEngineClient:
    """See ``EngineClient``. ``start`` and all else must be called in one event loop, which outlives the engine.

    Args:
        model_folder, adapters: as of ``sprat.load`` and ``Engine``; they are loaded in the engine's process alone.
        iteration_timeout_seconds: a process that is at one step, or says nothing, for longer is killed.
        settings: of ``Engine``, as JSON has them.

    Attributes:
        failure: why the engine stays down; None while it is up, or will be.
        pid: of the engine's process, 0 while there is none.
    """

    def __init__(
        self,
        model_folder: str | Path,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        iteration_timeout_seconds: float = ITERATION_TIMEOUT_SECONDS,
        **settings: Any,
    ) -> None:
        folders = {name: str(folder) for name, folder in (adapters or {}).items()}
        self._load: Message = {"model_folder": str(model_folder), "adapters": folders, "settings": settings}
        self.info = EngineInfo(0, 0, 0, 0, ())
        self.failure: SpratError | None = None
        self._jobs, self._iteration_timeout_seconds = Jobs(), iteration_timeout_seconds
        self._process: EngineProcess | None = None
        self._stats: Stats | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """See ``EngineClient``."""
        return self._is_up and not self.stalled

    @property
    def stalled(self) -> bool:
        """See ``EngineClient``."""
        return self._process is not None and self._is_up and self._process.watchdog.stalled

    @property
    def _is_up(self) -> bool:
        return self._process is not None and self._process.up

    @property
    def pid(self) -> int:
        """See the class."""
        return self._process.pid if self._process is not None and self._process.up else 0

    async def start(self) -> None:
        """See ``EngineClient``."""
        self._watching = asyncio.get_running_loop().create_task(self._watch(await self._launch()))

    async def stop(self) -> None:
        """See ``EngineClient``."""
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            await asyncio.wait([watching])
        process, self._process = self._process, None
        if process is not None:
            process.send({"stop": True})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.ended.wait(), STOP_SECONDS)
            await process.kill()

    def submit(self, job: Job) -> QueuedStream:
        """See ``EngineClient``."""
        number, stream = self._jobs.open(len(job.samplings), self._cancel)
        try:
            self._running().send({"submit": number, **pack_job(job)})
        except SpratError as error:
            self._jobs.deliver([(number, error)])
        return stream

    async def stats(self) -> Stats:
        """See ``EngineClient``. Raises EngineDied: it was never up."""
        if not self.stalled:
            with contextlib.suppress(TimeoutError, EngineDied):
                async with asyncio.timeout(STATS_SECONDS):
                    self._stats = Stats(**await self._running().ask("stats"))
        if self._stats is None:
            raise _died("the engine was never up")
        return self._stats if self._is_up else dataclasses.replace(self._stats, running=0, waiting=0, blocks_used=0)

    async def compile(self, response: Response, tenant: Tenant) -> None:
        """See ``EngineClient``."""
        await self._running().ask("compile", **pack_grammar(response, tenant))

    async def embed(
        self, prompts: Sequence[Sequence[int]], adapter: str | None = None, tenant: Tenant = DEFAULT_TENANT
    ) -> list[list[float]]:
        """See ``EngineClient``."""
        vectors: list[list[float]] = await self._running().ask("embed", **pack_prompts(prompts, tenant, adapter))
        return vectors

    def _cancel(self, number: int) -> None:
        """Tell the engine; one that has died has no jobs."""
        if self._process is not None:
            self._process.send({"cancel": number})

    def _running(self) -> EngineProcess:
        """The process. Raises EngineDied: it is not up."""
        if self._process is None or not self._process.up:
            if self.failure is not None:
                raise _died(f"the engine is down: {str(self.failure).rstrip('.')}", "start the server again")
            raise _died("the engine is not up", "ask again in a moment")
        return self._process

    async def _launch(self) -> EngineProcess:
        """Start a process and wait until it is ready. Raises SpratError: it cannot be."""
        self._process = process = EngineProcess(self._jobs, self._iteration_timeout_seconds)
        try:
            ready = await process.load(self._load)
        except BaseException:
            self._process = None
            await process.kill()
            raise
        self.info = EngineInfo(**{**ready["info"], "adapters": tuple(ready["info"]["adapters"])})
        self._stats = Stats(**ready["stats"])
        return process

    async def _watch(self, process: EngineProcess) -> None:
        """Whenever the engine dies: end its jobs, and start it again, unless it dies of that."""
        quick_deaths, folder = 0, self._load["model_folder"]
        while True:
            await process.ended.wait()
            quick_deaths = quick_deaths + 1 if process.seconds < QUICK_SECONDS else 1
            reason: SpratError = process.death
            while True:
                if quick_deaths >= MAX_QUICK_DEATHS:
                    self.failure = reason
                    log.error("%s: not started again after %d ends in a row: %s", folder, quick_deaths, reason.what)
                    return
                pause = min(FIRST_PAUSE * 2**quick_deaths, LONGEST_PAUSE)
                log.warning("%s: %s; it is started again in %.1f s", folder, reason.what, pause)
                await asyncio.sleep(pause)
                try:
                    process = await self._launch()
                    break
                except (SpratError, OSError) as error:
                    quick_deaths += 1
                    reason = error if isinstance(error, SpratError) else _died(f"the engine cannot be started: {error}")
            log.warning("%s: the engine is up again", folder)


def _died(what: str, todo: str = "start it") -> EngineDied:
    """An error of an engine that is not there."""
    return EngineDied(what, where="engine", todo=todo)

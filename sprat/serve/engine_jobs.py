"""The event loop's side of jobs: their streams by number, for both engine clients. Everything here runs in the loop."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable

from sprat.errors import SpratError
from sprat.serve.engine_client import EngineDied, JobEvent

Notice = tuple[int, JobEvent | SpratError]  # of the job with this number; an error ends it


class QueuedStream:
    """See ``JobStream``: the events of one job, as they came and were not read yet.

    Args:
        choices: so many ``done`` make it whole.
        cancel: tells the engine.
    """

    def __init__(self, choices: int, cancel: Callable[[], None]) -> None:
        self._unfinished, self._cancel = choices, cancel
        self._events: deque[JobEvent] = deque()
        self._error: SpratError | None = None
        self._reader: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more can come."""
        return not self._unfinished

    def push(self, event: JobEvent | SpratError) -> None:
        """Follow the engine."""
        if isinstance(event, SpratError):
            self._error, self._unfinished = event, 0
        else:
            self._events.append(event)
            self._unfinished -= event.kind == "done"
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def cancel(self) -> None:
        """See ``JobStream``."""
        if self._unfinished:
            self._cancel()

    def __aiter__(self) -> QueuedStream:
        return self

    async def __anext__(self) -> JobEvent:
        while not self._events:
            if self._error is not None:
                raise self._error
            if not self._unfinished:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._events.popleft()


class Jobs:
    """The jobs that an engine has, by number."""

    def __init__(self) -> None:
        self._streams: dict[int, QueuedStream] = {}
        self._numbers = itertools.count(1)

    def open(self, choices: int, cancel: Callable[[int], None]) -> tuple[int, QueuedStream]:
        """A new job of so many choices; ``cancel`` gets its number."""
        number = next(self._numbers)
        stream = self._streams[number] = QueuedStream(choices, lambda: cancel(number))
        return number, stream

    def deliver(self, notices: Iterable[Notice]) -> None:
        """Give events to their jobs; those of a job that is not known any more are dropped."""
        for number, event in notices:
            stream = self._streams.get(number)
            if stream is not None:
                stream.push(event)
                if stream.ended:
                    del self._streams[number]

    def fail(self, error: EngineDied) -> None:
        """End all of them with ``error``."""
        self.deliver([(number, error) for number in self._streams])

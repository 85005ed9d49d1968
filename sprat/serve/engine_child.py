"""The engine's process as the server sees it: started, loaded, asked, and what becomes of whoever waits when it ends.

It ends by itself, by whoever kills it, or because it hangs (``engine_watchdog``): then it is killed from here.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from sprat.errors import MachineError
from sprat.serve.engine_client import EngineDied
from sprat.serve.engine_jobs import Jobs
from sprat.serve.engine_watchdog import ITERATION_TIMEOUT_SECONDS, Watchdog
from sprat.serve.engine_wire import Message, Unpacker, pack, unpack_error, unpack_notices


class EngineProcess(asyncio.Protocol):
    """One process of the engine, from its start to its end; made and used in the event loop.

    It is started in the loop's own thread: the system ends it when the *thread* that started it ends.

    Args:
        jobs: those that it has.
        limit_seconds: of silence and of one step; it is killed when they last longer.

    Attributes:
        up: it has loaded the model, and its end of the socket is there.
        ended: set when it is known how (``death``), and its jobs were told.
        watchdog: whether it gets on.
    """

    def __init__(self, jobs: Jobs, limit_seconds: float = ITERATION_TIMEOUT_SECONDS) -> None:
        self.up, self.ended, self.death = False, asyncio.Event(), EngineDied("")
        self._ready: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._jobs, self._unpacker, self._replies = jobs, Unpacker(), dict[int, asyncio.Future[Any]]()
        self._numbers, self._started = itertools.count(1), time.monotonic()
        self._transport: asyncio.Transport | None = None
        self._reaping: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self.watchdog, self._hang, self._hung_seconds = Watchdog(limit_seconds), "", 0.0
        self._socket, theirs = socket.socketpair()
        with theirs:
            words = (str(theirs.fileno()), str(os.getpid()), str(self.watchdog.interval))
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "sprat.serve.engine_main", *words],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # an interrupt at the terminal is not meant for it
                )
            except OSError as error:
                self._socket.close()
                fault = f"the engine's process cannot be started: {error.strerror}"
                raise MachineError(fault, where=sys.executable, todo="free memory, or end other programs") from None

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def seconds(self) -> float:
        """Since it was up, without those for which it hung."""
        return time.monotonic() - self._started - self._hung_seconds

    async def load(self, settings: Message) -> Message:
        """Let it load the model; its first words. Raises SpratError: it cannot, or died of it."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self, sock=self._socket)
        self._watching = loop.create_task(self._watch())
        self.send({"load": settings})
        return await self._ready

    async def ask(self, kind: str, **content: Any) -> Any:
        """Send a question and wait for the reply. Raises SpratError: what it says, or that it died."""
        number = next(self._numbers)
        future = self._replies[number] = asyncio.get_running_loop().create_future()
        self.send({kind: number, **content})
        try:
            return await future
        finally:
            self._replies.pop(number, None)

    def send(self, message: Message) -> None:
        """Send; nothing happens if it is gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(pack(message))

    async def kill(self) -> None:
        """End it now, and wait until it has."""
        if self._transport is None:  # it was not even connected
            self._socket.close()
            self.connection_lost(None)
        self._process.kill()
        await self.ended.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        for message in self._unpacker.push(data):
            if "events" in message:
                self._jobs.deliver(unpack_notices(message))
                continue
            if "beat" in message:
                self.watchdog.hear(message["beat"])
                continue
            future = self._replies.get(message["reply"]) if "reply" in message else self._ready
            if future is not None and not future.done():
                if "error" in message:
                    future.set_exception(unpack_error(message["error"]))
                    continue
                future.set_result(message["value"])
                if future is self._ready:  # at once: it may die before whoever waits for this hears of it
                    self.up, self.watchdog.is_loaded, self._started = True, True, time.monotonic()

    def connection_lost(self, error: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        self.up = False
        if self._reaping is None:
            self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _watch(self) -> None:
        """Look after it until it hangs or ends."""
        while not (hang := self.watchdog.look()):
            await asyncio.sleep(self.watchdog.interval)
        self._hang, self._hung_seconds = hang, self.watchdog.hung_seconds
        self.connection_lost(None)

    async def _reap(self) -> None:
        """Learn how it ended, and tell all who wait."""
        if self._watching is not None:
            self._watching.cancel()
        self._process.kill()  # without a socket it is of no use; most often it is dead already
        if self._hang:  # nobody waits for the end of what may not even hear that
            self._fail(f"the engine's process hung: {self._hang}; it was killed")
        while (code := self._process.poll()) is None:
            await asyncio.sleep(0.005)
        if self._transport is not None:
            self._transport.abort()
        if not self._hang:
            how = f"status {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
            self._fail(f"the engine's process ended ({how})")
        self.ended.set()

    def _fail(self, what: str) -> None:
        """Tell all who wait what has become of it."""
        self.death = EngineDied(what, todo="ask again in a moment")
        for future in (self._ready, *self._replies.values()):
            if not future.done():
                future.set_exception(self.death)
                future.exception()  # perhaps nobody waits
        self._jobs.fail(self.death)

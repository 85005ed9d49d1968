"""uvicorn's server, that says when it is up, bounds TLS handshakes, and drains before it leaves.

At the first signal to stop (SIGTERM, Ctrl-C) the server is no longer ready: what waits its turn and what comes is
refused with 503, running answers have ``shutdown_timeout_seconds``. It listens all the while, so that health checks and
late callers are told. At a second signal, whichever, it stops at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import uvicorn

from sprat.serve.config import ServeConfig
from sprat.serve.connections import bounded_protocol

CLOSE_SECONDS = 5  # for connections to close, once their answers have ended
FORCED_STOP_SECONDS = 2.0  # for the engine to end, at a second signal


class HttpServer(uvicorn.Server):
    """One server of one application.

    Args:
        app: from ``create_app``.
        config: its settings.
        tls: None: plain HTTP.
        on_started: called when requests are answered.
    """

    def __init__(
        self, app: Any, config: ServeConfig, tls: ssl.SSLContext | None, on_started: Callable[[], None]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded_protocol(config),
                log_level="error",  # a client that speaks no HTTP is told so, and is none of our warnings
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=CLOSE_SECONDS,
                timeout_keep_alive=30,
                lifespan="off",  # it is run here: uvicorn logs a traceback where an engine cannot start
                ws="none",
            )
        )
        self._app, self._serve_config, self._tls, self._on_started = app, config, tls, on_started
        self._stopping, self._forced = asyncio.Event(), asyncio.Event()  # by a first signal, and a second one
        self._lifespan = contextlib.AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Have the application start, and listen; a TLS handshake has the time of a head.

        Raises:
            SpratError: an engine cannot start.
        """
        self._loop = asyncio.get_running_loop()
        context = self._app.router.lifespan_context(self._app)
        if not await _unless(self._stopping, self._lifespan.enter_async_context(context)):
            return
        await super().startup(sockets=[])
        timeout = self._serve_config.header_timeout_seconds if self._tls else None
        for listener in sockets or []:
            server = await self._loop.create_server(
                self._make_protocol,
                sock=listener,
                ssl=self._tls,
                ssl_handshake_timeout=timeout,
                backlog=self.config.backlog,
            )
            self.servers.append(server)
        self._on_started()

    def _make_protocol(self) -> asyncio.Protocol:
        protocol_class: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = protocol_class(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop at the first signal, stop at the second."""
        self.force_exit = self.should_exit
        if self._loop is not None:
            self._loop.call_soon_threadsafe((self._forced if self.force_exit else self._stopping).set)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running answers finish, then close everything."""
        await self._drain()
        await super().shutdown(sockets=sockets)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._lifespan.aclose(), FORCED_STOP_SECONDS if self.force_exit else None)

    async def _drain(self) -> None:
        """Wait for running answers, their time, or a second signal; whatever then still runs is stopped."""
        serving = self._app.state.serving
        timeout = self._serve_config.shutdown_timeout_seconds
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_unless(self._forced, serving.drain(timeout)), timeout + 1)
        serving.abort()


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, Any]) -> bool:
    """Whether ``work`` was done before ``event`` came, which cancels it; raises what it raises."""
    task, cut = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((task, cut), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        cut.cancel()
        task.cancel()
        await asyncio.gather(task, cut, return_exceptions=True)

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
from collections.abc import Callable
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
                ws="none",
            )
        )
        self._app, self._serve_config, self._tls, self._on_started = app, config, tls, on_started
        self._forced = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; a TLS handshake has the time of a head."""
        await super().startup(sockets=[])
        if self.should_exit:
            return
        self._loop = asyncio.get_running_loop()
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
        if self.should_exit and self._loop is not None:
            self.force_exit = True
            self._loop.call_soon_threadsafe(self._forced.set)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running answers finish, then close everything."""
        await self._drain()
        await super().shutdown(sockets=sockets)
        if self.force_exit:  # uvicorn then leaves out the end of the application, and with it the engine's
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.lifespan.shutdown(), FORCED_STOP_SECONDS)

    async def _drain(self) -> None:
        """Wait for running answers, their time, or a second signal; whatever then still runs is stopped."""
        serving = getattr(self._app.state, "serving", None)
        if serving is None:
            self._app.state.pool.close()
            return
        timeout = self._serve_config.shutdown_timeout_seconds
        drained, forced = (asyncio.ensure_future(wait) for wait in (serving.drain(timeout), self._forced.wait()))
        await asyncio.wait((drained, forced), timeout=timeout + 1, return_when=asyncio.FIRST_COMPLETED)
        for task in (drained, forced):
            task.cancel()
        await asyncio.gather(drained, forced, return_exceptions=True)
        serving.abort()

"""uvicorn's server, that says when it is up, bounds TLS handshakes, and drains before it leaves.

At the first signal to stop (SIGTERM, Ctrl-C) the server is no longer ready: what waits its turn and what comes is
refused with 503, running answers have ``shutdown_timeout_seconds``. It listens all the while, so that health checks and
late callers are told. At a second signal, whichever, it stops at once. It stops, too, when all its engines are down for
good: whoever runs it (systemd) has to hear of that, and starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from sprat.errors import SpratError
from sprat.serve.api_keys import ApiKeys
from sprat.serve.config import ServeConfig
from sprat.serve.connections import bounded_protocol
from sprat.serve.metrics import metrics_app
from sprat.serve.middleware import SecurityMiddleware

CLOSE_SECONDS = 5  # for connections to close, once their answers have ended
FORCED_STOP_SECONDS = 2.0  # for the engine to end, at a second signal


class HttpServer(uvicorn.Server):
    """One server of one application.

    Args:
        app: from ``create_app``.
        config: its settings.
        tls: None: plain HTTP.
        on_started: called when requests are answered.
        metrics_listener: where ``/metrics`` is told to whoever can reach it.

    Attributes:
        failure: of what its engines have died, where it stopped because of that.
    """

    def __init__(
        self,
        app: Any,
        config: ServeConfig,
        tls: ssl.SSLContext | None,
        on_started: Callable[[], None],
        metrics_listener: socket.socket | None = None,
    ) -> None:
        super().__init__(_uvicorn_config(app, config))
        self._app, self._serve_config, self._tls, self._on_started = app, config, tls, on_started
        self._metrics_listener, self._metrics_state = metrics_listener, ServerState()
        self._stopping, self._forced = asyncio.Event(), asyncio.Event()  # by a first signal, and a second one
        self._lifespan = contextlib.AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failure: SpratError | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Have the application start, and listen.

        Raises:
            SpratError: an engine cannot start.
        """
        self._loop = asyncio.get_running_loop()
        context = self._app.router.lifespan_context(self._app)
        if not await _unless(self._stopping, self._lifespan.enter_async_context(context)):
            return
        await super().startup(sockets=[])
        for listener in sockets or []:
            await self._listen(listener, self.config, self.server_state)
        if self._metrics_listener is not None:
            metrics = _metrics_only(self._app.state.serving, self._serve_config)
            config = _uvicorn_config(metrics, self._serve_config)
            config.load()
            await self._listen(self._metrics_listener, config, self._metrics_state)
        gc.collect()
        gc.freeze()  # what was loaded stays: nobody waits while it is looked through for garbage
        self._on_started()

    async def _listen(self, listener: socket.socket, config: uvicorn.Config, state: ServerState) -> None:
        """Answer on ``listener`` as ``config`` says; a TLS handshake has the time of a head."""
        assert self._loop is not None
        protocol_class: Any = config.http_protocol_class
        server = await self._loop.create_server(
            lambda: protocol_class(config=config, server_state=state, app_state={}),
            sock=listener,
            ssl=self._tls,
            ssl_handshake_timeout=self._serve_config.header_timeout_seconds if self._tls else None,
            backlog=config.backlog,
        )
        self.servers.append(server)

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; asked ten times a second."""
        if not self.should_exit:
            self.failure = self._app.state.serving.failure
        return await super().on_tick(counter) or self.failure is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop at the first signal, stop at the second."""
        self.force_exit = self.should_exit
        if self._loop is not None:
            self._loop.call_soon_threadsafe((self._forced if self.force_exit else self._stopping).set)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running answers finish, then close everything."""
        await self._drain()
        for connection in list(self._metrics_state.connections):
            connection.shutdown()
        await super().shutdown(sockets=sockets)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._lifespan.aclose(), FORCED_STOP_SECONDS if self.force_exit else None)

    async def _drain(self) -> None:
        """Wait for running answers, their time, or a second signal; whatever then still runs is stopped."""
        serving = self._app.state.serving
        timeout = self._serve_config.shutdown_timeout_seconds
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_unless(self._forced, serving.drain(timeout)), timeout + 1)
        finally:
            serving.abort()


def _uvicorn_config(app: Any, config: ServeConfig) -> uvicorn.Config:
    """How uvicorn serves ``app``: quietly, within the bounds of ``config``."""
    return uvicorn.Config(
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


def _metrics_only(serving: Any, config: ServeConfig) -> SecurityMiddleware:
    """The application of the metrics' own port: no key, and no other names of this machine than elsewhere."""
    app = metrics_app(serving.metrics, serving.refresh_metrics)
    return SecurityMiddleware(app, ApiKeys(), (*config.allowed_hosts, config.host), root_path=config.root_path)


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

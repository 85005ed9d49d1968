"""Connections: a deadline for the silent, a slot for whoever comes while they hold theirs, and errors in JSON.

A connection costs its owner nothing, so without a bound some hundreds that never send a request shut everybody out.
Two rules on top of uvicorn's protocol. A request's head must be there ``header_timeout_seconds`` after its connection
or its first byte came, however slowly it drips. And where all slots are taken, a new connection takes that of the one
that has been idle longest: that waits for a request, for the rest of a body, or for a client that does not read.
Whoever waits for an answer is never put out; where all slots are theirs, a new connection is answered with 503. The
time for a body is bound where it is read (``api.BODY_TIMEOUT_SECONDS``).

What is no HTTP never reaches the application. uvicorn would answer it in plain text; here it is an error object like
any other, with the parser's reason.
"""

from __future__ import annotations

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol  # also beside httptools, which bounds no head

from sprat.serve.config import ServeConfig
from sprat.serve.errors import RequestError
from sprat.serve.responses import error_response


class BoundedH11Protocol(H11Protocol):
    """One connection, under these rules."""

    limits: ServeConfig
    _deadline: asyncio.TimerHandle | None = None
    _last_activity = 0.0  # when it last did something useful

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a slot, if need be that of an idle connection."""
        if len(self.connections) >= self.limits.max_connections and not _evict_idle(self.connections):
            self.app = _overloaded_app(self.limits.max_connections)
        super().connection_made(transport)
        self._last_activity = self.loop.time()
        self._update_deadline()

    def data_received(self, data: bytes) -> None:
        """Read on; a head that is whole lifts the deadline."""
        super().data_received(data)
        self._update_deadline()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; uvicorn calls it while it handles the error of its parser."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # not yet answered
            self.transport.write(_bad_request_response(sys.exception()))
        if self.cycle is not None:
            self.cycle.disconnected = True
        self.transport.close()

    def on_response_complete(self) -> None:
        """Be idle from now on."""
        super().on_response_complete()
        self._last_activity = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Lift the deadline."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    @property
    def idle_since(self) -> float | None:
        """Since when it has been idle; None while somebody waits for its answer."""
        cycle = self.cycle
        has_request = cycle is not None and not cycle.response_complete and not cycle.more_body
        return None if has_request and not self.flow.write_paused else self._last_activity

    def _update_deadline(self) -> None:
        """Set the deadline while a head is awaited, and lift it when that has come."""
        awaiting_head = self.cycle is None or self.cycle.response_complete
        if self._deadline is not None and not awaiting_head:
            self._deadline.cancel()
            self._deadline = None
        elif self._deadline is None and awaiting_head:
            self._deadline = self.loop.call_later(self.limits.header_timeout_seconds, self._abort)

    def _abort(self) -> None:
        """Close it without a word."""
        self.connections.discard(self)
        self.transport.abort()


def bounded_protocol(config: ServeConfig) -> type[BoundedH11Protocol]:
    """uvicorn's protocol with the limits of ``config``, for ``uvicorn.Config(http=...)``."""

    class Limited(BoundedH11Protocol):
        limits = config

    return Limited


def _overloaded_app(max_connections: int) -> Any:
    """The application of a connection for which there is no slot."""
    message = f"all {max_connections} connections wait for answers; try again in a moment"
    error = RequestError(503, message, code="too_many_connections", kind="server_error", retry_after=1)
    response = error_response(error)
    response.headers["Connection"] = "close"
    return response


def _bad_request_response(error: BaseException | None) -> bytes:
    """The answer to a request that h11 gave up with ``error``, which knows its status."""
    status = HTTPStatus(getattr(error, "error_status_hint", 400))
    message = f"the request is not valid HTTP/1.1 ({error}); correct the client, or use another"
    code = status.phrase.lower().replace(" ", "_")
    body = json.dumps(RequestError(status, message, code=code).body()).encode()
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode("ascii") + body


def _evict_idle(connections: set[Any]) -> bool:
    """Close the connection that has been idle longest; False where there is none."""
    idle = [connection for connection in connections if connection.idle_since is not None]
    if idle:
        min(idle, key=lambda connection: connection.idle_since)._abort()
    return bool(idle)

"""Connections: a deadline for the silent, a place for whoever comes while they hold theirs, and errors in JSON.

A connection costs its owner nothing, so without a bound some hundreds that never send a request shut everybody out.
Two rules on top of uvicorn's protocol. A request's head must be there ``head_seconds`` after its connection or its
first byte came, however slowly it drips. And where all places are taken, a new connection takes that of the one that
has been useless longest: that waits for a request, for the rest of a body, or for a client that does not read.
Whoever waits for an answer is never put out; where all places are theirs, a new connection is answered with 503. The
time for a body is bound where it is read (``api.READ_SECONDS``).

What is no HTTP never reaches the application. uvicorn would answer it in plain text; here it is an error object like
any other, with the parser's reason.
"""

from __future__ import annotations

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

from sprat.serve.protocol import RequestError

HEAD_SECONDS = 10.0
MOST = 512  # connections at a time


def protocol(  # size: it is one class
    most: int = MOST, head_seconds: float = HEAD_SECONDS
) -> type[asyncio.Protocol]:
    """uvicorn's protocol with these rules, for ``uvicorn.Config(http=...)``.

    Args:
        most: connections at a time.
        head_seconds: for the head of a request.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol  # also beside httptools, which bounds no head

    base: Any = H11Protocol

    class Bounded(base):  # type: ignore[misc]
        """One connection."""

        _deadline: asyncio.TimerHandle | None = None
        _since = 0.0  # when it last did something useful

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            if len(self.connections) >= most and not _make_room(self.connections):
                self.app = _full(most)
            super().connection_made(transport)
            self._since = self.loop.time()
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def send_400_response(self, msg: str) -> None:
            """Answer what is no HTTP; uvicorn calls it while it handles the error of its parser."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # not yet answered
                self.transport.write(_malformed(sys.exception()))
            if self.cycle is not None:
                self.cycle.disconnected = True
            self.transport.close()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._since = self.loop.time()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
            super().connection_lost(exc)

        @property
        def idle_since(self) -> float | None:
            """Since when it has been useless; None while somebody waits for its answer."""
            cycle = self.cycle
            asks = cycle is not None and not cycle.response_complete and not cycle.more_body
            return None if asks and not self.flow.write_paused else self._since

        def _watch(self) -> None:
            """Set the deadline while a head is awaited, and lift it when that has come."""
            awaited = self.cycle is None or self.cycle.response_complete
            if self._deadline is not None and not awaited:
                self._deadline.cancel()
                self._deadline = None
            elif self._deadline is None and awaited:
                self._deadline = self.loop.call_later(head_seconds, self._abort)

        def _abort(self) -> None:
            """Close it without a word."""
            self.connections.discard(self)
            self.transport.abort()

    return Bounded


def _full(most: int) -> Any:
    """The application of a connection for which there is no place."""
    from sprat.serve.api import refuse

    message = f"all {most} connections wait for answers; try again in a moment"
    answer = refuse(RequestError(503, message, code="too_many_connections", kind="server_error", retry_after=1))
    answer.headers["Connection"] = "close"
    return answer


def _malformed(error: BaseException | None) -> bytes:
    """The answer to a request that h11 gave up with ``error``, which knows its status."""
    status = HTTPStatus(getattr(error, "error_status_hint", 400))
    message = f"the request is not valid HTTP/1.1 ({error}); correct the client, or use another"
    code = status.phrase.lower().replace(" ", "_")
    body = json.dumps(RequestError(status, message, code=code).body()).encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    return f"{head}Connection: close\r\n\r\n".encode("ascii") + body


def _make_room(connections: set[Any]) -> bool:
    """Close the connection that has been useless longest; False where there is none."""
    idle = [one for one in connections if one.idle_since is not None]
    if idle:
        min(idle, key=lambda one: one.idle_since)._abort()
    return bool(idle)

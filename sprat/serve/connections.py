"""Connections that say nothing: a deadline for each, and a place for whoever comes while they hold theirs.

A connection costs its owner nothing, so without a bound some hundreds that never send a request shut everybody out.
Two rules on top of uvicorn's protocol. A request's head must be there ``head_seconds`` after its connection or its
first byte came, however slowly it drips. And where all places are taken, a new connection takes that of the one that
has been useless longest: that waits for a request, for the rest of a body, or for a client that does not read.
Whoever waits for an answer is never put out. The time for a body is bound where it is read (``api.READ_SECONDS``).
"""

from __future__ import annotations

import asyncio
from typing import Any

HEAD_SECONDS = 10.0
MOST = 512  # connections at a time


def protocol(most: int = MOST, head_seconds: float = HEAD_SECONDS) -> type[asyncio.Protocol]:
    """uvicorn's protocol with both rules, for ``uvicorn.Config(http=...)``.

    Args:
        most: connections at a time.
        head_seconds: for the head of a request.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol

    class Bounded(base):  # type: ignore[misc]
        """One connection."""

        _deadline: asyncio.TimerHandle | None = None
        _since = 0.0  # when it last did something useful

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            if len(self.connections) >= most:
                _make_room(self.connections)
            super().connection_made(transport)
            self._since = self.loop.time()
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

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


def _make_room(connections: set[Any]) -> None:
    """Close the connection that has been useless longest, if there is one."""
    idle = [one for one in connections if one.idle_since is not None]
    if idle:
        min(idle, key=lambda one: one.idle_since)._abort()

"""The reader of an answer: one that does not read is dropped, one that has left ends its request.

The engine never waits for a reader. When more than ``max_unread_bytes`` of a stream have waited for two seconds the
connection is dropped, and its request with it; a finished answer of which nothing is taken for
``write_timeout_seconds`` likewise.

A reset ends a request at once. The end of what a client sends (FIN) may mean that it has gone, or only that it has said
all (``nc -N``); TCP tells which when something is sent. So on a plain connection a probe is sent that every HTTP/1.1
client passes over (``100 Continue``, in a stream a comment): whoever has gone answers it with a reset within a round
trip, whoever reads on gets its answer. HTTP/1.0 and TLS, which have no such probe, count as gone.
"""

from __future__ import annotations

import asyncio
import select
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol  # also beside httptools, which bounds no head

from sprat.serve.config import ServeConfig
from sprat.serve.errors import BrokenStream

SLOW_READER_SECONDS = 2.0  # for which more than ``max_unread_bytes`` may wait
PROBE_SECONDS = 0.1  # between two looks at a client that sends no more; every tenth time it is sent something


class WatchedReaderProtocol(H11Protocol):
    """One connection whose client is watched while it is answered."""

    limits: ServeConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unread_timer: asyncio.TimerHandle | None = None
        self._slow_timer: asyncio.TimerHandle | None = None
        self._is_probed = self._is_event_stream = False
        self._app = self.app
        self.app = self._run_app

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Bound what may wait in it."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self.limits.max_unread_bytes)

    def connection_lost(self, exc: Exception | None) -> None:
        """Watch no longer."""
        cancel_timer(self._unread_timer)
        cancel_timer(self._slow_timer)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """From now on see that what is left of the answer is taken."""
        self._is_event_stream = False
        super().on_response_complete()
        self._watch_unread()

    def pause_writing(self) -> None:
        """More waits for the reader than may."""
        super().pause_writing()
        self._slow_timer = self.loop.call_later(SLOW_READER_SECONDS, self._drop_slow_reader)

    def resume_writing(self) -> None:
        """The reader reads."""
        super().resume_writing()
        cancel_timer(self._slow_timer)

    @property
    def _is_answering(self) -> bool:
        """Whether a request has been read, or begun, that is not answered in full."""
        return self.cycle is not None and not self.cycle.response_complete

    def _end_cycle(self) -> None:
        """Tell the application that its caller is gone."""
        if self._is_answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _abort(self) -> None:
        """Close it without a word."""
        self.connections.discard(self)
        self.transport.abort()

    async def _run_app(self, scope: Any, receive: Any, send: Any) -> None:
        """The application; a response that it cannot finish, or has no time for, ends uncleanly."""

        async def send_and_note(message: Any) -> None:
            if message["type"] == "http.response.start":
                kind = dict(message.get("headers", ())).get(b"content-type", b"")
                self._is_event_stream = kind.startswith(b"text/event-stream")
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except BrokenStream:
            self._end_cycle()
            self.transport.close()
            self._watch_unread()
        except asyncio.CancelledError:  # by a server that leaves
            self._end_cycle()
            self._abort()

    def _keep_half_closed(self) -> bool:
        """At the end of what the client sends: whether its answer is worth going on with, until a probe says no."""
        if not self._is_answering or self.scheme != "http" or self.scope["http_version"] != "1.1":
            return False
        if not self._is_probed:
            self._is_probed = True
            self.loop.call_later(PROBE_SECONDS, self._probe, 0)
        return True

    def _probe(self, looks: int) -> None:
        """Look whether a client that sends no more has gone, and every second give it cause to say so."""
        if self.transport.is_closing() or not self._is_answering:
            return
        if _has_left(self.transport):
            self._abort()
            return
        if looks % 10 == 0:
            if self.conn.our_state is h11.SEND_RESPONSE:
                probe: h11.Event = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
                self.transport.write(self.conn.send(probe) or b"")
            elif self._is_event_stream and self.conn.our_state is h11.SEND_BODY:
                self.transport.write(self.conn.send(h11.Data(data=b":\n")) or b"")
        self.loop.call_later(PROBE_SECONDS, self._probe, looks + 1)

    def _drop_slow_reader(self) -> None:
        """Drop a stream of which too much waits for its reader; a whole answer has more time."""
        if self._is_answering:
            self._abort()

    def _watch_unread(self) -> None:
        """See to it that what is left to send is taken, a little at least each time."""
        waiting = self.transport.get_write_buffer_size()
        if waiting and self._unread_timer is None:
            self._unread_timer = self.loop.call_later(self.limits.write_timeout_seconds, self._check_unread, waiting)

    def _check_unread(self, before: int) -> None:
        self._unread_timer = None
        if self.transport.get_write_buffer_size() >= before:
            self._abort()
        else:
            self._watch_unread()


def _has_left(transport: asyncio.BaseTransport) -> bool:
    """Whether the other side has reset the connection, where nothing is read from it any more."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), 0)
    return bool(poll.poll(0))


def cancel_timer(timer: asyncio.TimerHandle | None) -> None:
    """Cancel ``timer`` where there is one."""
    if timer is not None:
        timer.cancel()

"""Connections: absolute deadlines, a slot for whoever comes, and errors in JSON below the application.

A connection costs its owner nothing, so without bounds some hundreds that never send a request shut everybody out.
These rules stand on top of uvicorn's protocol; those for whoever is answered are in ``readers``.

Deadlines. A request's head must be there ``header_timeout_seconds`` after its connection or its first byte came,
however slowly it drips. Its body has ``body_timeout_seconds``, and thereafter 16 KiB must come each second. Whoever
is late reads 408 in JSON; who has said nothing at all is closed without a word.

Slots. Where all are taken, a new connection takes that of the one that has been idle longest: that waits for a
request, for the rest of a body, or for its reader after the answer. Whoever waits for an answer is never put out; where
all slots are theirs, a new connection is answered with 503, but for the health checks.

What is no HTTP never reaches the application. uvicorn would answer it in plain text; here it is an error object like
any other, with the parser's reason.
"""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from enum import Enum
from typing import Any

import h11

from sprat.serve.config import ServeConfig
from sprat.serve.errors import RequestError
from sprat.serve.raw_answers import MAX_HEAD_BYTES, HeadBound, error_answer, overloaded_app, parser_error
from sprat.serve.readers import WatchedReaderProtocol, cancel_timer

MIN_BODY_RATE = 16 * 1024  # bytes a second, after the first ``body_timeout_seconds``
MAX_PIPELINED_BYTES = 16 * 1024  # of later requests while one is answered; with more the connection ends after it
MAX_READ_BYTES = 16 * 1024  # at a time: in chunks of one byte more would hold up everybody for a tenth of a second
LINGER_SECONDS = 2.0  # for which what a refused client still sends is read, so that it can read why


class Phase(Enum):
    """What a connection waits for."""

    IDLE = "a request, after an answer"
    HEAD = "the rest of a head"
    BODY = "the rest of a body"
    REST = "the rest of a body that was answered already, or of what was refused"
    ANSWER = "us"


class BoundedH11Protocol(WatchedReaderProtocol):
    """One connection, under these rules."""

    idle: OrderedDict[BoundedH11Protocol, None]  # all of a server that wait for their clients, the longest first

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._phase: Phase | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._head = HeadBound()
        self._body_bytes = 0  # since the last look at its rate
        self._refused = False

    @property
    def _has_data(self) -> bool:
        """Whether some of a next request has come."""
        return bool(self.conn.trailing_data[0])

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a slot, if need be that of an idle connection."""
        if len(self.connections) >= self.limits.max_connections and not self._make_room():
            self._app = overloaded_app(self._app, self.limits.max_connections)
        super().connection_made(transport)
        transport.max_size = MAX_READ_BYTES  # type: ignore[attr-defined]  # asyncio's own name for it, on a plain socket
        self._update_phase()

    def data_received(self, data: bytes) -> None:
        """Read on, within the bounds of a head and of pipelining."""
        if self._phase is Phase.BODY:
            self._count_body(len(data))
        while data and not self._refused and self.conn.their_state is not h11.MUST_CLOSE:  # then nothing more counts
            piece = data if self._phase is Phase.BODY else data[:MAX_HEAD_BYTES]
            if self.conn.their_state is h11.IDLE and self._head.is_exceeded(piece):
                self._refuse(self._head.error())
                return
            super().data_received(piece)
            data = data[len(piece) :]
        if self.flow.read_paused and self.conn.their_state is not h11.SEND_BODY and not self._refused:
            if len(self.conn.trailing_data[0]) > MAX_PIPELINED_BYTES:
                self.cycle.keep_alive = False
            else:  # only what is read can say that the client has left
                self.flow.resume_reading()
        self._update_phase(has_data=True)

    def _count_body(self, count: int) -> None:
        """Count what comes of a body; whoever sends it fast enough is not idle."""
        before = self._body_bytes
        self._body_bytes += count
        if before // MIN_BODY_RATE != self._body_bytes // MIN_BODY_RATE and self in self.idle:
            self.idle.move_to_end(self)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Tell whoever only stops sending from whoever leaves; True: the connection stays open."""
        phase = self._current_phase(self._has_data)
        if phase is Phase.BODY or (phase is Phase.HEAD and self._has_data):
            message = "the connection's end came before that of the request; send all of it"
            self._refuse(RequestError(400, message, code="incomplete_request"))
            return None
        return phase is Phase.ANSWER and self._keep_half_closed()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; uvicorn calls it while it handles the error of its parser."""
        self._refuse(parser_error(sys.exception(), self.conn.trailing_data[0]))

    def on_response_complete(self) -> None:
        """Be idle from now on, unless the next request is there already."""
        self._head = HeadBound()
        super().on_response_complete()
        self._update_phase(has_data=self._has_data)
        if self._is_probed and self._phase is not Phase.ANSWER:
            self.transport.close()

    def shutdown(self) -> None:
        """Close what is idle, refuse what has not come in full; what waits for an answer closes after it."""
        if not self._is_answering:
            self.transport.close()
        elif self._phase is Phase.BODY:
            message = "the server is shutting down; ask another, or again in a moment"
            self._refuse(RequestError(503, message, code="shutting_down", kind="server_error", retry_after=5))
        else:
            self.cycle.keep_alive = False

    def connection_lost(self, exc: Exception | None) -> None:
        """Lift all deadlines."""
        cancel_timer(self._deadline)
        self.idle.pop(self, None)
        super().connection_lost(exc)

    def _current_phase(self, has_data: bool) -> Phase:
        """What it waits for; ``has_data``: of a next request some has come."""
        if self._refused:
            return Phase.REST
        theirs = self.conn.their_state
        if theirs is h11.SEND_BODY:
            return Phase.BODY if self._is_answering else Phase.REST
        if self._is_answering:
            return Phase.ANSWER
        return Phase.HEAD if self.cycle is None or (theirs is h11.IDLE and has_data) else Phase.IDLE

    def _update_phase(self, *, has_data: bool = False) -> None:
        """Where it waits for something else than before: another deadline, and the end of the queue of the idle."""
        phase = self._current_phase(has_data)
        if phase is self._phase:
            return
        self._phase = phase
        cancel_timer(self._deadline)
        self.idle.pop(self, None)
        if phase is Phase.ANSWER:
            return
        self.idle[self] = None
        self._body_bytes = 0
        if self.transport.is_closing():  # and what it still has to send is watched
            return
        if phase is Phase.BODY:
            self._deadline = self.loop.call_later(self.limits.body_timeout_seconds, self._check_body, 0.0)
            return
        seconds = self.timeout_keep_alive if phase is Phase.IDLE else self.limits.header_timeout_seconds
        self._deadline = self.loop.call_later(LINGER_SECONDS if self._refused else seconds, self._on_deadline)

    def _check_body(self, min_bytes: float) -> None:
        """From its deadline on a body is given a few seconds at a time, in each of which enough of it must come."""
        if self._body_bytes < min_bytes:
            self._refuse(self._late("body", self.limits.body_timeout_seconds))
            return
        window = max(1.0, self.limits.body_timeout_seconds / 10)
        self._body_bytes = 0
        self._deadline = self.loop.call_later(window, self._check_body, window * MIN_BODY_RATE)

    def _on_deadline(self) -> None:
        """End a connection of which nothing more has come in time."""
        if self._phase is Phase.HEAD and self._has_data:
            self._refuse(self._late("head", self.limits.header_timeout_seconds))
        elif self._phase is Phase.IDLE:
            self.transport.close()  # once the last answer is taken
        else:
            self._abort()

    @staticmethod
    def _late(part: str, seconds: float) -> RequestError:
        message = f"the {part} of the request did not come within {seconds:g} s; send it at once"
        return RequestError(408, message, code="request_timeout")

    def _make_room(self) -> bool:
        """Close the connection that has been idle longest; False where there is none."""
        if not self.idle:
            return False
        longest = next(iter(self.idle))
        if longest._phase is Phase.BODY or longest._has_data:
            message = "the server is full, and this request was the slowest to come; try again"
            longest._answer(RequestError(503, message, code="too_many_connections", kind="server_error", retry_after=1))
        longest._abort()
        return True

    def _answer(self, error: RequestError) -> None:
        """Write an error from below the application, where no answer has begun."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self._refused:
            return
        scope = self.scope if self.conn.our_state is h11.SEND_RESPONSE else None
        unread = self.conn.trailing_data[0]
        self.transport.write(error_answer(error, scope, unread, self.server_state.default_headers))

    def _abort(self) -> None:
        """Close it without a word, and let another have its slot."""
        self.idle.pop(self, None)
        super()._abort()

    def _refuse(self, error: RequestError) -> None:
        """Answer with ``error`` where that is possible still, and close: gently, so that it can be read."""
        self._answer(error)
        self._refused = True
        self._end_cycle()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()
        self._update_phase()
        self._watch_unread()


def bounded_protocol(config: ServeConfig) -> type[BoundedH11Protocol]:
    """uvicorn's protocol with the limits of ``config``, for ``uvicorn.Config(http=...)``: one for each server."""

    class Limited(BoundedH11Protocol):
        limits = config
        idle = OrderedDict()

    return Limited

"""Who may start, who waits, and who is told to come again, and when.

A request is counted the moment it is seen, before anything of it is rendered, tokenized or compiled:

    async with admission.place(tenant.name, tokens=estimate, seqs=n) as place:   # RequestError: 429 or 503
        ...                                                                       # render, tokenize, submit
        place.charge(tokens)                                                      # as they are computed

It holds ``seqs`` of ``max_num_seqs`` places inside the block, which is left when the *engine* has let go of it, not
when its client has: clients who hang up cannot pile work on the engine. Before that it waits for its turn, in one of a
bounded number of seats.

**Whose turn it is.** Every tenant has a counter of the tokens that it was served, and who has the lowest is next (see
``fair_queue``). A start costs what the request is estimated at, at once, and is settled when the place is left. Who
comes back is raised to the level at which others start now: absence earns nothing. The first of a tenant in turn keeps
that turn until its places are free; nobody smaller overtakes it.

**Who is refused.** A seat is for everybody in equal parts. Where they run out, the tenant with the most of them gives
up its newest, be it a stranger's arrival that needs it: 429 for who has reached a limit of its own, 503 where
everybody's is reached, or the wait has lasted ``max_wait_seconds``.

**When to come again.** A refused caller is told when a seat is predicted to be free for *it*: each refusal takes the
next of the moments at which requests leave, so that those who come back meet half-empty seats and not one another.
Clients obey ``Retry-After`` up to a minute, so nobody is told more.

All of this runs in one event loop, takes no lock and never blocks. It knows nothing of HTTP or of the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from sprat.serve.errors import RequestError
from sprat.serve.fair_queue import Account, FairQueue, Waiter
from sprat.serve.service_rate import ServiceRate

if TYPE_CHECKING:
    from sprat.serve.events import Usage
    from sprat.serve.generation import Generation

SHORTEST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 60.0  # openai's and anthropic's clients take no longer Retry-After for true
SHUTDOWN_RETRY_SECONDS = 5.0


class Place(Waiter):
    """A request that is counted: it waits, then holds its places, then has left. Made by ``Admission``."""

    def __init__(self, admission: Admission, account: Account, tokens: int, seqs: int, number: int) -> None:
        super().__init__(account, tokens, seqs, number)
        self.arrival_time = admission.clock()
        self.start_time: float | None = None
        self.charged_tokens = 0
        self._admission = admission
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.deadline: asyncio.TimerHandle | None = None
        self.holds = False

    def charge(self, tokens: int) -> None:
        """Count ``tokens`` that were computed for it: of the prompt those that were not cached, and of the answers."""
        before = max(self.charged_tokens, self.tokens)
        self.charged_tokens += tokens
        if self.holds:
            self.account.served_tokens += max(self.charged_tokens - before, 0)

    def record_usage(self, usage: Usage) -> None:
        """Tell ``on_usage`` what the request used in the end."""
        if self._admission.on_usage is not None:
            self._admission.on_usage(self.account.name, usage)

    def leave(self) -> None:
        """Give up the turn, or the places; does nothing the second time."""
        self._admission.leave(self)


class Admission:
    """Admits requests to an engine that works on ``max_num_seqs`` answers at a time.

    Args:
        max_num_seqs: places. A request for more of them than there are is admitted when it is alone.
        max_num_queued_reqs: seats of those who wait; 0: nobody waits.
        max_num_queued_tokens: estimated tokens of those who wait; one that waits alone may have more.
        max_wait_seconds: from arrival to the start, at most; None: for as long as it takes.
        max_num_seqs_per_tenant: places of one tenant; None: all.
        max_num_queued_reqs_per_tenant: seats of one tenant; None: those that others do not need.
        expected_seconds: how long a place is held, until that is measured.
        admit: asked about each request after it is counted and before it waits; an error that it returns refuses it.
        on_usage: told of each answer's usage (``Place.record_usage``).
        clock: seconds; only differences count.

    Attributes:
        num_running, num_running_seqs: requests that hold places, and the places.
        closed: nobody is admitted any more.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_queued_reqs: int,
        max_num_queued_tokens: int,
        max_wait_seconds: float | None = 30.0,
        *,
        max_num_seqs_per_tenant: int | None = None,
        max_num_queued_reqs_per_tenant: int | None = None,
        expected_seconds: float = 3.0,
        admit: Callable[[str, Generation | None], RequestError | None] | None = None,
        on_usage: Callable[[str, Usage], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_num_seqs, self.max_wait_seconds = max_num_seqs, max_wait_seconds
        self.max_num_seqs_per_tenant = max_num_seqs_per_tenant or max_num_seqs
        self.max_num_queued_reqs_per_tenant = max_num_queued_reqs_per_tenant
        self.admit, self.on_usage, self.clock = admit, on_usage, clock
        self.num_running = self.num_running_seqs = 0
        self.closed = False
        self._queue: FairQueue[Place] = FairQueue(max_num_queued_reqs, max_num_queued_tokens)
        self._rate = ServiceRate(expected_seconds, clock)
        self._num_arrivals = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return self._queue.num_reqs

    @property
    def num_waiting_tokens(self) -> int:
        """Estimated tokens of the requests that wait."""
        return self._queue.num_tokens

    @asynccontextmanager
    async def place(
        self, tenant: str, *, tokens: int, seqs: int = 1, generation: Generation | None = None
    ) -> AsyncIterator[Place]:
        """Hold places for a request for as long as the block lasts; arguments and errors are those of ``enter``."""
        place = await self.enter(tenant, tokens=tokens, seqs=seqs, generation=generation)
        try:
            yield place
        finally:
            place.leave()

    async def enter(self, tenant: str, *, tokens: int, seqs: int = 1, generation: Generation | None = None) -> Place:
        """Count a request at once and wait for its turn; ``Place.leave`` has to follow. Cancelled, it leaves by itself.

        Args:
            tenant: name of whose request it is.
            tokens: of its prompt, estimated, as from its bytes.
            seqs: answers to it.
            generation: for ``admit``.

        Raises:
            RequestError: 429: the tenant has reached a limit of its own. 503: everybody's is reached, the wait was too
                long, or the server shuts down. Each says when to come again. And what ``admit`` answers.
        """
        if self.closed:
            raise _shutting_down()
        self._num_arrivals += 1
        place = Place(self, self._queue.account(tenant, self.clock()), tokens, seqs, self._num_arrivals)
        self._queue.append(place)
        self._empty.clear()
        try:
            self._seat(place, generation)
            await place.turn
        except BaseException:
            self.leave(place)
            raise
        finally:
            if place.deadline is not None:
                place.deadline.cancel()
        return place

    def _seat(self, place: Place, generation: Generation | None) -> None:
        """Let an arrival start or wait, or refuse it; whoever has to give way to it is refused."""
        if self._next() is place:
            crowded_out = []
        elif self._takes_too_many_seats(place):
            raise self._refusal(place, own=True)
        else:
            crowded_out = self._queue.crowded_out(place)
        if place in crowded_out:
            share_used = place.account.num_waiting > 1 and self._queue.num_tenants > 1
            raise self._refusal(place, own=share_used or self._holds_all_its_places(place))
        error = self.admit(place.account.name, generation) if self.admit is not None else None
        if error is not None:
            raise error
        for other in crowded_out:
            self._refuse(other, self._refusal(other, own=True))
        self._start_all()
        if place.waits and self.max_wait_seconds is not None:
            place.deadline = asyncio.get_running_loop().call_later(self.max_wait_seconds, self._expire, place)

    def _takes_too_many_seats(self, place: Place) -> bool:
        limit = self.max_num_queued_reqs_per_tenant
        return limit is not None and place.account.num_waiting > limit

    def _holds_all_its_places(self, place: Place) -> bool:
        """Whether it is the bound of its tenant that keeps a request from free places."""
        own = place.account.running_seqs + place.seqs > self.max_num_seqs_per_tenant
        return own and self.num_running_seqs + place.seqs <= self.max_num_seqs

    def leave(self, place: Place) -> None:
        """Give up the turn of a request, or its places; does nothing the second time."""
        if place.waits:
            self._queue.remove(place)
        elif place.holds:
            place.holds = False
            self.num_running -= 1
            self.num_running_seqs -= place.seqs
            excess = place.tokens - place.charged_tokens if place.charged_tokens else 0
            self._queue.finish(place, excess)
            self._rate.depart(place.seqs, start=place.start_time or 0.0, tokens=place.tokens)
        else:
            return
        self._start_all()
        if not self.num_running and not self.num_waiting:
            self._empty.set()

    def _next(self) -> Place | None:
        """The request that may start now, if any may."""
        if self.closed or self.num_running_seqs >= self.max_num_seqs:
            return None
        place = self._queue.first(self.max_num_seqs_per_tenant)
        if place is None or not self.num_running or self.num_running_seqs + place.seqs <= self.max_num_seqs:
            return place
        return None

    def _start_all(self) -> None:
        """Start all who may."""
        while (place := self._next()) is not None:
            self._queue.start(place)
            place.holds = True
            place.start_time = self._rate.arrive(place.seqs)
            self.num_running += 1
            self.num_running_seqs += place.seqs
            if not place.turn.done():  # it is where its waiter was cancelled a moment ago, who leaves at once
                place.turn.set_result(None)

    def _refuse(self, place: Place, error: RequestError) -> None:
        """End the wait of a request."""
        self.leave(place)
        if not place.turn.done():
            place.turn.set_exception(error)

    def _expire(self, place: Place) -> None:
        if place.waits:
            message = f"no place came free within {self.max_wait_seconds:g} seconds; try again later"
            retry_after = self._retry_after(place)
            error = RequestError(503, message, code="queue_timeout", kind="server_error", retry_after=retry_after)
            self._refuse(place, error)

    def _refusal(self, place: Place, *, own: bool) -> RequestError:
        retry_after = self._retry_after(place)
        if own:
            message = "too many of your requests wait already; try again when some are answered"
            return RequestError(
                429, message, code="too_many_requests", kind="rate_limit_error", retry_after=retry_after
            )
        message = "the server is overloaded; try again later"
        return RequestError(503, message, code="overloaded", kind="server_error", retry_after=retry_after)

    def _retry_after(self, place: Place) -> float:
        """Seconds after which a seat should be free for a request that is refused now; takes the moment for it."""
        account, now = place.account, self.clock()
        places = min(self.max_num_seqs / max(self._queue.num_tenants, 1), self.max_num_seqs_per_tenant)
        speed = places / self._rate.margin()
        mean = account.waiting_tokens / account.num_waiting if account.num_waiting else place.tokens
        half_queue = account.waiting_seqs * self._rate.held_seconds(mean) / 2 / speed
        synchronous = max(self._rate.held_seconds() / 2 - self._rate.mean_age(), 0.0)  # all began a moment ago
        step = place.seqs * self._rate.held_seconds(place.tokens) / speed
        slot = max(account.next_slot, now + half_queue + synchronous)
        self._rate.promise(slot)
        account.next_slot = min(slot + step, now + LONGEST_RETRY_SECONDS)
        return round(min(max(slot - now, SHORTEST_RETRY_SECONDS), LONGEST_RETRY_SECONDS), 3)

    def close(self) -> None:
        """Admit nobody more, and refuse all who wait. Those who run go on."""
        self.closed = True
        for place in self._queue.waiting:
            self._refuse(place, _shutting_down())

    async def drained(self) -> None:
        """Wait until nobody waits and no place is held."""
        await self._empty.wait()


def _shutting_down() -> RequestError:
    message = "the server is shutting down"
    return RequestError(503, message, code="shutting_down", kind="server_error", retry_after=SHUTDOWN_RETRY_SECONDS)

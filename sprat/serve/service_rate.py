"""How fast places come free: what ``Retry-After`` is predicted from.

By Little's law the mean time that a place is held is all the time that places were held, by the number of requests that
left them. Both are counted here, and both fade with each request that leaves. A request that still holds its place has
put its time in and no departure yet, so a start with slow requests is seen as slow before the first of them is through:
a mean over finished requests alone would know the short ones only. Requests that began together may all end together,
though: until as many have left as there are, what they are half through is the most that is believed.

What is believed before anything was seen is short, so it is soon found out where it is too short: somebody comes at the
moment that was promised, and nobody has left. Clients come again twice, so the next guess has to be good: then requests
may be no more than an eighth through.
"""

from __future__ import annotations

import math
from collections.abc import Callable

MEMORY = 64  # departures after which an observation has faded to 1/e
PRIOR = 0.3  # requests that the expectation weighs as much as
HALF_THROUGH, BARELY_BEGUN = 2.0, 8.0  # their age by this may be their whole time: at first, and once a promise broke
LARGEST_RATIO = 4.0  # of the predicted time of a request to that of the mean one, whatever its tokens


class ServiceRate:
    """Measures how long requests hold their places.

    Args:
        expected_seconds: what is believed before anything was seen; it weighs little.
        clock: seconds; only differences count.

    >>> now = [0.0]
    >>> rate = ServiceRate(expected_seconds=1.0, clock=lambda: now[0])
    >>> start = rate.arrive(1)
    >>> now[0] = 9.0
    >>> rate.depart(1, start=start, tokens=10)
    >>> round(rate.held_seconds(), 2)  # 0.3 + 9 seconds, 0.3 + 1 departures
    7.15
    """

    def __init__(self, expected_seconds: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._held_seconds, self._departures = PRIOR * expected_seconds, PRIOR
        self._tokens, self._requests = 0.0, 0.0
        self._num_departures = 0
        self._expected_seconds = expected_seconds
        self._first_promise = math.inf
        self._num_held, self._start_sum, self._last_time = 0, 0.0, clock()

    def arrive(self, seqs: int) -> float:
        """``seqs`` places are held from now on; returns the time, which ``depart`` asks for."""
        now = self._advance()
        self._num_held += seqs
        self._start_sum += seqs * now
        return now

    def depart(self, seqs: int, *, start: float, tokens: int) -> None:
        """A request of ``tokens`` (estimated) leaves the ``seqs`` places that it held since ``start``."""
        self._advance()
        self._num_held -= seqs
        self._num_departures += seqs
        self._start_sum = self._start_sum - seqs * start if self._num_held else 0.0
        self._first_promise = self._first_promise if self._num_held else math.inf
        keep = (1 - 1 / MEMORY) ** seqs
        self._held_seconds, self._departures = self._held_seconds * keep, (self._departures + seqs) * keep
        self._tokens, self._requests = (self._tokens + seqs * tokens) * keep, (self._requests + seqs) * keep

    def held_seconds(self, tokens: float | None = None) -> float:
        """Seconds that a place is held: by a request of ``tokens`` (estimated), or by the mean one."""
        self._advance()
        mean = self._held_seconds / self._departures
        if self._num_departures < self._num_held:
            ratio = BARELY_BEGUN if self._clock() >= self._first_promise else HALF_THROUGH
            mean = min(mean, max(self._expected_seconds, ratio * self.mean_age()))
        if tokens is None or self._tokens <= 0:
            return mean
        ratio = tokens * self._requests / self._tokens
        return mean * min(max(ratio, 1 / LARGEST_RATIO), LARGEST_RATIO)

    def promise(self, moment: float) -> None:
        """Somebody is told to come at ``moment``; when that comes before much was measured, too little was believed."""
        self._first_promise = min(self._first_promise, moment)

    def margin(self) -> float:
        """By what factor places may be held longer than is thought: one standard error.

        Times are taken to vary as those of an exponential distribution do.
        """
        return 1 + 1 / math.sqrt(max(self._requests, 1.0))

    def mean_age(self) -> float:
        """For how many seconds the places in use have been held, on average; 0 where none is."""
        return self._clock() - self._start_sum / self._num_held if self._num_held else 0.0

    def _advance(self) -> float:
        now = self._clock()
        self._held_seconds += self._num_held * (now - self._last_time)
        self._last_time = now
        return now

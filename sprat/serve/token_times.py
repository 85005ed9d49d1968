"""When the tokens of a choice came, as far as its pieces of text tell.

Pieces are not tokens: a token may be part of a character, be held back for a stop string, or end the answer, and then
has no piece; drafts that hold come several at a time. The engine tells how many tokens there were when a choice has
come to its end, so the time of each is known only then.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from heapq import heapify, heapreplace


class TokenTimes:
    """The pieces of one choice.

    >>> times = TokenTimes()
    >>> for seconds in (1.0, 2.0, 5.0):
    ...     times.add(seconds, 1)
    >>> list(times.intervals(6, end=6.0))  # the third one is a character of three tokens, the last token has no text
    [1.0, 1.0, 1.0, 1.0, 1.0]
    """

    __slots__ = ("_arrivals",)

    def __init__(self) -> None:
        self._arrivals: list[tuple[float, int]] = []  # seconds, and how many tokens were seen

    def add(self, now: float, n: int) -> None:
        """``n`` tokens came, together with those of the same ``now`` (seconds)."""
        together = self._arrivals.pop()[1] if self._arrivals and self._arrivals[-1][0] == now else 0
        self._arrivals.append((now, together + n))

    def intervals(self, tokens: int | None = None, end: float | None = None) -> Iterator[float]:
        """Seconds from each token to the next one; those that came together have their part each.

        Args:
            tokens: that there were; None: as many as were seen.
            end: when that was said, in seconds.

        Yields:
            ``tokens - 1`` numbers, 0 where all came at once.
        """
        if end is not None:
            self.add(end, 0)
        seconds = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(self._arrivals)]
        seen = [n for _, n in self._arrivals]
        following = (sum(seen) if tokens is None else tokens) - 1
        if not seconds:
            yield from itertools.repeat(0.0, following)
        counts = apportion(seconds, seen[1:], following)
        for interval, count in zip(seconds, counts, strict=True):
            for _ in range(count):
                yield interval / count


def apportion(seconds: Sequence[float], seen: Sequence[int], tokens: int) -> list[int]:
    """How many of ``tokens`` came in each of the intervals ``seconds``, in which so many were ``seen``.

    The others came where nothing was seen, then where most time went by for each token.

    >>> apportion([0.1, 0.3, 0.1, 0.1], [1, 1, 1, 0], 6)
    [1, 3, 1, 1]
    """
    counts = list(seen)
    missing = tokens - sum(counts) if counts else 0

    def share(index: int) -> float:
        """Seconds of each token, were there one more."""
        return seconds[index] / (counts[index] + 1) if counts[index] else math.inf

    if missing > 0:
        heap = [(-share(index), index) for index in range(len(counts))]
        heapify(heap)
        for _ in range(missing):
            index = heap[0][1]
            counts[index] += 1
            heapreplace(heap, (-share(index), index))
    for _ in range(min(-missing, sum(counts))):  # a token may end one piece and begin the next
        index = min((index for index, count in enumerate(counts) if count), key=lambda i: seconds[i] / counts[i])
        counts[index] -= 1
    return counts

"""Notices an engine's process that hangs: one that does not end, and does not get on either.

The process says every second, in a thread that does nothing else, that it is there and for how long it has been at one
and the same step or command. The server ends it where it has heard nothing for longer than the limit, or where one step
takes longer. Silence comes of a process that was stopped, or of a lock that nobody lets go of; a long step of a kernel
that never returns.

What takes long in order is no hang. A prompt is computed in pieces, each a step of its own. A grammar is compiled
beside the steps. A model that is being loaded may take as long as it likes, as long as its process is heard, for which
there is time even where the limit is short: libraries that come from a slow disk let nobody speak. Time in which the
one who measures stood still itself counts for a moment at most: after a laptop's sleep or a debugger's stop nobody is
taken for hung.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

ITERATION_TIMEOUT_SECONDS = 300.0  # the limit, where nobody says another: a step of a large model may take minutes
BEAT_SECONDS = 1.0  # from one sign of life to the next, where the limit is not very short
BEATS_OF_LIMIT = 5  # at least
SILENT_SECONDS = 10.0  # then a process is not relied on any more
Mark = Callable[[], object]


def beat_seconds(limit_seconds: float) -> float:
    """How often a process that may hang for ``limit_seconds`` says that it lives.

    >>> beat_seconds(300), beat_seconds(1)
    (1.0, 0.2)
    """
    return min(BEAT_SECONDS, limit_seconds / BEATS_OF_LIMIT)


class Heartbeat:
    """The side of the engine's process.

    Args:
        send: tells the server, in a thread of its own, for how many seconds nothing has got on.
        interval: seconds from one time to the next.
        clock: seconds; only differences count.
    """

    def __init__(
        self, send: Callable[[float], None], interval: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._send, self._interval, self._clock = send, interval, clock
        self._marks: list[Mark] = []
        self._last: list[tuple[object, float]] = []  # of each mark: what it was, and for how long
        self._last_time = clock()

    def watch(self, mark: Mark) -> None:
        """Watch a piece of work: ``mark`` is None while there is nothing to do, else changes whenever that gets on."""
        self._last.append((None, 0.0))
        self._marks.append(mark)

    def start(self) -> None:
        """Beat from now on, until the process ends."""
        threading.Thread(target=self._run, name="sprat-heartbeat", daemon=True).start()

    def stuck_seconds(self) -> float:
        """For how long the slowest piece of work has not got on; to be asked every ``interval`` seconds."""
        now = self._clock()
        passed, self._last_time = min(now - self._last_time, 2 * self._interval), now
        for index, mark in enumerate(list(self._marks)):
            value, (last, seconds) = mark(), self._last[index]
            self._last[index] = value, seconds + passed if value is not None and value == last else 0.0
        return max((seconds for _, seconds in self._last), default=0.0)

    def _run(self) -> None:
        while True:
            time.sleep(self._interval)
            self._send(self.stuck_seconds())


class Watchdog:
    """The server's side, for one process.

    Args:
        limit_seconds: of silence, and of one step, once the model is loaded.
        clock: seconds; only differences count.

    Attributes:
        is_loaded: set by whoever hears that the model is loaded.

    >>> now = [0.0]
    >>> dog = Watchdog(3.0, lambda: now[0])
    >>> dog.is_loaded = True
    >>> def look() -> str:
    ...     now[0] += dog.interval
    ...     return dog.look()
    >>> [look() for _ in range(4)]
    ['', '', '', '']
    >>> dog.hear(0.0)
    >>> [look() for _ in range(6)][-1]
    'it has said nothing for 3.6 s'
    """

    def __init__(self, limit_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_seconds, self.interval, self._clock = limit_seconds, beat_seconds(limit_seconds), clock
        self._silent_seconds = self._stuck_seconds = 0.0
        self._last_time = clock()
        self.is_loaded = False

    @property
    def hung_seconds(self) -> float:
        """For how long nothing has been heard, or nothing has got on."""
        return max(self._silent_seconds, self._stuck_seconds)

    @property
    def stalled(self) -> bool:
        """Whether it is to be doubted that the process gets on; it may yet."""
        half = self.limit_seconds / 2
        return self._silent_seconds > min(SILENT_SECONDS, half) or self._stuck_seconds > half

    def hear(self, stuck_seconds: float) -> None:
        """The process lives, and has been at one step for so long."""
        self._silent_seconds, self._stuck_seconds = 0.0, stuck_seconds

    def look(self) -> str:
        """Why it is to be taken for hung, or the empty string; to be asked every ``interval`` seconds."""
        now = self._clock()
        self._silent_seconds += min(now - self._last_time, 2 * self.interval)
        self._last_time = now
        limit = self.limit_seconds if self.is_loaded else max(self.limit_seconds, ITERATION_TIMEOUT_SECONDS)
        if self._silent_seconds > limit:
            return f"it has said nothing for {self._silent_seconds:.1f} s"
        if self._stuck_seconds > self.limit_seconds:
            return f"it has been at one step for {self._stuck_seconds:.1f} s"
        return ""

"""Who runs next: continuous batching.

Requests wait in a queue and run in rows 0 … n-1 of one batch, which is never padded with dead rows: a
finished request leaves at once, the last rows move into the holes, and waiting requests take the rows
behind them in the very next step (Yu et al., "Orca", OSDI 2022). A step may therefore prefill some rows and
decode others. First come, first served; the only limits are the rows and the prompt tokens of one step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from sprat.engine.sequence import Sequence


@dataclass(frozen=True)
class Plan:
    """One step: rows 0 … running-1 decode one token each; ``firsts`` then ``twins`` take the rows behind them.

    A twin has the same prompt as the new row ``twin_of`` and copies its cache instead of computing it.
    """

    running: int
    firsts: list[Sequence] = field(default_factory=list)
    twins: list[Sequence] = field(default_factory=list)
    twin_of: list[int] = field(default_factory=list)

    @property
    def new(self) -> list[Sequence]:
        """All requests that begin in this step, in the order of their rows."""
        return self.firsts + self.twins


@dataclass(frozen=True)
class Moves:
    """Rows to copy after some left: ``source[i]`` goes to ``target[i]``; then ``count`` rows are left."""

    source: list[int]
    target: list[int]
    count: int


class Scheduler:
    """The waiting queue and the running rows; ``running[r].row == r`` always holds.

    Args:
        max_batch: rows at most.
        prefill_tokens: prompt tokens, padding included, that one step may compute; one prompt always fits.
    """

    def __init__(self, max_batch: int, prefill_tokens: int) -> None:
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def admit(self) -> Plan:
        """Take from the queue what fits and give it rows."""
        count = len(self.running)
        firsts: list[Sequence] = []
        twins: list[tuple[Sequence, int]] = []
        known: dict[tuple[int, tuple[int, ...]], int] = {}
        widest = 0
        while self.waiting and count + len(firsts) + len(twins) < self.max_batch:
            sequence = self.waiting[0]
            name = (sequence.share, tuple(sequence.prompt))
            if sequence.share and name in known:
                twins.append((sequence, known[name]))
            else:
                wider = max(widest, len(sequence.prompt))
                if firsts and wider * (len(firsts) + 1) > self.prefill_tokens:
                    break
                widest = wider
                known[name] = count + len(firsts)
                firsts.append(sequence)
            self.waiting.popleft()
        plan = Plan(count, firsts, [twin for twin, _ in twins], [row for _, row in twins])
        for sequence in plan.new:
            sequence.row = len(self.running)
            self.running.append(sequence)
        for sequence in plan.twins:
            sequence.hit = len(sequence.prompt)
        return plan

    def remove(self, leaving: Collection[Sequence]) -> Moves:
        """Let ``leaving`` (all running) go and close the holes with the last rows."""
        gone = {sequence.row for sequence in leaving}
        count = len(self.running) - len(gone)
        target = sorted(row for row in gone if row < count)
        source = [row for row in range(count, len(self.running)) if row not in gone]
        for old, new in zip(source, target, strict=True):
            self.running[new] = self.running[old]
            self.running[new].row = new
        del self.running[count:]
        for sequence in leaving:
            sequence.row = -1
        return Moves(source, target, count)

    def withdraw(self) -> tuple[list[Sequence], list[Sequence]]:
        """Cancelled requests: those taken out of the queue, and those that still hold a row."""
        waiting = [s for s in self.waiting if s.cancelled or (s.event is not None and s.event.is_set())]
        if waiting:
            gone = {id(sequence) for sequence in waiting}
            self.waiting = deque(sequence for sequence in self.waiting if id(sequence) not in gone)
        return waiting, [s for s in self.running if s.cancelled or (s.event is not None and s.event.is_set())]

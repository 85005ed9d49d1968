"""When each action of a pipeline begins and ends: an event simulation of a table of actions.

A rank takes the next action of its table as soon as it is free and what the action needs has arrived:

    F(stage, m)   needs F(stage - 1, m) and the way from its rank
    I, B(stage, m) need F(stage, m), and I or B(stage + 1, m) and the way from its rank
    W(stage, m)   needs I(stage, m)

Ranks may differ in speed and stages in size, so times are given for each stage as its own rank needs them. A pair
hands both results on at its end. What a rank does not compute between the step's begin and the last rank's end is
its bubble.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from sprat.errors import ConfigError
from sprat.plan.schedule import Action, Table


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch through one stage, on the rank that holds it."""

    forward: float
    backward: float  # full: inputs and weights
    weight: float = 0.0  # the part of ``backward`` that W is
    overlapped: float = -1.0  # this stage's half of a forward-backward pair; negative: nothing overlaps

    def of(self, action: Action, partner: StageTime) -> float:
        """Seconds of ``action``; ``partner`` is the stage whose backward an ``FB`` has."""
        if action.kind == "F":
            return self.forward
        if action.kind == "B":
            return self.backward
        if action.kind == "I":
            return self.backward - self.weight
        if action.kind == "W":
            return self.weight
        halves = [
            stage.overlapped if stage.overlapped >= 0 else (stage.forward + stage.backward) / 2
            for stage in (self, partner)
        ]
        return sum(halves)


@dataclass(frozen=True)
class Timeline:
    """Begin and end of each action, by rank, in seconds from the step's begin."""

    table: Table
    begin: list[list[float]]
    end: list[list[float]]
    busy: list[float] = field(default_factory=list)  # of each rank

    @property
    def span(self) -> float:
        """Seconds until the last rank is done."""
        return max(ends[-1] for ends in self.end)

    @property
    def bubble(self) -> float:
        """Seconds that a rank is idle, mean over ranks."""
        return self.span - sum(self.busy) / len(self.busy)

    def seconds_by_kind(self) -> dict[str, float]:
        """Seconds spent in each kind of action, mean over ranks."""
        sums: defaultdict[str, float] = defaultdict(float)
        for actions, begins, ends in zip(self.table, self.begin, self.end, strict=True):
            for action, begin, end in zip(actions, begins, ends, strict=True):
                sums[action.kind] += (end - begin) / len(self.table)
        return dict(sums)


def simulate(table: Table, times: Sequence[StageTime], send: Sequence[float] | float = 0.0) -> Timeline:
    """Run ``table``.

    Args:
        times: of each stage.
        send: seconds that activations take from stage ``i`` to stage ``i + 1`` (and gradients back), where it is not
            hidden; one number for all, or one for each border between stages.

    Raises:
        ConfigError: the table waits for something that no rank makes.
    """
    hops = [float(send)] * len(times) if isinstance(send, int | float) else [*send, 0.0]
    owner = {action.stage: rank for rank, actions in enumerate(table) for action in actions}
    for border in range(len(times) - 1):  # both arms of a V meet on one rank: nothing is sent
        if owner.get(border) == owner.get(border + 1):
            hops[border] = 0.0
    done: dict[tuple[str, int, int], float] = {}  # "F" and "I" results: when they are there, on their rank
    begin: list[list[float]] = [[] for _ in table]
    end: list[list[float]] = [[] for _ in table]
    waiting: defaultdict[tuple[str, int, int], list[int]] = defaultdict(list)
    ready = list(range(len(table)))
    last = len(times) - 1
    while ready:
        rank = ready.pop()
        while len(end[rank]) < len(table[rank]):
            action = table[rank][len(end[rank])]
            start = end[rank][-1] if end[rank] else 0.0
            missing = None
            for need, delay in _needs(action, last, hops):
                if need not in done:
                    missing = need
                    break
                start = max(start, done[need] + delay)
            if missing:
                waiting[missing].append(rank)
                break
            partner = times[action.backward_stage] if action.kind == "FB" else times[action.stage]
            finish = start + times[action.stage].of(action, partner)
            begin[rank].append(start)
            end[rank].append(finish)
            for made in _makes(action):
                done[made] = finish
                ready += waiting.pop(made, [])
    if stuck := [rank for rank, ends in enumerate(end) if len(ends) < len(table[rank])]:
        action = table[stuck[0]][len(end[stuck[0]])]
        what = f"rank {stuck[0]} waits for ever before {action}"
        raise ConfigError(what, where="pipeline schedule", todo="give the table every action that it needs")
    busy = [sum(e - b for b, e in zip(*pair, strict=True)) for pair in zip(begin, end, strict=True)]
    return Timeline(table, begin, end, busy)


def _needs(action: Action, last: int, hops: Sequence[float]) -> list[tuple[tuple[str, int, int], float]]:
    """What ``action`` waits for, and how long that is on its way."""
    kind, stage, number = action.kind, action.stage, action.micro_batch
    needs: list[tuple[tuple[str, int, int], float]] = []
    if kind in ("F", "FB") and stage > 0:
        needs.append((("F", stage - 1, number), hops[stage - 1]))
    if kind == "FB":
        stage, number = action.backward_stage, action.backward_micro_batch
    if kind in ("B", "I", "FB"):
        needs.append((("F", stage, number), 0.0))
        if stage < last:
            needs.append((("I", stage + 1, number), hops[stage]))
    if kind == "W":
        needs.append((("I", stage, number), 0.0))
    return needs


def _makes(action: Action) -> list[tuple[str, int, int]]:
    """What others, or this rank later, wait for."""
    if action.kind == "F":
        return [("F", action.stage, action.micro_batch)]
    if action.kind in ("B", "I"):
        return [("I", action.stage, action.micro_batch)]
    if action.kind == "FB":
        backward = ("I", action.backward_stage, action.backward_micro_batch)
        return [("F", action.stage, action.micro_batch), backward]
    return []

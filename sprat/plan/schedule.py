"""Who computes what when in a pipeline: a table of actions for each rank.

A pipeline cuts the layers into stages and the batch into micro-batches. A rank may hold several stages (virtual stages,
chunks). What it does is a fixed list of actions, executed in order, each as soon as what it needs has arrived:

    F   forward of one micro-batch through one stage
    B   full backward: gradients of inputs and of weights
    I   the half of a backward that another rank waits for: gradients of inputs
    W   the other half: gradients of weights, which can wait
    FB  a forward and a full backward at the same time, one's communication behind the other's computation

Five tables, as they are published:

    1f1b         one forward, one backward in turn (PipeDream, arXiv 1806.03377; Megatron, 2104.04473)
    interleaved  the same with several stages a rank, depth first (arXiv 2104.04473)
    zero_bubble  ZB1P: W fills the gaps (arXiv 2401.10241), with one or more stages a rank
    zbv          two stages a rank, laid out as a V (arXiv 2401.10241, section 6)
    dualpipe_v   two stages a rank as a V, forward and backward overlapped (deepseek-ai/DualPipe)

DualPipe itself (V3, arXiv 2412.19437) sends micro-batches from both ends of ``pp`` ranks, each of which holds two
stages. Folded in the middle it is two copies of DualPipeV over ``pp / 2`` ranks, so that is how it is simulated. Left
out: GPipe and looped breadth-first, which keep every micro-batch's activations, and idle slots.
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from typing import Literal, NamedTuple

from sprat.errors import ConfigError

Kind = Literal["F", "B", "I", "W", "FB"]
ScheduleName = Literal["1f1b", "interleaved", "zero_bubble", "zbv", "dualpipe_v"]
NAMES: tuple[ScheduleName, ...] = ("1f1b", "interleaved", "zero_bubble", "zbv", "dualpipe_v")


class Action(NamedTuple):
    """One entry of a rank's table; ``FB`` has the forward's stage and micro-batch first, then the backward's."""

    kind: Kind
    stage: int
    micro_batch: int
    backward_stage: int = -1
    backward_micro_batch: int = -1

    def __str__(self) -> str:
        tail = f"+{self.backward_stage}B{self.backward_micro_batch}" if self.kind == "FB" else ""
        return f"{self.stage}{'F' if tail else self.kind}{self.micro_batch}{tail}"


Table = tuple[tuple[Action, ...], ...]  # for each rank, in order of execution


def stages_of_rank(name: ScheduleName, pipeline: int, chunks: int, rank: int) -> list[int]:
    """Which stages ``rank`` holds: every ``pipeline``-th, or the two arms of a V.

    >>> stages_of_rank("interleaved", 4, 2, 1), stages_of_rank("zbv", 4, 2, 1)
    ([1, 5], [1, 6])
    """
    if name in ("zbv", "dualpipe_v"):
        return [rank, 2 * pipeline - 1 - rank]
    return [chunk * pipeline + rank for chunk in range(chunks)]


@functools.lru_cache(maxsize=256)
def make_table(name: ScheduleName, pipeline: int, micro_batches: int, chunks: int = 1) -> Table:
    """The actions of each rank.

    Args:
        pipeline: ranks of the pipeline.
        micro_batches: of one step.
        chunks: stages that a rank holds.

    >>> [str(action) for action in make_table("1f1b", 2, 2)[0]]
    ['0F0', '0F1', '0B0', '0B1']

    Raises:
        ConfigError: the schedule is unknown, or cannot run these micro-batches.
    """
    if pipeline == chunks == 1 and name in ("zbv", "dualpipe_v"):  # one stage: a V of no arms
        name = "1f1b"
    check_table(name, pipeline, micro_batches, chunks)
    if name == "1f1b":
        return tuple(tuple(_one_f_one_b(pipeline, micro_batches, rank)) for rank in range(pipeline))
    if name == "zbv":
        return tuple(tuple(_zbv(pipeline, micro_batches, rank)) for rank in range(pipeline))
    if name == "dualpipe_v":
        return tuple(tuple(_DualPipeV(pipeline, rank).actions(micro_batches)) for rank in range(pipeline))
    split = name == "zero_bubble"
    return tuple(tuple(_interleaved(pipeline, micro_batches, chunks, rank, split)) for rank in range(pipeline))


def check_table(name: str, pipeline: int, micro_batches: int, chunks: int) -> None:
    """Refuse what no table exists for.

    Raises:
        ConfigError: see ``make_table``.
    """
    if name not in NAMES:
        raise ConfigError(f"unknown schedule {name!r}", where="schedule", todo=f"use one of {', '.join(NAMES)}")
    if min(pipeline, micro_batches, chunks) < 1:
        what = f"a pipeline of {pipeline} ranks, {micro_batches} micro-batches and {chunks} stages a rank"
        raise ConfigError(what, where=f"schedule {name}", todo="each is at least 1")
    if name == "1f1b" and chunks != 1:
        todo = "take interleaved, or one stage a rank"
        raise ConfigError(f"1f1b has one stage a rank, not {chunks}", where="schedule 1f1b", todo=todo)
    if name in ("zbv", "dualpipe_v") and chunks != 2:
        raise ConfigError(f"{name} has two stages a rank, not {chunks}", where=f"schedule {name}", todo="give it two")
    if name == "dualpipe_v" and micro_batches < 2 * pipeline:
        what = f"{micro_batches} micro-batches for the {2 * pipeline} stages of dualpipe_v"
        todo = f"at least {2 * pipeline}, or take zbv"
        raise ConfigError(what, where="schedule dualpipe_v", todo=todo)
    if name in ("interleaved", "zero_bubble"):
        rounds = max(1, micro_batches // pipeline)
        if micro_batches % rounds:
            near = micro_batches - micro_batches % rounds
            what = f"{micro_batches} micro-batches do not make {rounds} equal rounds over {pipeline} ranks"
            raise ConfigError(what, where=f"schedule {name}", todo=f"take {near} or {near + rounds} micro-batches")


def _one_f_one_b(pipeline: int, micro_batches: int, rank: int) -> list[Action]:
    """Warm up with as many forwards as ranks follow, then one of each, then the backwards that are left."""
    warmup = min(pipeline - 1 - rank, micro_batches)
    actions = [Action("F", rank, number) for number in range(warmup)]
    for number in range(micro_batches - warmup):
        actions += [Action("F", rank, warmup + number), Action("B", rank, number)]
    return actions + [Action("B", rank, number) for number in range(micro_batches - warmup, micro_batches)]


def _interleaved(pipeline: int, micro_batches: int, chunks: int, rank: int, split: bool) -> list[Action]:
    """Interleaved 1F1B, or (``split``) its zero-bubble form, in which W is put off by ``rank`` backwards.

    Micro-batches go through a rank's stages in rounds of about ``pipeline``. A rank is two forwards ahead for each hop
    to the last rank, one where the backward is split, since inputs' gradients come back sooner.
    """
    per_round = micro_batches // max(1, micro_batches // pipeline)
    total = chunks * micro_batches
    warmup = min((chunks - 1) * per_round + (1 if split else 2) * (pipeline - 1 - rank), total)
    counts: defaultdict[tuple[str, int], int] = defaultdict(int)
    actions: list[Action] = []

    def add(kind: Kind, chunk: int) -> None:
        stage = chunk * pipeline + rank
        actions.append(Action(kind, stage, counts[kind, stage]))
        counts[kind, stage] += 1

    backwards: deque[int] = deque()  # chunks whose W is still to come
    for step in range(warmup + total):
        if step < total:
            add("F", step // per_round % chunks)
        if step >= warmup:
            chunk = chunks - 1 - (step - warmup) // per_round % chunks
            add("I" if split else "B", chunk)
            backwards.append(chunk)
            if split and step - warmup >= rank:
                add("W", backwards.popleft())
    while split and backwards:
        add("W", backwards.popleft())
    return actions


def _zbv(pipeline: int, micro_batches: int, rank: int) -> list[Action]:
    """ZB-V: without a gap where F, I and W take equally long; micro-batches beyond the last are left out."""
    number = max(2 * pipeline - 1, micro_batches)  # the table needs as many; what is too much falls out below
    stages = (rank, 2 * pipeline - 1 - rank)
    counts: defaultdict[tuple[str, int], int] = defaultdict(int)
    actions: list[Action] = []

    def add(*steps: tuple[Kind, int]) -> None:
        for kind, arm in steps:
            actions.append(Action(kind, stages[arm], counts[kind, arm]))
            counts[kind, arm] += 1

    for _ in range(2 * (pipeline - rank) - 1):
        add(("F", 0))
    for _ in range(rank):
        add(("F", 1), ("F", 0))
    for _ in range(pipeline - rank):
        add(("F", 1), ("I", 1), ("W", 1))
    while counts["F", 1] < counts["F", 0] or counts["F", 0] < number:
        if counts["F", 0] < number:
            add(("F", 0))
        add(("I", 0), ("W", 0), ("F", 1), ("I", 1), ("W", 1))
    for _ in range(rank):
        add(("I", 0), ("I", 1))
    for _ in range(pipeline - rank):
        add(("I", 0), ("W", 0))
    for arm in (1, 0):
        while counts["W", arm] < counts["I", arm]:
            add(("W", arm))
    return [action for action in actions if action.micro_batch < micro_batches]


class _DualPipeV:
    """The eight steps of DualPipeV for one rank, as deepseek-ai/DualPipe numbers them."""

    def __init__(self, pipeline: int, rank: int) -> None:
        self.pipeline, self.rank = pipeline, rank
        self.stages = (rank, 2 * pipeline - 1 - rank)
        self.table: list[Action] = []
        self.forwards, self.backwards = [0, 0], [0, 0]
        self.weights: deque[tuple[int, int]] = deque()  # stage and micro-batch of each W still to come

    def forward(self, arm: int) -> None:
        """F of the next micro-batch."""
        self.table.append(Action("F", self.stages[arm], self.forwards[arm]))
        self.forwards[arm] += 1

    def backward(self, arm: int, split: bool = False) -> None:
        """B of the next micro-batch; ``split``: I alone, its W later."""
        self.table.append(Action("I" if split else "B", self.stages[arm], self.backwards[arm]))
        if split:
            self.weights.append((self.stages[arm], self.backwards[arm]))
        self.backwards[arm] += 1

    def overlap(self, forward: int, backward: int) -> None:
        """F of one arm and B of the other at once."""
        ends = (self.stages[forward], self.forwards[forward], self.stages[backward], self.backwards[backward])
        self.table.append(Action("FB", *ends))
        self.forwards[forward] += 1
        self.backwards[backward] += 1

    def weight(self) -> None:
        """The oldest W that was put off, if there is one."""
        if self.weights:
            self.table.append(Action("W", *self.weights.popleft()))

    def actions(self, micro_batches: int) -> list[Action]:
        """The rank's table."""
        after = self.pipeline - self.rank - 1  # ranks that follow
        for _ in range(2 * after):
            self.forward(0)
        for _ in range(self.rank + 1):
            self.forward(0)
            self.forward(1)
        for _ in range(after):
            self.backward(1, split=True)
            self.weight()
            self.forward(1)
        for number in range(micro_batches - 2 * self.pipeline + self.rank + 1):
            if number == 0 and after == 0:  # apart: the bubble is smaller so
                self.forward(0)
                self.backward(1)
            else:
                self.overlap(0, 1)
            self.overlap(1, 0)
        for _ in range(after):
            self.backward(1)
            self.overlap(1, 0)
        self._cool_down(after)
        return self.table

    def _cool_down(self, after: int) -> None:
        """The last backwards; the second half of them are split, so that their W fill what is left of the gaps."""
        half, odd, split = (self.rank + 1) // 2, self.rank % 2 == 1, False
        for number in range(self.rank + 1):
            split = split or (number == half and odd)
            self.backward(1, split)
            split = split or (number == half and not odd)
            self.backward(0, split)
        for _ in range(after):
            self.weight()
            self.backward(0, split)
        for _ in range(self.rank + 1):
            self.weight()

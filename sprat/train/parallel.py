"""Data parallelism: each worker takes rows through the whole model, and gradients are added up.

``Parallel`` is all that a step knows of it; ``ThreadDataParallel`` are threads, and one thread is no parallelism.

Torch's own way to use two cores is to split every operation. For a small model that is a poor bargain: an
operation of 100 microseconds is split, joined, and the next one waits for the slower half, some 1,500 times a
step; what cannot be split (sorting, gathering, Python itself) leaves a core idle; and where a neighbor takes a
core away, every join waits for it. So the batch is split instead, once a step: each thread runs forward and
backward on its rows with its own autograd graph, and only the finished gradients meet. Torch lets go of
Python's lock inside operations and in the backward pass, so threads suffice and weights are shared for nothing.

Gradients are added in the order of the threads, so equal numbers give equal bits. Left out: more than four threads
of this kind, since the lock is held long enough to make a fifth wait; cores beyond that split operations after all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from sprat.data.loader import Batch

MAX_WORKERS = 4

Item = TypeVar("Item")
Result = TypeVar("Result")
Rows = TypeVar("Rows", Batch, Tensor)


@dataclass
class Share:
    """What some rows of a step give; ``+=`` adds the share of others, and those of all rows are the step's.

    Attributes:
        grads: of each parameter, None where the loss did not reach it; owned by this share, and added to in place.
        metrics: plain numbers for the log.
        expert_loads: load_E of each MoE layer that ran.
    """

    grads: Sequence[Tensor | None]
    metrics: dict[str, float]
    expert_loads: list[Tensor]

    def __iadd__(self, other: Share) -> Self:
        both = [(a, b) for a, b in zip(self.grads, other.grads, strict=True) if a is not None and b is not None]
        self.grads = [b if a is None else a for a, b in zip(self.grads, other.grads, strict=True)]
        if both:
            torch._foreach_add_([a for a, _ in both], [b for _, b in both])
        for name, value in other.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value
        self.expert_loads = [a + b for a, b in zip(self.expert_loads, other.expert_loads, strict=True)]
        return self


class Parallel(AbstractContextManager["Parallel"], Protocol):
    """Who does a step together.

    ``world`` processes each draw the rows of their ``rank``, cut them into parts by ``split``, work on the parts at
    once by ``map``, and get by ``sum`` what the parts of all of them add up to: equal numbers, in equal order, in every
    process. Work is done inside the context.
    """

    rank: int
    world: int

    def split(self, rows: Rows) -> list[Rows]:
        """The parts of ``rows`` that are worked on at once in this process; at least one row each."""

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """``work`` of each item, in order. An error of any is raised."""

    def sum(self, shares: Iterable[Share]) -> Share:
        """What ``shares`` and those of the other processes add up to."""


class ThreadDataParallel:
    """``size`` threads of one process, of which the caller's is one; the caller's torch uses its share of cores only.

    Args:
        threads: how many cores to use; None for torch's number. There are at most ``MAX_WORKERS`` threads, which
            share the cores evenly.

    Raises:
        ValueError: ``threads`` is less than 1.
    """

    rank, world = 0, 1

    def __init__(self, threads: int | None = None) -> None:
        self._threads = torch.get_num_threads() if threads is None else threads
        if self._threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self.size = min(MAX_WORKERS, self._threads)
        self._inner = max(1, self._threads // self.size)
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        self._before = torch.get_num_threads()
        if self.size > 1:
            self._pool = ThreadPoolExecutor(self.size - 1, "data-parallel", torch.set_num_threads, (self._inner,))
            torch.set_num_threads(self._inner)
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
            torch.set_num_threads(self._before)

    def split(self, rows: Rows) -> list[Rows]:
        """One part for each thread, as even as can be, the later ones larger; fewer where there are fewer rows."""
        if (parts := min(self.size, len(rows))) <= 1:
            return [rows][:parts]
        return [rows[a:b] for a, b in pairwise(len(rows) * part // parts for part in range(parts + 1))]

    def sum(self, shares: Iterable[Share]) -> Share:
        """The first of ``shares`` with the others added in order."""
        return reduce(operator.iadd, shares)

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """``work`` of each item, in order; the caller does the first share itself. An error of any is raised."""
        if self._pool is None or len(items) < 2:
            return [work(item) for item in items]
        others = [self._pool.submit(work, item) for item in items[1:]]
        try:
            first = work(items[0])
        finally:
            errors = [other.exception() for other in others]  # wait for all: nobody may work on what we then move
        for error in errors:
            if error is not None:
                raise error
        return [first, *(other.result() for other in others)]

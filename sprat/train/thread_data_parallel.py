"""Data parallelism over threads: each takes rows through the whole model, and gradients are added up.

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

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

MAX_WORKERS = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


class ThreadDataParallel:
    """``size`` threads, of which the caller's is one; a context, in which the caller's torch uses its share only.

    Args:
        threads: how many cores to use; None for torch's number. There are at most ``MAX_WORKERS`` threads, which
            share the cores evenly.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or torch.get_num_threads()
        self.size = min(MAX_WORKERS, self._threads)
        self._inner = max(1, self._threads // self.size)
        self._before = self._threads
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        self._before = torch.get_num_threads()
        if self.size > 1:
            inner = self._inner
            self._pool = ThreadPoolExecutor(
                self.size - 1, "data-parallel", initializer=lambda: torch.set_num_threads(inner)
            )
            torch.set_num_threads(inner)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
            torch.set_num_threads(self._before)

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

"""What one step computes, as the scheduler decided it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sprat.engine.sequence import Sequence

FEW = 16
At = list[int] | NDArray[np.int64]  # slots as an index; a list where they are few


def add_at(array_S: NDArray[Any], at: At, by: int | list[int]) -> None:
    """``array_S[at] += by``; for a few places one by one, see ``Plan``."""
    if not isinstance(at, list):
        array_S[at] += by
    elif isinstance(by, int):
        for place in at:
            array_S[place] += by
    else:
        for place, more in zip(at, by, strict=True):
            array_S[place] += more


def put_at(array_S: NDArray[Any], at: At, values: list[int]) -> None:
    """``array_S[at] = values``."""
    if isinstance(at, list):
        for place, value in zip(at, values, strict=True):
            array_S[place] = value
    else:
        array_S[at] = values


def places(count: int) -> At:
    """The first ``count`` places as an index."""
    return list(range(count)) if count <= FEW else np.arange(count)


@dataclass(frozen=True)
class Chunk:
    """``count`` tokens of a prompt from ``start`` on; ``last``: the prompt ends with them."""

    sequence: Sequence
    start: int
    count: int
    last: bool


@dataclass(slots=True)
class Plan:
    """One step: the decoding rows, with their slots in the same order, drafts by slot, and pieces of prompts.

    ``at`` are the slots as an index. The weights of a step wash all else out of the processor's caches, and then
    numpy's way into an operation on whole arrays takes 50 µs, a fiftieth of a small model's step: few rows go one by
    one.
    """

    rows: list[Sequence]
    slots_S: NDArray[np.int64]
    at: At
    chunks: list[Chunk]
    drafts: dict[int, list[int]]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.rows and not self.chunks

"""What one step computes, as the scheduler decided it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sprat.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """``count`` tokens of a prompt from ``start`` on; ``last``: the prompt ends with them."""

    sequence: Sequence
    start: int
    count: int
    last: bool


@dataclass
class Plan:
    """One step: the decoding rows, with their slots in the same order, drafts by slot, and pieces of prompts."""

    rows: list[Sequence]
    slots_S: NDArray[np.int64]
    chunks: list[Chunk]
    drafts: dict[int, list[int]]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.rows and not self.chunks

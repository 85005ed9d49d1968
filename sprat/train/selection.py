"""Which evaluation was the best so far, and when to stop because none gets better (early stopping).

All that is known follows from the rows of ``metrics.jsonl``, so a run that goes on after a kill replays them and knows
the same. The best step's checkpoint is whole before the next is written, and stays while others are removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


class Selection:
    """The best evaluation by one score.

    Args:
        metric: what ``evaluate`` calls it, without the ``eval_`` of the log.
        higher: more is better; else less.
        keep: the checkpoint of the best step is to stay.
        patience: stop after so many evaluations in a row without improvement; 0: never.
        min_delta: by how much a score must be better to count as an improvement; for ``patience`` alone, since the
            best is the best.
        evaluate_last: the last step is evaluated too, whatever its number.

    Attributes:
        step, value: of the best evaluation; None before the first.
    """

    def __init__(
        self,
        metric: str = "loss",
        *,
        higher: bool = False,
        keep: bool = False,
        patience: int = 0,
        min_delta: float = 0.0,
        evaluate_last: bool = False,
    ) -> None:
        self.metric, self.keep, self.evaluate_last = metric, keep, evaluate_last
        self._sign, self._patience, self._min_delta = 1 if higher else -1, patience, min_delta
        self.replay(())

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Forget all and take over the rows of a log; its row of step 0 is of no training and does not count."""
        self.step: int | None = None
        self.value: float | None = None
        self._reference, self._waited = -math.inf, 0
        for row in rows:
            if row["step"] > 0:
                self.add(int(row["step"]), row)

    def add(self, step: int, row: Mapping[str, Any]) -> bool:
        """Take in what was logged after ``step``; whether it is the best so far."""
        value = row.get(f"eval_{self.metric}")
        if not isinstance(value, int | float):
            return False
        score = self._sign * value
        is_best = self.value is None or score > self._sign * self.value
        if is_best:
            self.step, self.value = step, float(value)
        if score > self._reference and score - self._reference >= self._min_delta:
            self._reference, self._waited = score, 0
        else:
            self._waited += 1
        return is_best

    def is_better_than(self, value: float) -> bool:
        """Whether the best evaluation is better than ``value``, a score of the same metric."""
        return self.value is not None and self._sign * self.value > self._sign * value

    @property
    def protected_step(self) -> int | None:
        """The step whose checkpoint is not to be removed."""
        return self.step if self.keep else None

    @property
    def is_exhausted(self) -> bool:
        """Whether it is time to stop."""
        return 0 < self._patience <= self._waited

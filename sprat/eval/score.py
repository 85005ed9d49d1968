"""Scores and how sure they are: accuracy with its interval, a test of two, pass@k, bits per byte. Without torch.

An accuracy from n problems is an estimate; here it never travels without its Wilson interval (Wilson
1927; good also near 0 and 1, where the textbook interval fails). pass@k is the unbiased estimator of
Chen et al. 2021 (arXiv 2107.03374, section 2.1): from n ≥ k samples with c right ones,
``1 - C(n-c, k) / C(n, k)``. ``two_proportion_p_value`` is the pooled two-proportion z-test. Both treat the problems as
independent draws; for two models on the same problems the test is on the careful side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sprat.errors import DataError

SIGNIFICANCE_LEVEL = 0.05
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """Accuracy on one task: ``correct`` of ``count`` problems fully right, with its 95 % interval.

    ``mean`` is the mean of the judge's scores (which may be partial); ``low`` and ``high`` bound ``accuracy``;
    ``mean_tokens`` counts what the model wrote, thinking included; ``by_length`` maps the number of terms
    (where the task states one) to (correct, count); ``thought`` is the share of answers with a non-empty think.
    """

    task: str
    count: int
    correct: int
    mean: float
    low: float
    high: float
    mean_tokens: float
    thought: float = 0.0
    by_length: dict[int, tuple[int, int]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """``correct / count``."""
        return self.correct / self.count

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values (keys of ``by_length`` become strings)."""
        by_length = {str(length): list(pair) for length, pair in self.by_length.items()}
        return {**asdict(self), "by_length": by_length, "accuracy": self.accuracy}


@dataclass(frozen=True)
class StageScore(Score):
    """A stage's score as its run notes it: asked in one ``mode``, on a task that was ``trained`` or never was."""

    mode: str = "greedy"
    trained: bool = True

    @property
    def untrained_lengths(self) -> frozenset[int]:
        """Lengths that were never trained."""
        return frozenset(() if self.trained else self.by_length)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the mode is called ``label``."""
        row = super().to_dict()
        return {"label": row.pop("mode"), **row}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> StageScore:
        """Read ``to_dict``; what is missing follows from the counts, and ``mean_tokens`` is 0 where it is not told.

        Raises:
            KeyError, TypeError, ValueError, DataError: it is not what ``to_dict`` writes.
        """
        count, correct = int(row["count"]), int(row["correct"])
        low, high = wilson_interval(correct, count)
        by_length = {int(length): (int(c), int(n)) for length, (c, n) in (row.get("by_length") or {}).items()}
        return cls(
            task=str(row["task"]),
            count=count,
            correct=correct,
            mean=float(row.get("mean", correct / count)),
            low=float(row.get("low", low)),
            high=float(row.get("high", high)),
            mean_tokens=float(row.get("mean_tokens") or 0.0),
            thought=float(row.get("thought") or 0.0),
            by_length=dict(sorted(by_length.items())),
            samples=list(row.get("samples") or []),
            mode=str(row.get("label", "greedy")),
            trained=bool(row.get("trained", True)),
        )


def wilson_interval(correct: float, count: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion; ``correct`` may be a sum of shares.

    >>> [round(bound, 4) for bound in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    if not 0 <= correct <= count or count == 0:
        raise DataError(f"cannot score {correct} of {count}", where="wilson", todo="evaluate at least one problem")
    proportion = correct / count
    center = (proportion + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(proportion * (1 - proportion) / count + z * z / (4 * count * count))
    return max(0.0, center - half), min(1.0, center + half)


def pool_scores(scores: Sequence[Score]) -> Score:
    """All problems of ``scores`` as one score."""
    count, correct = sum(score.count for score in scores), sum(score.correct for score in scores)
    return Score("all", count, correct, correct / count, *wilson_interval(correct, count), mean_tokens=0.0)


def two_proportion_p_value(a: Score, b: Score) -> float:
    """Two-sided p-value that both scores have the same underlying accuracy (pooled z-test); 1.0 when equal."""
    pooled = (a.correct + b.correct) / (a.count + b.count)
    std_error = math.sqrt(pooled * (1 - pooled) * (1 / a.count + 1 / b.count))
    return 1.0 if std_error == 0 else math.erfc(abs(a.accuracy - b.accuracy) / std_error / math.sqrt(2))


def estimate_pass_at_k(total: int, correct: int, k: int) -> float:
    """Unbiased pass@k from ``total`` samples of one problem.

    >>> estimate_pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= total:
        raise DataError(f"pass@{k} needs at least {k} samples, got {total}", where="pass_at_k", todo="sample more")
    return 1.0 - math.comb(total - correct, k) / math.comb(total, k)


@dataclass(frozen=True)
class HeldOutScores:
    """How well one held-out text is predicted, in bits per byte.

    Attributes:
        bytes: UTF-8 bytes of the text.
        baselines: by name, as ``sprat.data.baselines`` measures them; runs made before hold "trigram" and "gzip".
        model: of a trained model; None where there is none yet.
    """

    bytes: int
    baselines: Mapping[str, float]
    model: float | None = None

    @property
    def best_baseline(self) -> str:
        """The name of the baseline that predicts best; empty where there is none."""
        return min(self.baselines, key=self.baselines.__getitem__, default="")

    def to_dict(self) -> dict[str, float]:
        """Plain JSON values."""
        model = {} if self.model is None else {"model": self.model}
        return {**self.baselines, "bytes": self.bytes, **model}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> HeldOutScores:
        """Read ``to_dict``, also from before all of its baselines were measured.

        Raises:
            TypeError, ValueError: it is not what ``to_dict`` writes.
        """
        baselines = {str(name): float(value) for name, value in row.items() if name not in ("bytes", "model")}
        model = row.get("model")
        return cls(int(row.get("bytes") or 0), baselines, None if model is None else float(model))

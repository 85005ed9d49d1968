r"""Two models on the same problems: what each problem says about the difference counts, not two accuracies apart.

Most problems are easy or hard for both models and say nothing about which is better. So the p-value looks only at the
problems where they differ: under "no difference" each is a fair coin, an exact two-sided sign test. With one sample a
problem that is McNemar's exact test (McNemar 1947). The interval of the difference is Newcombe's square-and-add one for
paired proportions (Newcombe 1998, Statistics in Medicine 17:2635, method 8): from the Wilson intervals of both
accuracies and the correlation of the two models over problems, without the textbook interval's collapse to a point
where no problem differs. With several samples a problem's score is its share of right ones; a share varies no more than
a coin of its mean, so the interval errs on the wide side. Without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sprat.errors import DataError
from sprat.eval.score import wilson_interval
from sprat.eval.task_score import TaskScore
from sprat.files.json import load_json_object


@dataclass(frozen=True)
class Comparison:
    """The second model against the first on one task.

    Attributes:
        count: problems that both were asked.
        first, second: mean share of right answers, 0 to 1.
        difference: ``second - first``, with its 95 % interval ``low`` to ``high``.
        first_better, second_better: problems on which either has the larger share of right answers.
        p_value: two-sided, of the sign test; with one sample of each problem McNemar's exact test.
        test: which of the two it is.
    """

    task: str
    count: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    first_better: int
    second_better: int
    p_value: float
    test: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def sign_test_p_value(wins: int, losses: int) -> float:
    """Two-sided exact p-value of ``wins`` against ``losses`` under a fair coin; 1.0 where there is neither.

    With one sample a problem, McNemar's exact test of its discordant pairs (McNemar 1947).

    >>> sign_test_p_value(1, 9)
    0.021484375
    """
    total = wins + losses
    if min(wins, losses) < 0:
        raise DataError(f"{wins} wins and {losses} losses", where="sign_test", todo="count from 0")
    term = tail = 1
    for k in range(min(wins, losses)):  # binomial coefficients, each from the one before
        term = term * (total - k) // (k + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**total))  # both are integers, so that nothing overflows


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """95 % interval of ``mean(second) - mean(first)``, the shares (0 to 1) of two models on the same problems.

    Source: Newcombe 1998, Statistics in Medicine 17:2635, method 8.

    >>> low, high = paired_interval([1.0] * 8 + [0.0] * 2, [1.0] * 10)
    >>> round(low, 3), round(high, 3)
    (-0.112, 0.51)
    """
    count = len(first)
    if count != len(second) or not count:
        raise DataError("nothing to pair", where="paired_interval", todo="give both models the same problems")
    a, b = math.fsum(first) / count, math.fsum(second) / count
    (a_low, a_high), (b_low, b_high) = wilson_interval(a * count, count), wilson_interval(b * count, count)
    correlation = _correlation(first, second, a, b)
    below = (b - b_low) ** 2 - 2 * correlation * (b - b_low) * (a_high - a) + (a_high - a) ** 2
    above = (b_high - b) ** 2 - 2 * correlation * (b_high - b) * (a - a_low) + (a - a_low) ** 2
    difference = b - a
    return max(-1.0, difference - math.sqrt(max(0.0, below))), min(1.0, difference + math.sqrt(max(0.0, above)))


def compare(first: TaskScore, second: TaskScore) -> Comparison:
    """The second model against the first, problem by problem.

    Raises:
        DataError: they were not asked the same problems of the same file.
    """
    where, todo = f"task {first.task}", "evaluate both models with the same file"
    if first.task != second.task or first.digest != second.digest:
        raise DataError("the two were asked from different files", where=where, todo=todo)
    first_shares = {(problem.id, problem.digest): problem.share for problem in first.problems}
    second_shares = {(problem.id, problem.digest): problem.share for problem in second.problems}
    if first_shares.keys() != second_shares.keys():
        raise DataError("the two were asked different problems", where=where, todo=todo)
    a, b = list(first_shares.values()), [second_shares[key] for key in first_shares]
    low, high = paired_interval(a, b)
    wins, losses = sum(y > x for x, y in zip(a, b, strict=True)), sum(y < x for x, y in zip(a, b, strict=True))
    return Comparison(
        task=first.task,
        count=len(a),
        first=first.accuracy,
        second=second.accuracy,
        difference=second.accuracy - first.accuracy,
        low=low,
        high=high,
        first_better=losses,
        second_better=wins,
        p_value=sign_test_p_value(wins, losses),
        test="McNemar, exact" if first.samples == second.samples == 1 else "sign test, exact",
    )


def compare_score_files(first: str | Path, second: str | Path) -> list[Comparison]:
    """The second file of scores against the first, for each task that both hold, in the order of the first.

    Args:
        first, second: JSON objects with ``scores``, a list of ``TaskScore.to_dict()``.

    Raises:
        DataError: a file is missing or no such file, no task is in both, or ``compare`` refuses.
    """
    first_scores, second_scores = read_scores(first), read_scores(second)
    shared = [task for task in first_scores if task in second_scores]
    if not shared:
        what = "no task is in both files"
        raise DataError(what, where=f"{first}, {second}", todo="evaluate both models with the same files")
    return [compare(first_scores[task], second_scores[task]) for task in shared]


def read_scores(path: str | Path) -> dict[str, TaskScore]:
    """The scores in a JSON file, by task.

    Raises:
        DataError: there is none, or it holds none.
    """
    todo = "give the JSON that an evaluation of task files printed"
    try:
        content = load_json_object(Path(path), DataError, problem="no file of scores", todo=todo)
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), todo=todo) from None
    rows = content.get("scores")
    try:
        if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
            raise TypeError("no scores in it")
        scores = [TaskScore.from_dict(row) for row in rows]
    except KeyError as error:
        raise DataError(f"a score without {error}", where=str(path), todo=todo) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"no file of scores: {error}", where=str(path), todo=todo) from None
    if len({score.task for score in scores}) < len(scores):
        raise DataError("a task stands in it twice", where=str(path), todo="give each task a name of its own")
    return {score.task: score for score in scores}


def _correlation(first: Sequence[float], second: Sequence[float], a: float, b: float) -> float:
    """Pearson's correlation, with means ``a`` and ``b``; 0 where one of them never varies."""
    covariance = math.fsum((x - a) * (y - b) for x, y in zip(first, second, strict=True))
    variances = math.fsum((x - a) ** 2 for x in first) * math.fsum((y - b) ** 2 for y in second)
    return covariance / math.sqrt(variances) if variances > 0 else 0.0

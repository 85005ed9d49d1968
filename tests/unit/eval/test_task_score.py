"""A task's score keeps every problem, and its pass@k is what drawing k of the samples would give."""

from __future__ import annotations

import itertools
import json

import pytest

from sprat.errors import DataError
from sprat.eval.score import wilson_interval
from sprat.eval.task_score import ProblemScore, TaskScore


def score(*correct: int, samples: int = 1) -> TaskScore:
    return TaskScore("t", "d", tuple(ProblemScore(str(n), c, samples, 3.0 + n) for n, c in enumerate(correct)))


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_answer(samples: int) -> None:
    for correct in range(samples + 1):
        flags = [index < correct for index in range(samples)]
        for k in range(1, samples + 1):
            subsets = [any(subset) for subset in itertools.combinations(flags, k)]
            expected = sum(subsets) / len(subsets)
            assert score(correct, samples=samples).pass_at_k(k) == pytest.approx(expected, abs=1e-12)
            both = score(correct, 0, samples=samples).pass_at_k(k)
            assert both == pytest.approx(expected / 2, abs=1e-12)


def test_pass_at_k_is_exact_for_thousands_of_samples() -> None:
    assert score(1, samples=10_000).pass_at_k(5_000) == pytest.approx(0.5, abs=1e-12)
    assert score(1, samples=10_000).pass_at_k(1) == pytest.approx(1e-4, rel=1e-9)
    assert score(10_000, samples=10_000).pass_at_k(1) == 1.0 and score(0, samples=10_000).pass_at_k(9_999) == 0.0


def test_samples_of_one_problem_make_the_interval_no_narrower() -> None:
    assert score(1, 0, 1, 1).interval == wilson_interval(3, 4)
    assert score(8, 0, 8, 8, samples=8).interval == wilson_interval(3, 4)
    assert score(4, 4, samples=8).accuracy == 0.5 and score(1, 0, 1).mean_tokens == 4.0


def test_a_score_outlives_its_json() -> None:
    problems = (ProblemScore("a", 1, 4, 2.5, "q", ("seven",)), ProblemScore("b", 4, 4, 1.0))
    before = TaskScore("t", "d", problems, cut=0.25, thought=0.5, faults=1)
    row = json.loads(json.dumps(before.to_dict()))
    assert TaskScore.from_dict(row) == before
    assert row["accuracy"] == 0.625 and row["pass_at_k"] == {"1": 0.625, "2": 0.75, "4": 1.0}
    assert "62.5% of 2" in str(before) and "pass@4 100.0%" in str(before) and "25% cut off" in str(before)


@pytest.mark.parametrize(
    "problems",
    [
        (),
        (ProblemScore("a", 1, 1, 1.0), ProblemScore("a", 1, 1, 1.0)),
        (ProblemScore("a", 1, 1, 1.0), ProblemScore("b", 1, 2, 1.0)),
    ],
)
def test_what_is_no_score_is_refused(problems: tuple[ProblemScore, ...]) -> None:
    with pytest.raises(DataError):
        TaskScore("t", "d", problems)


@pytest.mark.parametrize(("correct", "samples"), [(2, 1), (-1, 1), (0, 0), (1, 10_001)])
def test_more_right_than_asked_is_refused(correct: int, samples: int) -> None:
    with pytest.raises(DataError):
        ProblemScore("a", correct, samples, 1.0)


def test_pass_at_more_than_was_sampled_is_refused() -> None:
    with pytest.raises(DataError, match="pass@3"):
        score(1, samples=2).pass_at_k(3)

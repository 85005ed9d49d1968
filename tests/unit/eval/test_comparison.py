"""Two models on the same problems: the test is exact, the interval holds what it promises."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from sprat.errors import DataError
from sprat.eval.comparison import compare, compare_score_files, paired_interval, sign_test_p_value
from sprat.eval.task_score import ProblemScore, TaskScore


def score(*correct: int, samples: int = 1, task: str = "t", digest: str = "d") -> TaskScore:
    return TaskScore(task, digest, tuple(ProblemScore(str(n), c, samples, 1.0) for n, c in enumerate(correct)))


@pytest.mark.parametrize(
    ("wins", "losses", "numerator", "denominator"),  # of two tails of Pascal's triangle, by hand
    [
        (0, 0, 1, 1),
        (0, 1, 1, 1),
        (5, 5, 1, 1),
        (0, 5, 2, 32),
        (6, 0, 2, 64),
        (1, 9, 2 * (1 + 10), 1024),
        (10, 2, 2 * (1 + 12 + 66), 4096),
        (3, 12, 2 * (1 + 15 + 105 + 455), 32768),
    ],
)
def test_the_p_value_is_mcnemars(wins: int, losses: int, numerator: int, denominator: int) -> None:
    assert sign_test_p_value(wins, losses) == pytest.approx(numerator / denominator, rel=1e-12)


def test_the_p_value_is_the_binomial_tests() -> None:
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in itertools.product([0, 1, 2, 7, 40, 300], repeat=2):
        if wins + losses:
            expected = stats.binomtest(wins, wins + losses).pvalue
            assert sign_test_p_value(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_thousands_of_problems_do_not_overflow() -> None:
    z = (5_200 - 4_800 - 1) / math.sqrt(10_000)  # the normal approximation with its correction is good here
    assert sign_test_p_value(5_200, 4_800) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)


@pytest.mark.parametrize(
    "cells",  # both right, only the first, only the second, none
    [
        (0.4, 0.1, 0.2, 0.3),
        (0.7, 0.05, 0.05, 0.2),
        (0.25, 0.25, 0.25, 0.25),
        (0.1, 0.0, 0.6, 0.3),
        (0.8, 0.02, 0.1, 0.08),
    ],
)
def test_the_interval_holds_the_truth_about_95_times_in_100(cells: tuple[float, ...]) -> None:
    count, truth, coverage = 16, cells[2] - cells[1], 0.0
    for both, first, second in itertools.product(range(count + 1), repeat=3):
        none = count - both - first - second
        if none < 0:
            continue
        ways = math.factorial(count) / math.prod(map(math.factorial, (both, first, second, none)))
        probability = ways * math.prod(p**n for p, n in zip(cells, (both, first, second, none), strict=True))
        a = [1.0] * (both + first) + [0.0] * (second + none)
        b = [1.0] * both + [0.0] * first + [1.0] * second + [0.0] * none
        low, high = paired_interval(a, b)
        coverage += probability * (low <= truth <= high)
    assert 0.92 <= coverage <= 0.995


def test_equal_models_have_an_interval_and_not_a_point() -> None:
    low, high = paired_interval([1.0] * 20, [1.0] * 20)
    assert low == pytest.approx(-high) and -0.25 < low < -0.1
    low, high = paired_interval([1.0, 0.0] * 10, [1.0, 0.0] * 10)
    assert low == pytest.approx(-high, abs=1e-9)


def test_pairs_say_more_than_two_accuracies() -> None:
    first = [1.0] * 50 + [0.0] * 50
    better, shuffled = [1.0] * 60 + [0.0] * 40, [0.0] * 40 + [1.0] * 60
    narrow, wide = paired_interval(first, better), paired_interval(first, shuffled)
    assert narrow[0] > 0 > wide[0] and narrow[1] - narrow[0] < wide[1] - wide[0]


def test_the_second_model_is_held_against_the_first_problem_by_problem() -> None:
    result = compare(score(1, 1, 0, 0, 0, 1), score(1, 0, 1, 1, 1, 1))
    assert (result.count, result.first_better, result.second_better) == (6, 1, 3)
    assert result.difference == pytest.approx(2 / 6) and result.low <= result.difference <= result.high
    assert result.p_value == pytest.approx(2 * (1 + 4) / 16) and result.test == "McNemar, exact"
    several = compare(score(4, 0, 2, samples=4), score(1, 0, 3, samples=4))
    assert several.test == "sign test, exact" and (several.first_better, several.second_better) == (1, 1)


@pytest.mark.parametrize(
    "other",
    [score(1, 1, task="u"), score(1, 1, digest="e"), score(1), score(1, 1, 1)],
    ids=["task", "file", "few", "more"],
)
def test_what_was_asked_differently_is_not_compared(other: TaskScore) -> None:
    with pytest.raises(DataError, match="different"):
        compare(score(1, 1), other)


def test_a_class_that_asks_at_random_is_noticed() -> None:
    first, second = (TaskScore("t", "d", (ProblemScore("0", 1, 1, 1.0, digest),)) for digest in ("a", "b"))
    with pytest.raises(DataError, match="different problems"):
        compare(first, second)


def test_files_of_scores_are_compared_by_task(tmp_path: Path) -> None:
    def write(name: str, *scores: TaskScore) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps({"model": name, "scores": [one.to_dict() for one in scores]}), encoding="utf-8")
        return path

    first = write("a.json", score(1, 0), score(1, 1, task="u"), score(1, task="only here"))
    second = write("b.json", score(0, 0, task="u"), score(1, 1))
    assert [(row.task, row.difference) for row in compare_score_files(first, second)] == [("t", 0.5), ("u", -1.0)]
    with pytest.raises(DataError, match="no task is in both"):
        compare_score_files(write("c.json", score(1, task="c")), second)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"scores": []}', '{"scores": [1]}', '{"scores": [{"task": "t"}]}', '{"scores": {"a": 1}}']
    + [json.dumps({"scores": [{"task": "t", "digest": "d", "problems": problems}]}) for problems in (1, [], [{}], [1])],
)
def test_what_is_no_file_of_scores_is_one_sentence(content: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        compare_score_files(path, path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        compare_score_files(tmp_path / "none.json", path)


def test_nothing_is_paired_with_nothing() -> None:
    shares: list[Any] = [[], [1.0]]
    with pytest.raises(DataError):
        paired_interval(*shares)
    with pytest.raises(DataError):
        sign_test_p_value(-1, 2)

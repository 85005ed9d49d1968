"""A score says how sure it is, and pass@k is what it claims to be."""

from __future__ import annotations

import itertools

import pytest

from sprat.errors import DataError
from sprat.eval.score import Score, estimate_pass_at_k, two_proportion_p_value, wilson_interval


def score(correct: int, count: int) -> Score:
    return Score("t", count, correct, correct / count, *wilson_interval(correct, count), 1.0)


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),  # Newcombe 1998, table I, method 3, and the edges
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_is_wilsons(correct: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=5e-5)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    from math import comb

    p, n = 0.9, 100
    inside = [k for k in range(n + 1) if wilson_interval(k, n)[0] <= p <= wilson_interval(k, n)[1]]
    assert sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in inside) == pytest.approx(0.95, abs=0.02)


def test_nothing_evaluated_is_an_error_not_a_number() -> None:
    with pytest.raises(DataError, match="at least one"):
        wilson_interval(0, 0)


def test_two_scores_differ_significantly_only_when_they_do() -> None:
    assert two_proportion_p_value(score(50, 100), score(50, 100)) == 1.0
    assert two_proportion_p_value(score(100, 100), score(100, 100)) == 1.0
    assert two_proportion_p_value(score(60, 100), score(50, 100)) == pytest.approx(0.1552, abs=1e-4)
    assert two_proportion_p_value(score(60, 100), score(30, 100)) < 1e-4


def test_pass_at_k_is_unbiased() -> None:
    draws = [1, 1, 0, 0, 0]
    for k in (1, 2, 3, 5):
        subsets = list(itertools.combinations(draws, k))
        assert estimate_pass_at_k(5, 2, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(DataError, match="at least 6 samples"):
        estimate_pass_at_k(5, 2, 6)

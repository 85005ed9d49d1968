"""Intervals hold what they say: by simulation, and by what textbooks and other formulas give for the same counts."""

from __future__ import annotations

import math
import random

import pytest

from sprat.errors import DataError
from sprat.eval.comparison import sign_test_p_value
from sprat.eval.intervals import clustered_quantile, median, ratio_of_sums, relative_loss, share_of_sums, t_quantile


def answers(both: int, lost: int, won: int, neither: int) -> tuple[list[bool], list[bool]]:
    before = [True] * (both + lost) + [False] * (won + neither)
    return before, [True] * both + [False] * lost + [True] * won + [False] * neither


def test_students_t_is_the_table_of_any_textbook() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 9: 2.262, 15: 2.131, 29: 2.045, 120: 1.980}
    for degrees, quantile in table.items():
        assert t_quantile(degrees) == pytest.approx(quantile, abs=0.004)


def test_where_nothing_changed_the_bound_is_the_closed_form() -> None:
    """With no answer changed the score equation is ``z² r = m (1 - r)``: of m right answers z²/(m + z²) may be lost."""
    for right in (10, 100, 1000):
        loss = relative_loss(*answers(right, 0, 0, 50))
        assert loss is not None and loss.value == 0
        assert loss.high == pytest.approx(1.959964**2 / (right + 1.959964**2), rel=1e-5)


def test_no_loss_is_rejected_just_where_mcnemar_rejects_it() -> None:
    """At a ratio of 1 the statistic is McNemar's: whether 0 lies in the interval follows from the discordant pairs."""
    for lost in range(12):
        for won in range(12):
            loss = relative_loss(*answers(60, lost, won, 30))
            assert loss is not None
            significant = lost + won > 0 and (lost - won) ** 2 / (lost + won) > 1.959964**2
            assert (not loss.low <= 0 <= loss.high) == significant
            assert not significant or sign_test_p_value(won, lost) <= 0.125  # the exact test of 4 to 0


def test_an_original_that_is_never_right_has_nothing_to_lose() -> None:
    assert relative_loss([False] * 9, [True] * 9) is None
    all_lost = relative_loss([True] * 50, [False] * 50)
    assert all_lost is not None and all_lost.value == all_lost.high == 1.0 and all_lost.low > 0.9
    with pytest.raises(DataError, match="nothing to pair"):
        relative_loss([True], [])


@pytest.mark.parametrize("shares", [(0.5, 0.05, 0.02), (0.8, 0.03, 0.01), (0.3, 0.1, 0.1)])
def test_relative_loss_covers_the_truth(shares: tuple[float, float, float]) -> None:
    both, lost, won = shares
    truth, draw, covered = 1 - (both + won) / (both + lost), random.Random(3), 0
    weights = (both, lost, won, 1 - both - lost - won)
    for _ in range(600):
        kinds = draw.choices(range(4), weights, k=80)
        loss = relative_loss([kind < 2 for kind in kinds], [kind in (0, 2) for kind in kinds])
        assert loss is not None
        covered += loss.low <= truth <= loss.high
    assert covered / 600 > 0.93


def test_documents_not_tokens_are_counted() -> None:
    """Documents that differ in level: an interval over tokens would cover half as often as it says."""
    draw, covered, tokenwise = random.Random(5), 0, 0
    for _ in range(600):
        sizes = [draw.randint(10, 90) for _ in range(30)]
        levels = [draw.gauss(2.0, 0.3) for _ in sizes]
        documents = [[draw.gauss(level, 0.5) for _ in range(size)] for level, size in zip(levels, sizes, strict=True)]
        ratio = ratio_of_sums([sum(document) for document in documents], [float(size) for size in sizes])
        covered += ratio.low <= 2.0 <= ratio.high
        tokens = [token for document in documents for token in document]
        spread = math.sqrt(sum((token - ratio.value) ** 2 for token in tokens)) / len(tokens)
        tokenwise += abs(ratio.value - 2.0) <= 1.96 * spread
    assert covered / 600 > 0.92 > 0.8 > tokenwise / 600


def test_equal_sizes_give_the_textbooks_mean() -> None:
    values = [3.0, 5.0, 4.0, 8.0]
    ratio = ratio_of_sums(values, [1.0] * 4)
    half = 3.182 * math.sqrt(sum((value - 5) ** 2 for value in values) / 3 / 4)
    assert ratio.value == 5 and ratio.high - 5 == pytest.approx(half, rel=2e-3)
    assert share_of_sums([1.0, 0.0], [1.0, 1.0]).high == 1.0
    with pytest.raises(DataError, match="no interval"):
        ratio_of_sums([1.0], [1.0])


def test_quantiles_and_medians_cover_the_truth() -> None:
    draw, of_quantile, of_median = random.Random(7), 0, 0
    for _ in range(400):
        documents = [[draw.random() for _ in range(20)] for _ in range(25)]
        estimate = clustered_quantile(documents, 0.9)
        of_quantile += estimate.low <= 0.9 <= estimate.high
        middle = median([draw.random() for _ in range(15)])
        of_median += middle.low <= 0.5 <= middle.high
    assert of_quantile / 400 > 0.91 and of_median / 400 > 0.92


def test_seven_rounds_are_the_fewest_whose_range_is_enough() -> None:
    """1 - 2 / 2^n: 0.9375 of five and 0.96875 of six; of nine the second lowest will do (Conover's table)."""
    assert (median([1.0, 2, 3, 4, 5, 6]).low, median([float(n) for n in range(1, 10)]).low) == (1.0, 2.0)
    assert median([4.0]).low == median([4.0]).high == 4.0

"""A score says how sure it is, and pass@k is what it claims to be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from sprat.engine import Engine
from sprat.errors import DataError
from sprat.model import Transformer
from sprat.post.evaluate import (
    Score,
    estimate_pass_at_k,
    evaluate,
    evaluate_many,
    pass_at_k,
    score_output,
    two_proportion_p_value,
    wilson_interval,
)
from sprat.post.rl_gate import GateResult
from sprat.tokens import Tokenizer


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


def test_a_model_is_scored_with_lengths_samples_and_tokens(model: Transformer, tokenizer: Tokenizer, task: Any) -> None:
    engine = Engine(model, tokenizer, max_batch=32)
    result = evaluate(engine, task, count=20, thinking=None, max_tokens=6, samples=3)
    assert result.count == 20 and result.low <= result.accuracy <= result.high
    assert {length: total for length, (_, total) in result.by_length.items()} == {1: 10, 2: 10}
    assert sum(right for right, _ in result.by_length.values()) == result.correct
    assert len(result.samples) == 3 and result.samples[0]["expected"] == "7"
    assert 1 <= result.mean_tokens <= 6
    assert evaluate(engine, task, count=20, thinking=None, max_tokens=6, samples=3) == result


def test_tasks_scored_together_score_as_alone(model: Transformer, tokenizer: Tokenizer, task: Any) -> None:
    class Other(type(task)):  # type: ignore[misc]
        name = "other"

        def score(self, problem: Any, answer: str | None) -> float:
            return 1.0

    engine = Engine(model, tokenizer, max_batch=32)
    tasks: Sequence[Any] = [task, Other()]
    both = evaluate_many(engine, tasks, count=8, thinking=True, max_tokens=5)
    alone = [evaluate(engine, one, count=8, thinking=True, max_tokens=5) for one in tasks]
    assert both == alone
    assert both[1].accuracy == 1.0 and both[1].task == "other"


def test_pass_at_k_rises_with_k(model: Transformer, tokenizer: Tokenizer, task: Any) -> None:
    class Coin(type(task)):  # type: ignore[misc]
        def score(self, problem: Any, answer: str | None) -> float:
            return float(len(answer or "") % 2)

    engine = Engine(model, tokenizer, max_batch=64)
    one, four = (pass_at_k(engine, Coin(), k, 12, samples=8, max_tokens=6) for k in (1, 4))
    assert 0 < one < four <= 1


@pytest.mark.parametrize(
    ("text", "closed", "score"), [(" 7 ", True, 1.0), ("7", False, 0.0), ("", True, 0.0), ("8", True, 0.0)]
)
def test_an_answer_counts_only_after_a_think_that_ended(text: str, closed: bool, score: float, task: Any) -> None:
    said: Any = SimpleNamespace(text=text, closed=closed)
    assert score_output(task, task.problem("test", 0), said) == score


@pytest.mark.parametrize(
    ("forced", "direct", "p_value", "ready"),
    [(0.7, 0.5, 0.01, True), (0.7, 0.5, 0.2, False), (0.55, 0.5, 0.01, False), (0.5, 0.7, 0.01, False)],
)
def test_thinking_must_help_by_more_than_a_little_and_more_than_chance(
    forced: float, direct: float, p_value: float, ready: bool
) -> None:
    assert bool(GateResult(0.9, forced, direct, p_value, 0.5).failure) is not ready
    assert "pass@8 is 40%" in GateResult(0.4, forced, direct, p_value, 0.5).failure

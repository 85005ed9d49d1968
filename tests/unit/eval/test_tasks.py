"""A model is scored by its answers, together or alone."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from sprat.engine import Engine
from sprat.eval.tasks import evaluate, evaluate_many, pass_at_k, score_output
from sprat.model import Transformer
from sprat.tokens import Tokenizer


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

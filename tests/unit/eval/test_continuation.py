"""Loops are found by the stated rule, and the first token that differs is where it is."""

from __future__ import annotations

import random

import pytest

from sprat.engine import Engine
from sprat.errors import DataError
from sprat.eval.continuation import compare_continuations, first_divergence, has_loop
from sprat.model import Transformer
from sprat.tokens import Tokenizer


def loops_by_the_rule(ids: list[int]) -> bool:
    """The rule word by word: for some period up to 64, max(2 p, 32) tokens in a row equal the token p before."""
    for period in range(1, 65):
        needed = max(2 * period, 32)
        for start in range(period, len(ids) - needed + 1):
            if ids[start : start + needed] == ids[start - period : start - period + needed]:
                return True
    return False


def test_loops_are_what_the_rule_says() -> None:
    draw, seen = random.Random(2), set()
    for _ in range(200):
        piece = [draw.randrange(9) for _ in range(draw.choice([1, 2, 5, 20, 40, 70]))]
        ids = [draw.randrange(9) for _ in range(20)] + piece * draw.randint(1, 4) + [draw.randrange(9)]
        seen.add(has_loop(ids))
        assert has_loop(ids) == loops_by_the_rule(ids)
    assert seen == {True, False} and not has_loop([]) and not has_loop([1])


def test_the_first_token_that_differs_is_found() -> None:
    assert [first_divergence([1, 2, 3], other) for other in ([1, 2, 3], [1, 9, 3], [1], [4])] == [None, 1, 1, 0]


def test_two_models_continue_the_same_openings(
    trained_model: Transformer, model: Transformer, tokenizer: Tokenizer
) -> None:
    trained, fresh = Engine(trained_model, tokenizer, speculate="off"), Engine(model, tokenizer, speculate="off")
    prompts = [tokenizer.encode(text) for text in ("the quick brown", "past the lazy", "counts 0 1 2")]
    same = compare_continuations(trained, trained, prompts, max_tokens=40)
    assert same.diverged == 0 and same.first_divergence is None and same.loops_difference.value == 0
    differ = compare_continuations(trained, fresh, prompts, max_tokens=40)
    assert differ.diverged == 3 and differ.first_divergence is not None and differ.first_divergence.value < 10
    assert sum(differ.finish_after.values()) == 3 and differ.tokens_before <= 40
    with pytest.raises(DataError, match="no openings"):
        compare_continuations(trained, trained, [], max_tokens=4)

"""RL starts where there is something to reinforce."""

from __future__ import annotations

from typing import Any

import pytest

from sprat.config.rl import RLRunConfig
from sprat.engine import Engine
from sprat.errors import TrainingError
from sprat.model import Transformer
from sprat.post.rl import run_gate
from sprat.post.rl.gate import GateResult
from sprat.post.rl.rollout import Payer
from sprat.tasks import Problem
from sprat.tokens import Message, Tokenizer, render


@pytest.mark.parametrize(
    ("forced", "direct", "p_value", "ready"),
    [(0.7, 0.5, 0.01, True), (0.7, 0.5, 0.2, False), (0.55, 0.5, 0.01, False), (0.5, 0.7, 0.01, False)],
)
def test_thinking_must_help_by_more_than_a_little_and_more_than_chance(
    forced: float, direct: float, p_value: float, ready: bool
) -> None:
    assert bool(GateResult(0.9, forced, direct, p_value, 0.5).failure) is not ready
    assert "pass@8 is 40%" in GateResult(0.4, forced, direct, p_value, 0.5).failure


def test_a_question_that_just_leaves_room_is_asked_with_think_tags_too(
    guesser: Transformer, tokenizer: Tokenizer, task: Any
) -> None:
    config = RLRunConfig(max_tokens=8)
    room = guesser.config.context - config.max_tokens
    sevens = ("7" * count for count in range(1, room))
    longest = next(text for text in sevens if len(render(tokenizer, [Message("user", text)])) == room)
    asked = [(task, Problem(task.name, 0, longest, "7"))]
    with pytest.raises(TrainingError, match="RL would teach it not to think"):
        run_gate._check_thinking(Engine(guesser, tokenizer), asked, config, Payer(tokenizer, config))

"""RL starts where there is something to reinforce."""

from __future__ import annotations

import pytest

from sprat.post.rl.gate import GateResult


@pytest.mark.parametrize(
    ("forced", "direct", "p_value", "ready"),
    [(0.7, 0.5, 0.01, True), (0.7, 0.5, 0.2, False), (0.55, 0.5, 0.01, False), (0.5, 0.7, 0.01, False)],
)
def test_thinking_must_help_by_more_than_a_little_and_more_than_chance(
    forced: float, direct: float, p_value: float, ready: bool
) -> None:
    assert bool(GateResult(0.9, forced, direct, p_value, 0.5).failure) is not ready
    assert "pass@8 is 40%" in GateResult(0.4, forced, direct, p_value, 0.5).failure

"""Learning rates go up, hold and come down as the recipe says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.config import OptimConfig
from sprat.train.schedule import lr_factor


@settings(deadline=None)
@given(
    name=st.sampled_from(["wsd", "cosine", "constant"]),
    steps=st.integers(1, 60),
    warmup=st.integers(0, 80),
    decay=st.floats(0, 1),
    floor=st.floats(0, 1),
)
def test_no_step_is_wasted_at_rate_zero_or_overdriven(
    name: str, steps: int, warmup: int, decay: float, floor: float
) -> None:
    config = OptimConfig.model_validate(
        {"schedule": name, "warmup_steps": warmup, "decay_fraction": decay, "final_lr_fraction": floor}
    )
    factors = [lr_factor(config, step, steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in factors)
    peak = factors.index(max(factors))
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_wsd_warms_up_holds_and_falls_to_its_floor() -> None:
    config = OptimConfig(schedule="wsd", warmup_steps=4, decay_fraction=0.5, final_lr_fraction=0.2)
    factors = [lr_factor(config, step, 20) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(factors[4:11]) == {1.0}
    assert factors[-1] == pytest.approx(0.2 + 0.8 * 0.1)


def test_the_fall_takes_its_share_of_the_run() -> None:
    config = OptimConfig(schedule="wsd", warmup_steps=0, decay_fraction=0.25)
    assert [lr_factor(config, step, 20) for step in range(20)] == pytest.approx([1.0] * 16 + [0.8, 0.6, 0.4, 0.2])


def test_cosine_is_half_way_down_in_the_middle() -> None:
    config = OptimConfig(schedule="cosine", warmup_steps=0, final_lr_fraction=0.0)
    assert lr_factor(config, 0, 100) == 1.0
    assert lr_factor(config, 50, 100) == pytest.approx(0.5)


def test_constant_stays() -> None:
    config = OptimConfig(schedule="constant", warmup_steps=1)
    assert [lr_factor(config, step, 5) for step in range(5)] == [1.0] * 5


@pytest.mark.parametrize(
    ("name", "floor", "expected"),
    [
        ("wsd", 0.0, [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ("wsd", 0.2, [0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4]),
        ("cosine", 0.0, [0.5, 1, 1, 0.93301, 0.75, 0.5, 0.25, 0.06699]),  # (1 + cos(30 degrees * n)) / 2
        ("cosine", 0.5, [0.5, 1, 1, 0.96651, 0.875, 0.75, 0.625, 0.53349]),
        ("constant", 0.5, [0.5, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_every_step_of_a_short_run_is_as_worked_out_by_hand(name: str, floor: float, expected: list[float]) -> None:
    table = {"schedule": name, "warmup_steps": 2, "decay_fraction": 0.5, "final_lr_fraction": floor}
    config = OptimConfig.model_validate(table)
    assert [lr_factor(config, step, 8) for step in range(8)] == pytest.approx(expected, abs=1e-5)

"""A run whose reward rises for the wrong reason is seen in its log, and one that goes well is left alone."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from sprat.config.rl import TripWiresConfig
from sprat.post.rl.trip_wires import Trip, TripWires

Rows = list[dict[str, Any]]


def rows(count: int = 30, **changes: Callable[[int], Any]) -> Rows:
    """The log of a run in which all goes well, but for ``changes``: columns as functions of the step."""
    rng = random.Random(0)
    log = []
    for step in range(1, count + 1):
        row: dict[str, Any] = {
            "step": step,
            "reward": min(0.9, 0.3 + 0.02 * step) + rng.uniform(-0.1, 0.1),
            "reward_error": 0.1,
            "accuracy": min(0.9, 0.3 + 0.02 * step),
            "entropy": max(0.05, 1.0 - 0.03 * step),
            "kl_start": min(1.0, 0.02 * step),
            "response_length": 40 + min(60, step),
            "cut_share": 0.1,
            "live_groups": 0.5,
        }
        if step % 10 == 0:
            row |= {"eval_reward": 0.3 + 0.01 * step, "eval_loss_p_value": 1.0}
        log.append(row | {name: change(step) for name, change in changes.items()})
    return log


def first_trip(log: Rows, config: TripWiresConfig | None = None) -> Trip | None:
    wires = TripWires(config or TripWiresConfig(), "judge.py:f")
    return next((trip for row in log if (trip := wires.add(row)) is not None), None)


WRONG: dict[str, tuple[dict[str, Callable[[int], Any]], str]] = {
    "entropy": ({"entropy": lambda step: 0.5 if step < 10 else 0.0001}, "stopped exploring.*min_entropy"),
    "kl": ({"kl_start": lambda step: 0.3 * step}, "from its start.*max_kl"),
    "length": ({"response_length": lambda step: 20 * 1.1**step}, "tokens long.*max_length_growth"),
    "cut": ({"cut_share": lambda step: min(1, 0.03 * step)}, "end at max_tokens"),
    "no_spread": ({"live_groups": lambda step: float(step < 12)}, r"judge\.py:f paid all answers.*alike"),
    "judges": (
        {"second_reward": lambda step: 0.6 - 0.015 * step, "second_reward_error": lambda step: 0.1},
        r"judge\.py:f rose from .* while the second judge's fell from",
    ),
    "logprob_gap": (
        {
            "logprob_gap_mean": lambda s: 1e-6,
            "logprob_gap_p99": lambda step: 0.1 * step,
            "logprob_gap_max": lambda s: 9.0,
        },
        "nats apart at the 99th percentile.*max_logprob_gap_p99 is 1",
    ),
    "route_flips": (
        {"route_flips": lambda step: min(1, 0.03 * step)},
        "would choose others than 5.% of the sampler's experts.*max_route_flips is 0.5",
    ),
    "held_out": (
        {"eval_reward": lambda step: 0.5 if step < 15 else 0.2, "eval_loss_p_value": lambda s: 1.0 if s < 15 else 1e-4},
        "held-out problems are answered worse.*0.2, it was 0.5",
    ),
}


@pytest.mark.parametrize("wire", WRONG)
def test_what_goes_wrong_trips_its_own_wire_with_a_sentence(wire: str) -> None:
    changes, sentence = WRONG[wire]
    trip = first_trip(rows(**changes))
    assert trip is not None and trip.wire == wire and not trip.is_end
    assert re.search(sentence, trip.sentence), trip.sentence
    assert first_trip(rows(**changes), TripWiresConfig(action="off")) is None


def test_a_run_that_goes_well_trips_nothing() -> None:
    good = {"second_reward": lambda step: 0.3 + 0.01 * step, "second_reward_error": lambda step: 0.1}
    assert first_trip(rows(200)) is None and first_trip(rows(200, **good)) is None
    long_from_the_start = {"cut_share": lambda step: 0.9}
    assert first_trip(rows(**long_from_the_start)) is None, "it was so before anything was learned"


@pytest.mark.parametrize("seed", range(20))
def test_a_second_judge_that_is_only_noisy_trips_nothing(seed: int) -> None:
    rng = random.Random(seed)
    noisy = {"second_reward": lambda step: 0.5 + rng.gauss(0, 0.1), "second_reward_error": lambda step: 0.1}
    assert first_trip(rows(200, **noisy)) is None


@pytest.mark.parametrize("start", [0, 40])
def test_the_evaluation_before_the_first_step_is_no_step_and_is_what_a_fall_is_told_against(start: int) -> None:
    before = {"step": start, "eval_reward": 0.9, "eval_accuracy": 0.9}
    fallen = rows(10, step=lambda step: start + step)
    fallen[-1] |= {"eval_reward": 0.4, "eval_loss_p_value": 1e-4}
    wires = TripWires(TripWiresConfig(), "judge.py:f")
    wires.replay([before, *fallen[:-1]])
    trip = wires.add(fallen[-1])
    assert trip is not None and "reward 0.4, it was 0.9" in trip.sentence
    alike = rows(5, step=lambda step: start + step, live_groups=lambda step: 0.0)
    wires.replay([before])
    assert [row["step"] for row in alike if wires.add(row)] == [start + 5], "five steps in a row"


def test_answers_that_are_all_right_are_the_end_and_no_fault() -> None:
    trip = first_trip(rows(live_groups=lambda step: float(step < 12), accuracy=lambda step: 1.0))
    assert trip is not None and trip.is_end and "nothing left to learn" in trip.sentence


@pytest.mark.parametrize("wire", WRONG)
def test_wires_that_are_strung_again_from_the_log_trip_at_the_same_step(wire: str) -> None:
    log = rows(**WRONG[wire][0])
    expected = first_trip(log)
    assert expected is not None
    for killed_after in (0, 3, expected.step - 1):
        wires = TripWires(TripWiresConfig(), "judge.py:f")
        wires.replay([{"step": 0, "eval_reward": 0.3}, *log[:killed_after]])
        assert next(trip for row in log[killed_after:] if (trip := wires.add(row))) == expected


@pytest.mark.parametrize(
    ("wire", "key"),
    [("entropy", "min_entropy"), ("kl", "max_kl"), ("length", "max_length_growth"), ("cut", "max_cut_share"),
     ("no_spread", "no_spread"), ("judges", "min_z"), ("held_out", "held_out_p"),
     ("logprob_gap", "max_logprob_gap_p99"), ("route_flips", "max_route_flips")],
)  # fmt: skip
def test_each_wire_can_be_left_out(wire: str, key: str) -> None:
    assert first_trip(rows(**WRONG[wire][0]), TripWiresConfig.model_validate({key: 0})) is None


@pytest.mark.parametrize(
    ("key", "column", "which"),
    [("max_logprob_gap", "logprob_gap_max", "at the furthest token"),
     ("max_logprob_gap_mean", "logprob_gap_mean", "on average")],
)  # fmt: skip
def test_each_gap_has_its_own_limit(key: str, column: str, which: str) -> None:
    log = rows(**{column: lambda step: 0.02 * step})
    assert first_trip(log) is None, "nobody asked"
    trip = first_trip(log, TripWiresConfig.model_validate({key: 0.3}))
    assert trip is not None and trip.wire == "logprob_gap" and trip.step == 18  # the mean of steps 14 to 18 is 0.32
    assert which in trip.sentence and f"trip_wires.{key} is 0.3" in trip.sentence

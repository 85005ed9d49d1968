"""What is said of whole roads: bars, gains with an interval over seeds, and the table, from runs written by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from bench.roads import Road, bars, gains, lower, table

TASKS = ("a", "b", "c", "d", "e", "f")


def scored(way: str, *right: int) -> list[dict[str, Any]]:
    return [{"task": t, "label": way, "correct": r, "count": 1000} for t, r in zip(TASKS, right, strict=True)]


def road(name: str = "0-avx512", shift: int = 0) -> Road:
    """Every bar is met, and none by much."""
    base, thinking = (500, 500, 500, 500, 900, 900), (720, 720, 720, 720, 920, 920)
    reached = tuple(700 + shift if place < 4 else 900 for place in range(6))
    text = {"prose": {"bytes": 9, "model": 1.9, "ppm": 2.0, "xz": 2.5}, "code": {"bytes": 9, "model": 3.0, "ppm": 2.0}}
    facts: dict[str, dict[str, Any]] = {
        "pretrain": {"scores": scored("greedy", *base) + scored("thinking", *thinking), "bits_per_byte": text},
        "rl-seed0": {"scores": scored("greedy", *reached), "training_cpu_seconds": 50 + shift},
        "distill": {"scores": scored("greedy", *[501] * 6)},
        "student-scratch": {"scores": scored("greedy", *[500] * 6)},
        "quantize": {
            "scores": scored("greedy", *[500] * 6),
            "relative_loss": dict(zip(TASKS, (0.05, 0.03, 0.01, 0.01, 0.01, 0.01), strict=True)),
            "drafts": {"accepted": 0.7, "with_drafts": 115.0, "without": 100.0},
        },
    }
    return Road(name, {run: {"facts": each} for run, each in facts.items()}, 15.0)


def test_each_bar_holds_where_it_is_met() -> None:
    found = bars(road())
    assert len(found) == 9 and all(good for _, good in found.values()), found


@pytest.mark.parametrize(
    ("run", "fact", "value", "bar"),
    [
        ("rl-seed0", "scores", scored("greedy", 700, 700, 700, 699, 900, 900), "fourth best gain"),
        ("rl-seed0", "scores", scored("greedy", 700, 720, 720, 720, 890, 900), "base made to think"),
        ("distill", "scores", scored("greedy", *[500] * 6), "without a teacher"),
        ("quantize", "relative_loss", dict.fromkeys(TASKS, 0.021), "INT4: mean"),
        ("quantize", "relative_loss", dict.fromkeys(TASKS, 0.0) | {"c": 0.051}, "INT4: worst"),
        ("quantize", "drafts", {"accepted": 0.69, "with_drafts": 115.0, "without": 100.0}, "accepted"),
        ("quantize", "drafts", {"accepted": 0.7, "with_drafts": 114.0, "without": 100.0}, "tokens/s"),
        ("pretrain", "bits_per_byte", {"prose": {"bytes": 9, "model": 2.1, "ppm": 2.0, "xz": 2.5}}, "prose"),
    ],
)
def test_each_bar_is_missed_by_itself(run: str, fact: str, value: Any, bar: str) -> None:
    one = copy.deepcopy(road())
    one.runs[run]["facts"][fact] = value
    missed = [name for name, (_, good) in bars(one).items() if not good]
    assert len(missed) == 1 and bar in missed[0], missed


def test_the_interval_is_students() -> None:
    # mean 3, deviation 1.5811, t(4) = 2.776: 3 - 2.776 * 0.7071
    assert lower([1, 2, 3, 4, 5]) == pytest.approx(1.037, abs=1e-3)
    assert lower([5]) == -math.inf


def test_roads_of_one_seed_count_once() -> None:
    roads = [road("0-avx512"), road("0-avx2", 20), road("1-avx512", 10), road("1-avx2", 30), road("2-avx512", 20)]
    found = gains(roads)["RL over base: a"]  # seeds: 0.21, 0.22, 0.22
    assert found["mean"] == pytest.approx(0.216)
    assert found["lower"] == pytest.approx(0.65 / 3 - 4.303 * 0.0057735 / math.sqrt(3), abs=1e-5)
    assert gains(roads)["RL over base: e"] == {"mean": 0, "lower": 0}
    assert not any(name.startswith("RL over SFT") for name in gains(roads))  # a run that is not there


def test_the_table_shows_means_and_ranges_in_per_cent() -> None:
    roads = [road("0-avx512"), road("1-avx512", 20)]
    short, wide = (table(roads, ranges=ranges).splitlines() for ranges in (False, True))
    row = next(line for line in short if "after RL" in line)
    assert row == "| **after RL** | 71.0 | 71.0 | 71.0 | 71.0 | 90.0 | 90.0 | 77.3 (76.7 to 78.0) | 60 |"
    assert "71.0 (70.0 to 72.0)" in next(line for line in wide if "after RL" in line)
    assert not any("SFT" in line for line in short)

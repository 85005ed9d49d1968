"""Goodput under failures is what a simulated run has, and the best interval is the one that it names."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sprat.errors import ConfigError
from sprat.plan.goodput import daly, goodput, young


def simulated(mtbf: float, work: float, save: float, restart: float, rng: np.random.Generator) -> float:
    """Share of progress of a run of many saves whose failures come at random, restarts failing too."""
    clock, saves = 0.0, 20_000
    for _ in range(saves):
        while True:
            until = rng.exponential(mtbf)
            if until >= work + save:
                clock += work + save
                break
            clock += until
            while (wait := rng.exponential(mtbf)) < restart:
                clock += wait
            clock += restart
    return saves * work / clock


@pytest.mark.parametrize(("mtbf", "work", "save", "restart"), [(10800, 1100, 60, 600), (3600, 600, 120, 300)])
def test_progress_is_that_of_a_simulated_run(mtbf: float, work: float, save: float, restart: float) -> None:
    result = goodput(1, chip_hours=mtbf / 3600, save_seconds=save, restart_seconds=restart, interval=work)
    assert result.share == pytest.approx(simulated(mtbf, work, save, restart, np.random.default_rng(1)), rel=0.02)
    assert result.share + result.saving + result.lost == pytest.approx(1)


def test_the_interval_is_the_best_one() -> None:
    best = goodput(16384, save_seconds=60, restart_seconds=600)
    for factor in (0.5, 0.8, 1.25, 2):
        other = goodput(16384, save_seconds=60, restart_seconds=600, interval=best.interval * factor)
        assert other.share < best.share
    # Young 1974: sqrt(2 C M); Daly's correction is small where saves are short
    assert young(60, 10800) == pytest.approx(math.sqrt(2 * 60 * 10800))
    assert daly(60, 10800) == pytest.approx(young(60, 10800), rel=0.06)


def test_more_chips_fail_more_often() -> None:
    few, many = (goodput(n, save_seconds=60, restart_seconds=600) for n in (256, 16384))
    assert few.share > many.share
    assert many.fleet_mtbf == pytest.approx(54 * 86400 / 419)  # as Llama 3's report has it


@pytest.mark.parametrize("change", [{"chips": 0}, {"save_seconds": -1}, {"chip_hours": math.nan}, {"interval": 1e9}])
def test_absurd_numbers_are_refused(change: dict[str, float]) -> None:
    facts: dict[str, float] = {"chips": 1024, "save_seconds": 60, "restart_seconds": 600} | change
    with pytest.raises(ConfigError, match="chips is|save_seconds is|chip_hours is|save more often"):
        goodput(**facts)  # type: ignore[arg-type]

"""The planner's memory is torch's: two ranks, built and stepped (all cases: ``python -m bench.plan_memory``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.plan_memory import CASES, LiveBytes, measure, predict
from sprat.config import ModelConfig, ParallelPlan


def test_live_bytes_are_those_of_the_tensors_that_are_alive() -> None:
    live = LiveBytes()
    with live:
        kept = torch.ones(1000)
        _ = [torch.ones(500) for _ in range(10)]
        both = torch.ones(2000) + 1
        assert live.now == 4 * (1000 + 5000 + 2000)
        del _, both
        assert live.now == 4 * len(kept)
    assert live.peak == 4 * (1000 + 5000 + 2 * 2000)


@pytest.mark.parametrize("name", ["MLA, uneven pipeline", "MoE, pipeline 2, expert 4"])
def test_the_planner_says_what_torch_allocates(name: str) -> None:
    shape, changes = next((shape, plan) for case, shape, plan in CASES if case == name)
    plan_changes: dict[str, Any] = changes
    config, plan = ModelConfig.model_validate(shape), ParallelPlan.model_validate(plan_changes)
    for rank in range(plan.pipeline):
        assert predict(config, plan, rank).bytes == pytest.approx(measure(config, plan, rank), rel=0.05)

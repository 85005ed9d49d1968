"""Steps take as long as published ones, and every second of them is accounted for."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from sprat.config.parallel import ParallelPlan, v3_plan
from sprat.errors import ConfigError
from sprat.plan.families import load_shape
from sprat.plan.hardware import chip
from sprat.plan.step import StepEstimate, StepOptions, step_time

# DeepSeek-V3 on 2,048 H800: arXiv 2505.09343, table 4
V3_STEP, V3_BUBBLE, V3_CAUSAL, V3_FULL = 19.926, 2.06, 0.3894, 0.4373
V3_TOKENS_A_DAY = 272.80e9


@pytest.fixture(scope="module")
def v3() -> StepEstimate:
    return step_time(load_shape("v3"), v3_plan(), chip("H800"))


def test_v3s_step_is_the_published_one(v3: StepEstimate) -> None:
    assert v3.seconds == pytest.approx(V3_STEP, rel=0.08)
    assert v3.bubble == pytest.approx(V3_BUBBLE, rel=0.2)
    assert v3.mfu(causal=True) == pytest.approx(V3_CAUSAL, abs=0.015)
    assert v3.mfu(causal=False) == pytest.approx(V3_FULL, abs=0.015)
    assert v3.plan.step_tokens / v3.seconds * 86400 == pytest.approx(V3_TOKENS_A_DAY, rel=0.08)


def test_v3s_parts_are_of_the_published_size(v3: StepEstimate) -> None:
    # the same table: forwards, backwards and overlapped pairs that are not hidden behind each other
    kinds = v3.timeline.seconds_by_kind()
    assert kinds["F"] == pytest.approx(1.13, rel=0.2)
    assert kinds["B"] + kinds["I"] == pytest.approx(1.99, rel=0.2)
    assert kinds["FB"] == pytest.approx(13.95, rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": "zbv"},
        {"schedule": "interleaved", "global_batch": 16384},
        {"schedule": "1f1b", "virtual_stages": 1},
        {"schedule": "zero_bubble", "virtual_stages": 1, "global_batch": 16384},
        {"recompute": "full"},
        {"tensor": 2, "data_shard": 64},
        {"pipeline": 1, "virtual_stages": 1, "schedule": "1f1b", "data_shard": 2048, "zero": 3, "global_batch": 16384},
    ],
)
def test_every_second_is_in_a_term(changes: dict[str, object]) -> None:
    estimate = step_time(load_shape("v3"), v3_plan(**changes), chip("H800"), StepOptions(data_stall=0.5, factor=1.1))
    assert sum(estimate.terms().values()) == pytest.approx(estimate.seconds)
    explained = {line.name for line in estimate.explain()}
    assert {"bubble", "products", "attention", "MFU, causal", "step"} <= explained
    assert all(line.formula and math.isfinite(line.value) for line in estimate.explain())


def test_overlap_saves_time_and_recomputation_costs_it(v3: StepEstimate) -> None:
    shape, h800 = load_shape("v3"), chip("H800")
    plain = step_time(shape, v3_plan(schedule="interleaved", global_batch=16384), h800)
    assert v3.tokens_per_second > 1.1 * plain.tokens_per_second
    full = step_time(shape, v3_plan(recompute="full"), h800)
    assert full.seconds > 1.1 * v3.seconds
    longer = step_time(shape, v3_plan(global_batch=30720), h800)
    assert longer.bubble / longer.seconds < 0.75 * v3.bubble / v3.seconds


def test_a_mixed_fleet_is_as_fast_as_its_slow_ranks_allow() -> None:
    shape = load_shape("LLAMA3_8B")
    plan = ParallelPlan(data_shard=8, pipeline=4, global_batch=256, sequence_length=8192)
    fast, slow = (step_time(shape, plan, chip(name)).seconds for name in ("H100", "A100"))
    fleet = [chip("H100"), chip("H100"), chip("A100"), chip("H100")]
    even = step_time(shape, plan.replace(stage_layers=(8, 8, 8, 8)), fleet).seconds
    assert 1.5 * fast < even <= slow * 1.02
    assert fast < step_time(shape, plan, fleet).seconds < 0.8 * even  # left to itself, the slow rank gets fewer layers


def test_adapters_need_no_gradients_of_weights() -> None:
    shape, plan = load_shape("LLAMA3_8B"), ParallelPlan(data_shard=8, global_batch=128, sequence_length=8192)
    whole = step_time(shape, plan, chip("H100"))
    adapters = step_time(shape, plan, chip("H100"), StepOptions(trains_weights=False))
    # a third of the FLOPs falls away (arXiv 2106.09685, section 4.2), and reading inputs once more eats some of it
    assert 2 / 3 < adapters.seconds / whole.seconds < 0.98


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data_stall": -1.0}, "data_stall"),
        ({"factor": 0.0}, "factor"),
        ({"factor": math.inf}, "factor"),
        ({"imbalance": 0.5}, "imbalance"),
        ({"recipe": "fp7"}, "unknown precision 'fp7'"),
        ({"recipe": "fp4"}, "does not multiply in 'fp4'"),
    ],
)
def test_absurd_options_are_refused(options: dict[str, float], says: str) -> None:
    plan = ParallelPlan(data_shard=8, global_batch=128)
    with pytest.raises(ConfigError, match=says):
        step_time(load_shape("LLAMA3_8B"), plan, chip("H100"), StepOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("degrees", "says"),
    [
        ({"tensor": 3, "sequence_length": 6144}, "tensor 3 does not divide"),
        ({"pipeline": 64}, "64 stages"),
        ({"expert": 2}, "expert 2"),
    ],
)
def test_layouts_that_do_not_cut_the_model_are_refused(degrees: dict[str, int], says: str) -> None:
    plan = ParallelPlan.model_validate({"data_shard": 8, "global_batch": 128} | degrees)
    with pytest.raises(ConfigError, match=says):
        step_time(load_shape("LLAMA3_8B"), plan, chip("H100"))


def test_one_rank_has_nothing_to_schedule() -> None:
    plan = ParallelPlan(data_shard=8, global_batch=128)
    seconds = {
        step_time(load_shape("LLAMA3_8B"), plan.replace(schedule=s), chip("H100")).seconds for s in ("1f1b", "zbv")
    }
    assert len(seconds) == 1


def test_a_fleet_that_names_too_few_chips_is_refused() -> None:
    plan = ParallelPlan(data_shard=2, pipeline=4, global_batch=64)
    with pytest.raises(ConfigError, match="2 chips for 4 pipeline ranks"):
        step_time(load_shape("LLAMA3_8B"), plan, [chip("H100"), chip("A100")])


def test_planning_loads_no_torch() -> None:
    code = "import sys, sprat.plan.calibration, sprat.plan.goodput; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

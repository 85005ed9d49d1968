"""The search finds what an exhaustive one finds, knows V3's layout, and says why the rest fell."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from sprat.config.parallel import ParallelPlan, v3_plan
from sprat.errors import ConfigError
from sprat.plan.families import load_shape
from sprat.plan.hardware import chip
from sprat.plan.memory import fullest_rank
from sprat.plan.search import Goal, _estimates, search
from sprat.plan.step import step_time

BASE = ParallelPlan(global_batch=64, sequence_length=4096)
SMALL = Goal(load_shape("LLAMA3_8B"), ((chip("H100"), 8),), BASE, tokens=1e12, price=2.0)


@pytest.mark.slow
def test_v3s_layout_is_among_the_best_on_2048_h800() -> None:
    goal = Goal(load_shape("v3"), ((chip("H800"), 2048),), v3_plan(), tokens=14.8e12, price=2.0)
    found = search(goal, seconds=600)
    assert found.left == 0
    published = [one for one in found.within(0.05) if one.plan == v3_plan()]
    assert len(published) == 1  # arXiv 2412.19437, section 3
    assert published[0].cost == pytest.approx(2664e3 * 2, rel=0.1)  # table 1: pre-training, $2 an hour
    assert found.near and all("needs" in one.reason for one in found.near)


def test_nothing_that_was_listed_is_better_and_fits() -> None:
    found = search(SMALL, seconds=600)
    assert found.left == 0
    best = found.proposals[0]
    for micro, tensor, zero, again in [
        (m, t, z, r) for m in (1, 2) for t in (1, 2) for z in (1, 3) for r in ("none", "full")
    ]:
        plan = BASE.replace(micro_batch=micro, tensor=tensor, data_shard=8 // tensor, zero=zero, recompute=again)
        if fullest_rank(SMALL.shape, plan).bytes <= chip("H100").memory_gib * 2**30:
            assert step_time(SMALL.shape, plan, chip("H100")).seconds >= best.seconds * 0.999
    for estimate, plan in _estimates(SMALL, Counter()):  # the arithmetic that orders them is never above the simulation
        if plan.micro_batch == 1 and plan.recompute == "none":
            assert estimate <= step_time(SMALL.shape, plan, chip("H100")).seconds
    for one in found.proposals[:5]:
        assert one.plan.world_size == 8
        assert fullest_rank(SMALL.shape, one.plan).bytes <= chip("H100").memory_gib * 2**30
        assert one.seconds == pytest.approx(step_time(SMALL.shape, one.plan, chip("H100")).seconds)
        assert one.days == pytest.approx(1e12 / one.plan.step_tokens * one.seconds / 86400)
        assert one.cost == pytest.approx(one.days * 24 * 8 * 2)


def test_deadline_and_budget_are_held_and_near_misses_named() -> None:
    best = search(SMALL).proposals[0]
    late = search(replace(SMALL, deadline_days=best.days * 0.9))
    assert not late.proposals and late.reasons["deadline"] > 0
    assert late.near[0].short == min(one.short for one in late.near)
    assert any(one.reason.startswith("deadline") for one in late.near)
    poor = search(replace(SMALL, budget=best.cost * 1.02))
    assert poor.proposals and all(one.cost <= best.cost * 1.02 for one in poor.proposals)


def test_a_model_that_is_too_large_says_by_how_much() -> None:
    goal = replace(SMALL, shape=load_shape("LLAMA3_70B"), fleet=((chip("RTX 4090"), 8),))
    found = search(goal)
    assert not found.proposals and found.left == 0 and found.reasons["memory"] == found.listed
    assert "GiB of 24 on RTX 4090" in found.near[0].reason and found.near[0].short > 2


def test_a_mixed_fleet_gives_its_slow_chips_fewer_layers() -> None:
    base = BASE.replace(global_batch=96)
    shape = load_shape("LLAMA3_8B")
    found = search(Goal(shape, ((chip("H100"), 8), (chip("A100"), 8)), base, tokens=1e12), seconds=600)
    best = found.proposals[0]
    fast = search(Goal(shape, ((chip("H100"), 8),), base, tokens=1e12), seconds=600).proposals[0]
    assert best.seconds < fast.seconds  # eight more chips help, slow as they are
    layers = dict.fromkeys(range(best.plan.pipeline), 0)
    for stage, count in enumerate(best.plan.stage_layers):
        layers[best.plan.rank_of_stage(stage)] += count
    half = best.plan.pipeline // 2
    assert sum(layers[rank] for rank in range(half)) > sum(layers[rank] for rank in range(half, best.plan.pipeline))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fleet": ((chip("H100"), 7),)}, "use 4 of one kind"),
        ({"fleet": ()}, "no chips"),
        ({"tokens": 0.0}, "tokens is 0"),
        ({"deadline_days": math.nan}, "deadline_days"),
        ({"budget": -1.0}, "budget"),
        ({"price": math.inf}, "price"),
    ],
)
def test_absurd_goals_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        search(replace(SMALL, **changes))  # type: ignore[arg-type]

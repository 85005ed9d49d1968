"""Memory of a rank: arithmetic by hand for what stays, order and counts for what comes and goes.

The comparison with what torch allocates is `bench/plan_memory.py`.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from sprat.config import ModelConfig, ParallelPlan
from sprat.config.parallel import v3_plan
from sprat.errors import ConfigError
from sprat.plan.activations import FUSED, NATIVE, STOCK
from sprat.plan.families import from_config, from_hf, load_shape
from sprat.plan.memory import RankMemory, fullest_rank, rank_memory
from sprat.plan.state import check_fit, split_stages

GQA: dict[str, Any] = {
    "architecture": "llama", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
# By hand: attention 64 x (64 + 32 + 32 + 64), feed-forward 3 x 64 x 160, two norms.
LAYER = 64 * 192 + 3 * 64 * 160 + 2 * 64
ENDS = 1024 * 64
TOTAL = 4 * LAYER + 2 * ENDS + 64


def memory(changes: dict[str, Any] | None = None, rank: int = 0, **plan: Any) -> RankMemory:
    shape = from_config(ModelConfig.model_validate({**GQA, **(changes or {})}))
    plan = {"sequence_length": 64, "zero": 0, **plan}
    return rank_memory(shape, ParallelPlan.model_validate(plan), rank, margin=0.0)


@pytest.mark.parametrize(
    "plan, expected",
    [
        ({"precision": "fp32"}, {"parameters": 4, "gradients": 4, "master weights": 0, "moments": 8}),
        ({}, {"parameters": 2, "gradients": 4, "master weights": 4, "moments": 8}),
        ({"moment_dtype": "bf16", "gradient_dtype": "bf16"},
         {"parameters": 2, "gradients": 2, "master weights": 4, "moments": 4}),
        ({"master_dtype": "none"}, {"parameters": 2, "gradients": 4, "master weights": 0, "moments": 8}),
        ({"optimizer": "sgd"}, {"parameters": 2, "gradients": 4, "master weights": 4, "moments": 4}),
        ({"data_shard": 8, "global_batch": 8, "zero": 1},
         {"parameters": 2, "gradients": 4, "master weights": 4 / 8, "moments": 8 / 8}),
        ({"data_shard": 8, "global_batch": 8, "zero": 2},
         {"parameters": 2, "gradients": 4 / 8, "master weights": 4 / 8, "moments": 8 / 8}),
        ({"data_shard": 8, "global_batch": 8, "zero": 3},
         {"parameters": 2 / 8, "gradients": 4 / 8, "master weights": 4 / 8, "moments": 8 / 8}),
    ],
)  # fmt: skip
def test_state_is_bytes_a_parameter_as_zero_shares_it(plan: dict[str, Any], expected: dict[str, float]) -> None:
    """Mixed precision with Adam, arXiv 1910.02054, section 3.1: 2 + 2 + 12 bytes, here with gradients in 4."""
    found = memory(**plan)
    assert {name: found.term(name) for name in expected} == pytest.approx(
        {name: each * TOTAL for name, each in expected.items()}
    )


def test_muon_has_one_moment_for_a_matrix() -> None:
    vectors = 2 * ENDS + 64 + 4 * 2 * 64
    assert memory(optimizer="muon").term("moments") == 4 * (TOTAL - vectors) + 8 * vectors


def test_tensor_parallelism_cuts_matrices_and_not_norms() -> None:
    norms = 64 + 4 * 2 * 64
    assert memory(tensor=2).term("parameters") == pytest.approx(2 * ((TOTAL - norms) / 2 + norms))


def test_few_key_heads_are_repeated_over_tensor_ranks() -> None:
    """4 ranks, 2 key heads: a rank has a quarter of all else, and half of keys and values."""
    norms, keys = 64 + 4 * 2 * 64, 4 * 2 * 64 * 32
    assert memory(tensor=4).term("parameters") == pytest.approx(2 * ((TOTAL - norms - keys) / 4 + keys / 2 + norms))


def test_an_uneven_pipeline_gives_each_rank_its_layers() -> None:
    plan = {"pipeline": 3, "stage_layers": (1, 1, 2), "global_batch": 6}
    sizes = [memory(rank=rank, **plan).term("parameters") / 2 for rank in range(3)]
    assert sizes == [LAYER + ENDS, LAYER, 2 * LAYER + ENDS + 64]


def test_a_tied_head_on_another_rank_is_a_copy() -> None:
    tied, plan = {"tie_word_embeddings": True}, {"pipeline": 2, "global_batch": 4}
    assert memory(tied).term("parameters") == 2 * (TOTAL - ENDS)
    assert memory(tied, 1, **plan).term("parameters") == 2 * (2 * LAYER + ENDS + 64)
    v = {**plan, "schedule": "zbv", "virtual_stages": 2}  # first and last stage share a rank
    assert sum(memory(tied, rank, **v).term("parameters") for rank in range(2)) == 2 * (TOTAL - ENDS)


def test_1f1b_keeps_as_many_micro_batches_as_ranks_follow() -> None:
    """arXiv 2104.04473, section 2.2: rank r of p holds p - r of them."""
    plan = {"pipeline": 4, "stage_layers": (1, 1, 1, 1), "global_batch": 16, "precision": "fp32"}
    kept = [memory(rank=rank, **plan).term("activations: attention") for rank in range(3)]
    assert [each / kept[2] for each in kept] == pytest.approx([4 / 2, 3 / 2, 1])


def test_recomputation_keeps_less_and_full_keeps_least() -> None:
    shape = load_shape("v2-lite")
    plan = {"pipeline": 4, "global_batch": 8, "sequence_length": 1024}
    choices = ["none", ("mla_up_proj",), ("mla_up_proj", "moe_act", "layernorm"), "full"]
    sizes = [
        fullest_rank(shape, ParallelPlan.model_validate({**plan, "recompute": choice}), margin=0.0).bytes
        for choice in choices
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_expert_parallelism_cuts_experts_alone() -> None:
    shape = load_shape("v2-lite")
    alone, spread = (
        rank_memory(shape, ParallelPlan.model_validate(plan), 0, margin=0.0).term("parameters")
        for plan in ({}, {"data_shard": 8, "expert": 8, "global_batch": 8})
    )
    experts = 26 * 64 * 3 * 2048 * 1408
    assert alone - spread == pytest.approx(2 * experts * 7 / 8)


def test_busy_experts_take_more() -> None:
    shape, plan = load_shape("v3"), v3_plan()
    even, busy = (fullest_rank(shape, plan, imbalance=each).term("activations: experts") for each in (1.0, 2.0))
    assert 1.5 * even < busy < 2 * even


def test_what_kernels_keep_differs() -> None:
    shape = load_shape("micro")
    plan = ParallelPlan(sequence_length=256, precision="bf16", zero=0)
    fused, stock = (rank_memory(shape, plan, 0, kernels=each, margin=0.0).bytes for each in (FUSED, STOCK))
    assert fused < stock
    assert NATIVE.gate_up_copy and not FUSED.gate_up_copy


def test_v3_fits_its_chips_under_its_published_plan() -> None:
    """2,048 H800 of 80 GB trained it (arXiv 2412.19437, section 3)."""
    assert fullest_rank(load_shape("v3"), v3_plan()).bytes < 80e9


def test_every_term_has_formula_and_source() -> None:
    terms = fullest_rank(load_shape("v3"), v3_plan(context=2, data_shard=128)).terms
    assert all(term.formula and term.source and term.bytes > 0 for term in terms)
    assert {"ring attention", "margin", "working space"} <= {term.name for term in terms}


def test_the_margin_is_a_share_of_all_else() -> None:
    shape = load_shape("nano")
    plain, wide = (fullest_rank(shape, ParallelPlan(), margin=each).bytes for each in (0.0, 0.25))
    assert wide == pytest.approx(1.25 * plain)


@pytest.mark.parametrize("changes", [{"imbalance": 0.5}, {"imbalance": float("nan")}, {"margin": -1.0}])
def test_absurd_numbers_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="imbalance"):
        rank_memory(load_shape("nano"), ParallelPlan(), 0, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name, plan, named",
    [
        ("nano", {"tensor": 2}, "heads.*use tensor 1"),
        ("v3", {"data_shard": 7, "expert": 7, "global_batch": 7}, "experts"),
        ("LLAMA3_8B", {"data_shard": 2, "expert": 2, "global_batch": 2}, "without experts"),
        ("nano", {"pipeline": 8, "global_batch": 8}, "stages"),
    ],
)
def test_a_plan_that_does_not_cut_the_model_is_refused(name: str, plan: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        split_stages(load_shape(name), ParallelPlan.model_validate(plan))


def test_the_nearest_tensor_degree_cuts_all_that_it_cuts() -> None:
    """8 does not divide 12 heads; 6 would, and not 40 of the feed-forward."""
    table = {"hidden_size": 48, "num_attention_heads": 12, "intermediate_size": 40, "num_hidden_layers": 2}
    shape = from_hf({"model_type": "llama", "vocab_size": 64, **table})
    with pytest.raises(ConfigError, match="tensor 8 does not divide 12 heads.*use tensor 4"):
        check_fit(shape, ParallelPlan(tensor=8, sequence_length=24))
    check_fit(shape, ParallelPlan(tensor=4, sequence_length=24))


def _by_formula(formula: str) -> float:
    """What a person who reads the formula of a state term computes from it, with nothing else at hand."""
    numbers = [float(each.replace(",", "")) for each in re.findall(r"\d[\d,]*(?:\.\d+)?", formula)]
    if formula.startswith("largest layer"):
        layer, times, bytes_each, gradient = numbers
        return layer * (times * bytes_each + gradient)
    counts, rest = numbers[:3], numbers[3:]
    shares = [1.0, 1.0, 1.0]
    if "ZeRO" in formula:
        *rest, _, dense, experts = rest
        shares = [experts, dense, dense]
    factors = rest[:3] if len(rest) > 1 else rest * 3
    factors = [each * (rest[3] if len(rest) > 3 else 1) for each in factors]
    return sum(count * factor / share for count, factor, share in zip(counts, factors, shares, strict=True))


@pytest.mark.parametrize("plan", [{}, {"zero": 3}, {"zero": 3, "pipeline": 1, "schedule": "1f1b", "virtual_stages": 1}])
def test_a_state_term_is_what_its_formula_says(plan: dict[str, Any]) -> None:
    """V3 in fp8, whose experts are shared among fewer ranks than the rest."""
    table = v3_plan().model_dump() | plan
    terms = rank_memory(load_shape("v3"), ParallelPlan.model_validate(table), 0, margin=0.0).terms
    states = [each for each in terms if not each.name.startswith(("activations", "working"))]
    assert len(states) == 4 + ("zero" in plan)
    for term in states:
        assert _by_formula(term.formula) == pytest.approx(term.bytes, rel=1e-6), term.formula

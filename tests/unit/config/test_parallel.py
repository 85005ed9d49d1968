"""A plan that does not divide is refused with the product that does not fit and the nearest one that does."""

from __future__ import annotations

from typing import Any

import pytest

from sprat.config import ParallelPlan, parse
from sprat.config.parallel import v3_plan
from sprat.errors import ConfigError


def plan(**changes: Any) -> ParallelPlan:
    return parse(ParallelPlan, changes, where="plan")


def test_v3_s_published_layout_is_2048_ranks() -> None:
    """DeepSeek-V3, arXiv 2412.19437, section 3: pipeline 16, experts over 64 ranks, ZeRO-1, no tensor parallelism."""
    v3 = v3_plan()
    assert (v3.world_size, v3.pipeline, v3.expert, v3.tensor, v3.zero) == (2048, 16, 64, 1, 1)
    assert v3.step_tokens == 15360 * 4096
    assert v3.micro_batches == 15360 // 128
    assert sum(v3.split_layers(61)) == 61


def test_degrees_follow_torchtitan() -> None:
    """Experts are taken out of data_shard * context * tensor; ZeRO shares over data_shard * context."""
    both = plan(data_replicate=2, data_shard=4, context=2, tensor=2, expert=8, global_batch=8, sequence_length=1024)
    assert (both.world_size, both.data_ranks, both.shard_ranks, both.expert_shard_ranks) == (32, 8, 8, 2)
    assert both.micro_batch_tokens == 512


@pytest.mark.parametrize(
    "changes, product, nearest",
    [
        ({"data_shard": 96, "expert": 64, "global_batch": 96}, "expert 64 does not divide", "expert 48, or 64 or 128"),
        ({"expert": 3, "tensor": 4}, "expert 3 does not divide", "expert 2"),
        ({"expert_tensor": 3, "tensor": 4}, "expert_tensor 3 = 3 does not divide", "expert 1 * expert_tensor 2, or 3"),
        ({"expert_tensor": 3, "expert": 4, "tensor": 8}, "= 12 does not", "expert 4 * expert_tensor 2, or 12"),
        ({"pipeline": 2, "global_batch": 2, "stage_layers": [-1, 3]}, "stage_layers.0", "greater than or equal to 0"),
        ({"data_shard": 3, "micro_batch": 4, "global_batch": 100}, "micro_batch 4 = 12 does not divide", "96 or 108"),
        ({"global_batch": 2**40}, "micro-batches", "global_batch 16384"),
        ({"data_replicate": 8, "global_batch": 4}, "= 8 does not divide global_batch 4", "nearest: 8"),
        ({"context": 3, "sequence_length": 4096}, "2 [*] context 3 = 6 does not divide", "4098 or 4092"),
        ({"tensor": 3, "sequence_length": 4096}, "context 1 [*] tensor 3 = 3", "4095 or 4098"),
        ({"pipeline": 4, "stage_layers": [1, 2, 3], "global_batch": 4}, "pipeline 4 .* = 4", "names 3 stages"),
        ({"virtual_stages": 2}, "virtual_stages 2 without a pipeline", "nearest: 1"),
        ({"pipeline": 2, "virtual_stages": 2, "global_batch": 2}, "1f1b has virtual_stages 1", "interleaved"),
        ({"pipeline": 2, "schedule": "zbv", "global_batch": 2}, "zbv has virtual_stages 2", "nearest: 2"),
        (
            {"pipeline": 4, "schedule": "dualpipe_v", "virtual_stages": 2, "global_batch": 4},
            "2 [*] pipeline 4 = 8 micro-batches",
            "global_batch 8",
        ),
        (
            {"pipeline": 4, "schedule": "interleaved", "virtual_stages": 2, "global_batch": 9},
            "multiple of pipeline 4",
            "global_batch 8 or 12",
        ),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_named_with_the_nearest_that_does(
    changes: dict[str, Any], product: str, nearest: str
) -> None:
    with pytest.raises(ConfigError, match=product) as error:
        plan(**changes)
    assert nearest in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [{"tensor": 0}, {"tensor": -2}, {"tensor": 2**40}, {"tensor": "2"}, {"zero": 4}, {"recompute": ["mlpp"]},
     {"precision": "fp4"}, {"sequence_length": 0}, {"pipelines": 2}],
)  # fmt: skip
def test_numbers_and_names_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plan(**changes)


def test_a_fleet_that_the_plan_does_not_fill_is_refused_with_one_that_it_does() -> None:
    with pytest.raises(ConfigError, match="= 2048 ranks, not 2000.*use 2048 ranks"):
        v3_plan().check_world(2000)
    with pytest.raises(ConfigError, match="use 4096 or 2048 ranks: data_replicate 2 or 1"):
        v3_plan().check_world(4000)
    v3_plan().check_world(2048)


@pytest.mark.parametrize(
    "changes, sizes, named",
    [
        ({"tensor": 8, "sequence_length": 96}, {"heads": 12}, "tensor 8 does not divide 12 heads.*use tensor 6"),
        ({"tensor": 8, "sequence_length": 64}, {"heads": 12}, "tensor 8 does not divide 12 heads.*use tensor 4"),
        ({"tensor": 8, "sequence_length": 72}, {"heads": 9, "ffn": 1536}, "tensor 8 does not divide 9.*use tensor 3"),
        ({"tensor": 16}, {"heads": 24, "kv_heads": 3}, "tensor 16 does not divide 24 heads.*use tensor 1"),
        ({"data_shard": 16, "expert": 16, "global_batch": 16}, {"experts": 24}, "16 does not divide 24.*use expert 8"),
        ({"data_shard": 2, "expert": 2, "global_batch": 2}, {"layers": 4}, "without experts"),
        ({"tensor": 6, "sequence_length": 12}, {"heads": 12, "kv_heads": 4}, "kv_heads.*use tensor 4"),
        ({"pipeline": 8, "global_batch": 8}, {"layers": 4}, "8 stages for 4 layers"),
        ({"pipeline": 2, "stage_layers": [3, 2], "global_batch": 2}, {"layers": 6}, "add up to 5.*last stage 3"),
    ],
)
def test_a_model_that_the_degrees_do_not_cut_is_refused(
    changes: dict[str, Any], sizes: dict[str, int], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        plan(**changes).check_model(**sizes)


@pytest.mark.parametrize(
    "layers, pipeline, virtual, split",
    [
        (126, 8, 8, (1, *(2,) * 62, 1)),  # Llama 3.1 405B: one layer less at each end (arXiv 2407.21783, section 3.3.2)
        (94, 8, 3, (3, *(4,) * 22, 3)),
        (3, 2, 1, (2, 1)),
        (5, 1, 1, (5,)),
    ],
)
def test_embedding_and_head_count_as_a_layer(layers: int, pipeline: int, virtual: int, split: tuple[int, ...]) -> None:
    schedule = "interleaved" if virtual > 1 else "1f1b"
    batch = {"global_batch": pipeline, "schedule": schedule, "virtual_stages": virtual}
    assert plan(pipeline=pipeline, **batch).split_layers(layers) == split


def test_stages_lie_in_a_loop_or_a_v() -> None:
    loop = plan(pipeline=4, schedule="interleaved", virtual_stages=2, global_batch=4)
    v = plan(pipeline=4, schedule="zbv", virtual_stages=2, global_batch=4)
    assert [loop.stages_of_rank(rank) for rank in range(4)] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [v.stages_of_rank(rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]

"""What users get: configs that go in and out unchanged, and a clear word when a shape cannot be."""

from __future__ import annotations

import pytest

from sprat.config.model import ModelConfig
from sprat.config.sizes import names, size
from sprat.errors import ConfigError


@pytest.mark.parametrize("name", names())
def test_every_size_survives_the_way_through_config_json(name: str) -> None:
    config = size(name)
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_changing_the_exported_table_leaves_the_config_alone() -> None:
    config = size("v3")
    config.to_hf()["rope_scaling"]["factor"] = 1
    assert config.rope_scaling is not None and config.rope_scaling["factor"] == 40


def test_newer_rope_parameters_read_like_the_classic_form() -> None:
    table = size("v3").to_hf()
    newer = {**table.pop("rope_scaling"), "rope_theta": table.pop("rope_theta")}
    assert ModelConfig.from_hf({**table, "rope_parameters": newer}) == size("v3")


def test_a_dense_twin_keeps_all_but_the_experts() -> None:
    sparse, dense = size("micro", vocab_size=300), size("micro", vocab_size=300, dense=True)
    assert dense.n_routed_experts == 0 and dense.intermediate_size == sparse.intermediate_size
    assert (dense.vocab_size, dense.kv_lora_rank) == (300, sparse.kv_lora_rank)
    assert not any(dense.is_moe(layer) for layer in range(dense.num_hidden_layers))
    assert ModelConfig.from_hf(dense.to_hf()).replace(first_k_dense_replace=1) == dense


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 8, "topk_group": 8}, "groups of at least two"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "fewer experts"),
        ({"kv_lora_rank": 0}, "kv_lora_rank"),
        ({"qk_rope_head_dim": 7}, "even"),
        ({"architecture": "llama"}, "dense"),
        ({"hiden_size": 8}, "hidden_size"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_words(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        size("pico", **changes)


def test_an_unknown_size_names_the_dial() -> None:
    with pytest.raises(ConfigError, match="pico"):
        size("gigantic")


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"hidden_act": "gelu"},
        {"quantization_config": {"quant_method": "fp8"}},
        {"use_sliding_window": True},
        {"moe_layer_freq": 2},
    ],
)
def test_a_foreign_config_that_computes_otherwise_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        ModelConfig.from_hf({**size("pico").to_hf(), **change})

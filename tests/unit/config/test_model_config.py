"""What users get: configs that go in and out unchanged, and a clear word when a shape cannot be."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest

from sprat.config.model import ModelConfig
from sprat.config.sizes import size, size_names
from sprat.errors import ConfigError


@pytest.mark.parametrize("name", size_names())
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


def test_of_two_rotary_forms_that_differ_the_classic_one_counts_as_in_transformers() -> None:
    newer = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}
    added = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    ours = ModelConfig.from_hf({**QWEN, "rope_parameters": newer, "rope_scaling": added})
    assert ours.rope_scaling is not None and ours.rope_scaling["rope_type"] == "yarn"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Config(**QWEN, rope_parameters=newer, rope_scaling=added).rope_parameters
    assert theirs["rope_type"] == "yarn" and theirs["rope_theta"] == ours.rope_theta


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


QWEN = json.loads(
    """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": true, "use_sliding_window": false, "vocab_size": 152064}"""
)  # of Qwen2.5-7B-Instruct


def test_qwen_s_recipe_for_long_texts_reaches_four_times_its_context() -> None:
    """The README of Qwen2.5: add this to config.json, and texts may have 131,072 tokens."""
    recipe = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    assert ModelConfig.from_hf(QWEN).context == 32768
    assert ModelConfig.from_hf({**QWEN, "rope_scaling": recipe}).context == 131072
    bare = {"factor": 4.0, "rope_type": "yarn"}  # transformers takes max_position_embeddings for the original
    assert ModelConfig.from_hf({**QWEN, "rope_scaling": bare}).context == 131072
    assert size("v3").context == 163840


@pytest.mark.parametrize(
    ("scaling", "word"),
    [
        ({"factor": 4.0}, "factor and no type"),
        ({"rope_type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}, "full_attention"),
        ("yarn", "no table"),
    ],
)
def test_positions_that_are_not_understood_are_refused_by_name(scaling: Any, word: str) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ConfigError, match=word):
            ModelConfig.from_hf({**QWEN, key: scaling})


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "llama", "sliding_window": 4096}, "sliding_window"),
        ({"layer_types": ["sliding_attention"] * 28}, "there is no window"),
        ({"layer_types": ["sliding_attention"] * 27, "use_sliding_window": True}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 28, "use_sliding_window": True}, "layer_types"),
        ({"max_window_layers": "all", "use_sliding_window": True}, "max_window_layers"),
        ({"sliding_window": 0, "use_sliding_window": True, "max_window_layers": 0}, "sliding_window"),
    ],
)
def test_windows_that_are_not_understood_are_refused_by_name(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        ModelConfig.from_hf({**QWEN, **({"sliding_window": None} if "model_type" in changes else {}), **changes})


def test_keys_that_say_something_unknown_are_named() -> None:
    with pytest.warns(UserWarning, match=r"config\.json: not understood and not used: clip_qkv=8, logit_scale=0\.06"):
        ModelConfig.from_hf({**QWEN, "logit_scale": 0.06, "clip_qkv": 8, "softcap": None, "use_qk_norm": False})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelConfig.from_hf(QWEN)
        for name in size_names():
            ModelConfig.from_hf(size(name).to_hf())

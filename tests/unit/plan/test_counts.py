"""Closed-form counts equal what is built: our model, and transformers' of the families that we read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sprat.config import ModelConfig
from sprat.config.sizes import size, size_names
from sprat.errors import ConfigError
from sprat.model.counts import count_parameters as count_built
from sprat.model.counts import flops_per_token
from sprat.plan.counts import (
    count_parameters,
    forward_flops,
    kv_bytes,
    kv_bytes_per_token,
    training_flops,
)
from sprat.plan.families import from_config, from_hf, load_shape, model_names

DENSE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip


@pytest.mark.parametrize("name", size_names())
@pytest.mark.parametrize("twin", [False, True])
def test_every_size_is_counted_as_it_is_built(name: str, twin: bool) -> None:
    config = size(name, dense=twin)
    built, counted = count_built(config), count_parameters(from_config(config))
    assert (counted.total, counted.active, counted.mtp) == (built.total, built.active, built.mtp)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_dense_decoders_are_counted_as_they_are_built(architecture: str, changes: dict[str, Any]) -> None:
    bias = {"qwen2": True, "mistral": False}.get(architecture, changes.get("attention_bias", False))
    config = ModelConfig.model_validate({**DENSE, **changes, "architecture": architecture, "attention_bias": bias})
    built, counted = count_built(config), count_parameters(from_config(config))
    assert (counted.total, counted.active) == (built.total, built.active)


@pytest.mark.parametrize("name", ["pico", "v2-lite", "v3"])
def test_forward_flops_are_the_trainer_s(name: str) -> None:
    """They differ by the two per norm gain, which is no product."""
    config = size(name)
    shape = from_config(config)
    gains = 2 * (sum(block.vectors for block in shape.blocks) + shape.end_vectors)
    assert forward_flops(shape, 4096) == pytest.approx(flops_per_token(config, 4096) - gains, rel=1e-12)


def built_by_transformers(table: dict[str, Any]) -> int:
    """Parameters of the model that transformers builds from a config.json, without MTP modules, which it leaves out."""
    transformers = pytest.importorskip("transformers")
    table = dict(table)
    config = transformers.AutoConfig.for_model(table.pop("model_type"), **table)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


V32 = {
    "model_type": "deepseek_v32", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_shared_experts": 1, "n_routed_experts": 256, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_06B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_30B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "tie_word_embeddings": False, "mlp_only_layers": [1],
}  # fmt: skip
GPT_OSS_20B = {
    "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "table", [V32, LLAMA3_8B, QWEN3_06B, QWEN3_30B, GPT_OSS_20B], ids=lambda table: table["model_type"]
)
def test_foreign_families_are_counted_as_transformers_builds_them(table: dict[str, Any]) -> None:
    assert count_parameters(from_hf(table)).total == built_by_transformers(table)


MISTRAL = {**LLAMA3_8B, "model_type": "mistral"}
V3 = {key: value for key, value in V32.items() if not key.startswith("index")} | {"model_type": "deepseek_v3"}


@pytest.mark.parametrize(
    "table, absent",
    [
        (MISTRAL, "num_key_value_heads"),
        (QWEN3_06B | {"num_attention_heads": 32}, "num_key_value_heads"),
        (QWEN3_06B, "head_dim"),
        (QWEN3_30B, "num_key_value_heads"),
        (GPT_OSS_20B, "num_key_value_heads head_dim"),
        (V3, "q_lora_rank n_shared_experts first_k_dense_replace"),
    ],
    ids=lambda each: each if isinstance(each, str) else each["model_type"],
)
def test_a_key_that_is_left_out_is_what_transformers_takes(table: dict[str, Any], absent: str) -> None:
    short = {key: value for key, value in table.items() if key not in absent.split()}
    assert len(short) < len(table) and count_parameters(from_hf(short)).total == built_by_transformers(short)


def test_a_window_that_is_left_out_is_what_transformers_takes() -> None:
    transformers = pytest.importorskip("transformers")
    short = {key: value for key, value in GPT_OSS_20B.items() if key != "sliding_window"}
    window = transformers.GptOssConfig().sliding_window
    assert from_hf(short).layers == from_hf({**short, "sliding_window": window}).layers


NANO = {
    "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 2688, "intermediate_size": 1856,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "n_routed_experts": 128,
    "n_shared_experts": 1, "num_experts_per_tok": 6, "moe_intermediate_size": 1856, "mamba_num_heads": 64,
    "moe_shared_expert_intermediate_size": 3712, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
    "conv_kernel": 4, "chunk_size": 128, "tie_word_embeddings": False,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention"],
}  # fmt: skip
V4 = {
    "model_type": "deepseek_v4", "vocab_size": 129280, "hidden_size": 512, "num_attention_heads": 8, "head_dim": 64,
    "num_key_value_heads": 1, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
    "moe_intermediate_size": 128, "q_lora_rank": 128, "o_lora_rank": 128, "o_groups": 4, "sliding_window": 128,
    "index_n_heads": 8, "index_head_dim": 32, "index_topk": 64, "num_hidden_layers": 6, "hc_mult": 4,
    "tie_word_embeddings": False, "compress_ratios": [0, 0, 4, 128, 4, 128],
}  # fmt: skip


@pytest.mark.parametrize("table", [NANO, {**NANO, "moe_latent_size": 1024}, V4], ids=["nano", "latent", "v4"])
def test_mamba_and_compressed_attention_are_counted_as_transformers_builds_them(table: dict[str, Any]) -> None:
    assert count_parameters(from_hf(table)).total == built_by_transformers(table)


@pytest.mark.parametrize(
    "table",
    [V32, V3, LLAMA3_8B, MISTRAL, QWEN3_06B, QWEN3_30B, GPT_OSS_20B, NANO, V4],
    ids=lambda table: table["model_type"],
)
def test_a_config_is_read_as_transformers_writes_it(table: dict[str, Any]) -> None:
    """Version 5 writes Qwen3-MoE's ``num_experts`` and DeepSeek-V4's ``compress_ratios`` by other names."""
    transformers = pytest.importorskip("transformers")
    own = {key: value for key, value in table.items() if key != "model_type"}
    written = json.loads(transformers.AutoConfig.for_model(table["model_type"], **own).to_json_string())
    assert from_hf(written).layers == from_hf(table).layers


def test_v3_has_the_published_sizes() -> None:
    """DeepSeek-V3, arXiv 2412.19437: 671 B and 37 B; its README_WEIGHTS: MTP 11.5 B of its own, without eh_proj."""
    count = count_parameters(load_shape("v3"))
    assert f"{count.total / 1e9:.1f} {count.active / 1e9:.1f}" == "671.0 36.6"
    assert f"{count.mtp_without_join / 1e9:.1f}" == "11.5"
    assert count.mtp - count.mtp_without_join == 2 * 7168 * 7168


def test_v3_s_flops_are_the_published_ones_causal_and_not() -> None:
    """arXiv 2505.09343, tables 2 and 4: 250 GFLOP a token; 2,048 GPUs, 272.80 B tokens a day: 385 and 432 TFLOPS."""
    shape = load_shape("v3")
    causal, full = (training_flops(shape, 4096, causal=causal) for causal in (True, False))
    assert causal == pytest.approx(250e9, rel=0.005)
    tokens_per_second_per_gpu = 272.80e9 / 86400 / 2048
    assert causal * tokens_per_second_per_gpu / 1e12 == pytest.approx(385, rel=0.01)
    assert full * tokens_per_second_per_gpu / 1e12 == pytest.approx(432, rel=0.01)


def test_kv_bytes_are_the_published_ones() -> None:
    """arXiv 2505.09343, table 1."""
    assert kv_bytes_per_token(load_shape("v3")) == 70272
    assert kv_bytes_per_token(load_shape("LLAMA3.1_405B")) == 516096


def test_a_window_bounds_the_cache() -> None:
    shape = from_hf(GPT_OSS_20B)
    layer = 2 * 2 * 8 * 64
    assert kv_bytes(shape, 100) == 24 * layer * 100
    assert kv_bytes(shape, 1000) == 12 * layer * 1000 + 12 * layer * 128


# From the models' names and cards: billions of parameters, and active ones.
CARDS = {
    "LLAMA3 8B": (8.0, None), "LLAMA3_70B": (70.6, None), "LLAMA3.1_405B": (405.9, None), "Qwen3_30B_a3B": (30.5, 3.3),
    "Qwen3_235B_a22B": (235, 22), "GPT OSS 120B": (116.8, 5.1), "GPT OSS 20B": (20.9, 3.6), "Kimi_K2": (1026, 32),
    "Nemotron_3_Nano": (31.6, 3.2), "Nemotron_3_Super": (120, 12), "Nemotron_3_Ultra": (550, 55),
    "deepseekv4 flash": (284, 13),
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_published_models_have_the_sizes_of_their_cards(name: str) -> None:
    count, (total, active) = count_parameters(load_shape(name)), CARDS[name]
    assert count.total / 1e9 == pytest.approx(total, rel=0.01)
    assert active is None or count.active / 1e9 == pytest.approx(active, rel=0.1)


def test_every_published_model_is_read() -> None:
    assert all(load_shape(name).layers for name in model_names())
    assert load_shape("DeepSeekV3").layers == load_shape("v3").layers


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": 2**60}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_experts_per_tok": 500}, "num_experts_per_tok"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_a_config_that_does_not_hold_is_refused_by_its_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_hf({**QWEN3_30B, **change})


@pytest.mark.parametrize(
    "change, named",
    [
        ({"layers_block_type": None, "hybrid_override_pattern": 5}, "hybrid_override_pattern is '5'"),
        ({"layers_block_type": [["moe"]]}, "the pattern has"),
        ({"mtp_hybrid_override_pattern": ["M"]}, "mtp_hybrid_override_pattern"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok 129 of 128 experts"),
    ],
)
def test_a_hybrid_that_does_not_hold_is_refused_by_its_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_hf({**NANO, **change})


def test_blocks_of_mtp_count_where_there_is_a_module() -> None:
    """transformers 5 writes ``mtp_layers_block_type`` into each file, with 0 modules too."""
    table = {**NANO, "mtp_layers_block_type": ["full_attention", "moe"]}
    assert count_parameters(from_hf({**table, "num_nextn_predict_layers": 1})).mtp > 0
    none = from_hf({**table, "num_nextn_predict_layers": 0})
    assert none.mtp == () and len(none.layers) == len(NANO["layers_block_type"])


def test_a_language_model_inside_another_is_named() -> None:
    table = {"model_type": "mistral3", "vision_config": {}, "text_config": {**MISTRAL}}
    with pytest.raises(ConfigError, match="its text_config is mistral: save that table as a config.json"):
        from_hf(table)
    for inner in ({"model_type": ["mistral"]}, None, "mistral"):
        with pytest.raises(ConfigError, match="one of these: llama"):
            from_hf({**table, "text_config": inner})


def test_a_model_that_is_not_there_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"v3.*Kimi_K2"):
        load_shape("no-such-model")

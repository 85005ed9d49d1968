"""Tiny models with every part switched on."""

from __future__ import annotations

from typing import Any

import pytest

from sprat.config.model import ModelConfig
from sprat.model import Transformer


def tiny(**changes: Any) -> ModelConfig:
    """Two layers, grouped experts, YaRN, an MTP module."""
    table: dict[str, Any] = {
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 20,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "q_lora_rank": 10,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        "routed_scaling_factor": 1.5,
        "initializer_range": 0.3,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
    }
    return ModelConfig(**{**table, **changes})


def tiny_dense(**changes: Any) -> ModelConfig:
    """Two layers of grouped-query attention."""
    table: dict[str, Any] = {
        "architecture": "qwen3",
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    return ModelConfig(**{**table, **changes})


@pytest.fixture(params=["mla", "mla half-split", "gqa"])
def model(request: pytest.FixtureRequest) -> Transformer:
    """One model of each kind of attention."""
    kinds = {"mla": tiny(), "mla half-split": tiny(rope_interleave=False), "gqa": tiny_dense()}
    return Transformer.create(kinds[request.param], 1)

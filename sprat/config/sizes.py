"""The size dial: one name derives every number of a model.

``pico`` to ``small`` are DeepSeek-V3 models that an ordinary CPU can train; ``v2-lite``, ``v2`` and ``v3`` are
the published shapes (DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437). In all of them a dense
layer is as wide as what an expert layer activates, so ``dense=True`` gives the iso-active twin: the same
attention and depth with no router.
"""

from __future__ import annotations

from typing import Any

from sprat.config.base import parse
from sprat.config.model import ModelConfig
from sprat.errors import ConfigError


def _small_shape(hidden: int, layers: int, heads: int, experts: int, chosen: int, width: int) -> dict[str, Any]:
    """A DeepSeek-V3 shape for CPUs; ``width`` is ``moe_intermediate_size``."""
    return {
        "architecture": "deepseek_v3",
        "vocab_size": 1024,
        "hidden_size": hidden,
        "intermediate_size": (chosen + 1) * width,
        "moe_intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "kv_lora_rank": max(32, hidden // 4),
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": chosen,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 2048,
        "initializer_range": round(0.5 * hidden**-0.5, 4),
        "tie_word_embeddings": False,
    }


_MAX_VALUE = 2**31  # of any number of a model that a recipe makes
_YARN = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
_V2 = {
    "architecture": "deepseek_v2",
    "vocab_size": 102400,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "max_position_embeddings": 163840,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
_SIZES: dict[str, dict[str, Any]] = {
    "pico": _small_shape(64, 2, 2, 8, 2, 64),
    "nano": _small_shape(96, 3, 3, 16, 2, 96),
    "micro": _small_shape(128, 4, 4, 16, 4, 96),
    "mini": _small_shape(256, 6, 8, 32, 4, 160),
    "small": _small_shape(512, 12, 16, 64, 6, 256),
    "v2-lite": {
        **_V2,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "n_routed_experts": 64,
        "topk_method": "greedy",
    },
    "v2": {
        **_V2,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "n_routed_experts": 160,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "v3": {
        "architecture": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "max_position_embeddings": 163840,
        "initializer_range": 0.006,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}


def size_names() -> list[str]:
    """The names of the dial, smallest first.

    >>> size_names()[0], size_names()[-1]
    ('pico', 'v3')
    """
    return list(_SIZES)


def size(name: str, /, *, dense: bool = False, **changes: Any) -> ModelConfig:
    """The config of size ``name`` with ``changes``; ``dense=True`` makes its dense twin.

    The twin keeps attention, depth and vocabulary; its feed-forward has the width that one token of the
    sparse model activates, ``(num_experts_per_tok + n_shared_experts) * moe_intermediate_size``.

    Raises:
        ConfigError: the name is not on the dial, or the changes do not hold together.
    """
    if name not in _SIZES:
        raise ConfigError(f"no size is called {name!r}", where="size", todo=f"use one of {', '.join(size_names())}")
    if not isinstance(dense, bool):
        raise ConfigError(f"dense is {dense!r}", where=f"size {name}", todo="give true or false")
    for key, value in changes.items():
        if isinstance(value, (int, float)) and not abs(value) < _MAX_VALUE:
            raise ConfigError(f"{key} is {value}", where=f"size {name}", todo=f"give less than {_MAX_VALUE}")
    table = {**_SIZES[name], **changes}
    if dense:
        active = (table["num_experts_per_tok"] + table["n_shared_experts"]) * table["moe_intermediate_size"]
        experts = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
        table |= {**dict.fromkeys(experts, 0), "n_group": 1, "topk_group": 1, "intermediate_size": active}
    return parse(ModelConfig, table, where=f"size {name}")

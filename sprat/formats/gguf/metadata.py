"""The metadata of a model's shape: ``config`` read backwards, in the keys that llama.cpp's converter writes.

llama.cpp computes four families of ours, each in one way. A config that asks for another way would load there and say
something else, so it is refused by name: windows, biases and groups that llama.cpp does not have, pairs of channels
that lie as halves in latent attention, YaRN that sharpens otherwise.
"""

from __future__ import annotations

import math

from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError
from sprat.formats.gguf.header import Value
from sprat.model.mla import LATENT_NORM_EPS
from sprat.model.rope import inverse_frequencies

ARCHITECTURE = {"mistral": "llama", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2"}  # others keep their name
_GATING = {"softmax": 1, "sigmoid": 2}
_LITE = (26, 27)  # layers of a deepseek2 model that llama.cpp takes to have no q_lora_rank, whatever the file says


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the family."""
    return ARCHITECTURE.get(config.architecture, config.architecture)


def config_keys(config: ModelConfig) -> dict[str, Value]:
    """The keys of ``config``, their architecture before them.

    Raises:
        CheckpointError: llama.cpp computes no such model; the sentence names the field.
    """
    check_config(config)
    table: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_theta),
        **_rope_keys(config),
        **(_deepseek_keys(config) if config.is_mla else _dense_keys(config)),
    }
    return {f"{architecture(config)}.{key}": value for key, value in table.items()}


def _dense_keys(config: ModelConfig) -> dict[str, Value]:
    """Keys of grouped-query attention."""
    return {
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.attention_head_dim,
        "attention.value_length": config.attention_head_dim,
        "rope.dimension_count": config.attention_head_dim,
    }


def _deepseek_keys(config: ModelConfig) -> dict[str, Value]:
    """Keys of latent attention, which llama.cpp runs as one wide key head, and of experts."""
    table: dict[str, Value] = {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config.q_lora_rank or 0,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "expert_feed_forward_length": config.moe_intermediate_size or config.intermediate_size,
        "expert_shared_count": config.n_shared_experts,
    }
    if not config.n_routed_experts or config.first_k_dense_replace >= config.num_hidden_layers:
        return table | {"leading_dense_block_count": config.num_hidden_layers}
    table |= {
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": config.norm_topk_prob and config.architecture == "deepseek_v3",
        "expert_gating_func": _GATING[config.scoring_func],
    }
    if config.limits_groups:
        table |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return table


def _rope_keys(config: ModelConfig) -> dict[str, Value]:
    """Keys of stretched positions; those of Llama 3 are a tensor instead."""
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind not in ("linear", "yarn"):
        return {}
    factor = float(scaling["factor"])
    table: dict[str, Value] = {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "linear":
        return table
    original = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
    table |= {
        "rope.scaling.original_context_length": int(original),
        "rope.scaling.yarn_beta_fast": float(scaling.get("beta_fast") or 32),
        "rope.scaling.yarn_beta_slow": float(scaling.get("beta_slow") or 1),
    }
    if config.is_mla:
        return table | {"rope.scaling.yarn_log_multiplier": 0.1 * scaling["mscale_all_dim"]}
    usual = 0.1 * math.log(factor) + 1.0  # how YaRN sharpens where nothing is said
    sharper = inverse_frequencies(config)[1] / usual
    return table if abs(sharper - 1) < 1e-6 else table | {"rope.scaling.attn_factor": sharper}


def check_config(config: ModelConfig) -> None:
    """Refuse what llama.cpp would compute otherwise.

    Raises:
        CheckpointError: naming the field.
    """
    fault = _deepseek_fault(config) if config.is_mla else _dense_fault(config)
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind == "llama3" and architecture(config) != "llama":
        fault = f"rope_scaling: llama3 is known there for llama only, not for {config.architecture}"
    elif kind == "yarn" and not scaling.get("truncate", True):
        fault = "rope_scaling: YaRN without truncate"
    if fault:
        todo = "save it as a folder: transformers and vLLM load that"
        raise CheckpointError(f"llama.cpp computes no such model: {fault}", where="config", todo=todo)


def _dense_fault(config: ModelConfig) -> str:
    """What llama.cpp lacks for a model with grouped-query attention; "" if nothing."""
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        return f"sliding_window={window}"
    if config.architecture == "qwen3" and config.attention_bias:
        return "attention_bias of qwen3"
    if config.architecture == "qwen2" and config.attention_head_dim * config.num_attention_heads != config.hidden_size:
        return "head_dim of qwen2 that is not hidden_size / num_attention_heads"
    return ""


def _deepseek_fault(config: ModelConfig) -> str:
    """What llama.cpp lacks for a model with latent attention; "" if nothing."""
    scaling = config.rope_scaling or {}
    everywhere = scaling.get("mscale_all_dim")
    if config.attention_bias:
        return "attention_bias of deepseek"
    if not config.rope_interleave and config.architecture == "deepseek_v3":
        return "rope_interleave=false"
    if config.rms_norm_eps != LATENT_NORM_EPS:
        return f"rms_norm_eps={config.rms_norm_eps:g} beside norms of latents, which have {LATENT_NORM_EPS:g}"
    if config.q_lora_rank and config.num_hidden_layers in _LITE:
        return f"q_lora_rank in a model of {config.num_hidden_layers} layers"
    if scaling.get("rope_type") == "linear":
        return "rope_scaling: linear in latent attention"
    if scaling.get("rope_type") == "yarn" and not (everywhere and inverse_frequencies(config)[1] == 1):
        return "rope_scaling: YaRN in latent attention whose mscale is not mscale_all_dim"
    if config.n_routed_experts and config.first_k_dense_replace < config.num_hidden_layers:
        if not config.n_shared_experts:
            return "n_shared_experts=0"
        if config.limits_groups and config.topk_method != "noaux_tc":
            return f"topk_method={config.topk_method!r}, which ranks a group by its best expert"
    return ""

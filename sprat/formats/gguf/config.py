"""The config of a GGUF file: its metadata keys under the names that our config has.

Keys are ``<architecture>.<what>``; ``keys`` knows which are understood. What the file leaves open is decided as
llama.cpp does: no ``output.weight`` means that the head is the embedding, no gating function means softmax, no scale of
the experts' weights means one, and a bias that is not there is zero.

Two things are not keys but tensors. ``rope_freqs.weight`` holds the divisors of the rotary frequencies that Llama 3
computes from four numbers; the four are found again, else the file is refused. And whether DeepSeek's router has a
correction bias shows in ``exp_probs_b``. DeepSeek's ``mscale`` is not in the file: it is taken to be
``mscale_all_dim``, as in every published checkpoint (llama.cpp assumes the same).
"""

from __future__ import annotations

import math
import re
import struct
from typing import Any

from sprat.config.base import parse
from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError, ConfigError
from sprat.formats.gguf.header import Header
from sprat.formats.gguf.keys import Keys, check_keys

_SOFTMAX, _SIGMOID = 1, 2
_BIAS = re.compile(r"blk\.\d+\.attn_(q|k|v|output)\.bias")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_config(header: Header) -> ModelConfig:
    """The config of the model in ``header``.

    Raises:
        CheckpointError: a key is missing, has no sense, or asks for what this code does not compute.
    """
    keys = Keys(header)
    check_keys(keys)
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise keys.fault("split.count", "this is one part of a model", "merge the parts (llama-gguf-split --merge)")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError("tensor 'token_embd.weight' is missing", where=str(header.path), todo="fetch it again")
    table: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": keys.integer("attention.head_count"),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.real("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **_ids(keys),
        **(_deepseek(keys) if keys.kind == "deepseek2" else _dense(keys)),
    }
    table["rope_scaling"] = _rope_scaling(keys, table)
    try:
        return parse(ModelConfig, table, where=str(header.path))
    except ConfigError as error:
        raise CheckpointError(error.what, where=error.where, todo="convert the model again") from None


def _dense(keys: Keys) -> dict[str, Any]:
    """Keys of grouped-query attention."""
    if keys.integer("expert_count", 0):
        raise keys.fault(f"{keys.kind}.expert_count", "experts are known for deepseek2 only", "use another model")
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    width = keys.integer("attention.key_length", hidden // max(1, heads))
    if keys.integer("attention.value_length", width) != width or keys.integer("rope.dimension_count", width) != width:
        what = f"heads of {width} must turn, and keep, all of themselves"
        raise keys.fault(f"{keys.kind}.rope.dimension_count", what)
    return {
        "architecture": keys.kind,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": width,
        "attention_bias": keys.kind == "qwen2" or any(_BIAS.fullmatch(name) for name in keys.header.tensors),
    }


def _deepseek(keys: Keys) -> dict[str, Any]:
    """Keys of latent attention and of experts; prediction modules stand behind the layers, if they are there."""
    tensors = keys.header.tensors
    later = keys.integer("nextn_predict_layers", 0)
    layers, dense = keys.integer("block_count") - later, keys.integer("leading_dense_block_count", 0)
    split = keys.has("attention.key_length_mla")
    width = keys.integer("attention.key_length_mla" if split else "attention.key_length")
    turning = keys.integer("rope.dimension_count")
    table: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": later if f"blk.{layers}.nextn.eh_proj.weight" in tensors else 0,
        "q_lora_rank": keys.integer("attention.q_lora_rank") if "blk.0.attn_q_a.weight" in tensors else None,
        "kv_lora_rank": keys.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": turning,
        "qk_nope_head_dim": max(0, width - turning),
        "v_head_dim": keys.integer("attention.value_length_mla" if split else "attention.value_length"),
    }
    experts = keys.integer("expert_count", 0)
    if not experts or dense >= layers:
        return {**table, "architecture": "deepseek_v3"}
    gating = keys.integer("expert_gating_func", 0) or _SOFTMAX
    if gating not in (_SOFTMAX, _SIGMOID):
        raise keys.fault("deepseek2.expert_gating_func", f"function {gating} is not known")
    corrected = f"blk.{dense}.exp_probs_b.bias" in tensors
    groups = keys.integer("expert_group_count", 1) or 1
    normed = keys.header.metadata.get("deepseek2.expert_weights_norm")
    greedy = "group_limited_greedy" if groups > 1 else "greedy"
    return table | {
        "architecture": "deepseek_v3" if corrected or normed or gating == _SIGMOID else "deepseek_v2",
        "n_routed_experts": experts,
        "n_shared_experts": keys.integer("expert_shared_count", 0),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "first_k_dense_replace": dense,
        "n_group": groups,
        "topk_group": keys.integer("expert_group_used_count", 1) or 1,
        "norm_topk_prob": bool(normed),
        "routed_scaling_factor": keys.real("expert_weights_scale", 1.0) or 1.0,
        "scoring_func": "sigmoid" if gating == _SIGMOID else "softmax",
        "topk_method": "noaux_tc" if corrected else greedy,
    }


def _ids(keys: Keys) -> dict[str, int | list[int]]:
    """The ids of special tokens that the file names."""
    metadata = keys.header.metadata
    table: dict[str, int | list[int]] = {}
    for ours, theirs in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if type(value) is int:
            table[ours] = value
    turns = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eot", "eom")]
    ends = {end for end in (table.get("eos_token_id"), *turns) if type(end) is int}  # of a text, a turn, a message
    return table | ({"eos_token_id": sorted(ends)} if len(ends) > 1 else {})


def _rope_scaling(keys: Keys, table: dict[str, Any]) -> dict[str, Any] | None:
    """``rope_scaling`` of the config, from keys or from the divisors in ``rope_freqs.weight``.

    A factor without a type stretches evenly, and ``attn_factor`` multiplies YaRN's own sharpening, as in llama.cpp.
    """
    if "rope_freqs.weight" in keys.header.tensors:
        if keys.real("rope.scaling.factor", 0.0) or keys.real("rope.scale_linear", 0.0):
            raise keys.fault(f"{keys.kind}.rope.scaling.factor", "this is not supported beside rope_freqs.weight")
        return _llama3(keys, table)
    kind = keys.header.metadata.get(f"{keys.kind}.rope.scaling.type", "linear")
    factor = keys.real("rope.scaling.factor", 0.0) or keys.real("rope.scale_linear", 0.0) or 1.0
    sharper = keys.real("rope.scaling.attn_factor", 1.0) or 1.0
    if kind != "yarn" and sharper != 1:
        raise keys.fault(f"{keys.kind}.rope.scaling.attn_factor", f"{sharper:g} is known with yarn only")
    if kind == "none" or (factor == 1 and kind == "linear"):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or factor < 1:
        raise keys.fault(f"{keys.kind}.rope.scaling.type", f"{kind!r} by {factor} is not known")
    for key in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"):
        if keys.real(key, 1.0) not in (1.0, -1.0):  # -1: as usual
            raise keys.fault(f"{keys.kind}.{key}", "only 1 is supported")
    original = keys.integer("rope.scaling.original_context_length", table["max_position_embeddings"])
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": keys.real("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.real("rope.scaling.yarn_beta_slow", 1.0),
    }
    everywhere = keys.real("rope.scaling.yarn_log_multiplier", 0.0) * 10  # the converter writes a tenth of it
    if everywhere and keys.kind != "deepseek2":
        raise keys.fault(f"{keys.kind}.rope.scaling.yarn_log_multiplier", "this is known for deepseek2 only")
    if everywhere:
        scaling |= {"mscale": round(everywhere, 6), "mscale_all_dim": round(everywhere, 6)}
    if sharper != 1:
        scaling["attention_factor"] = sharper * (1.0 if everywhere else 0.1 * math.log(factor) + 1.0)
    return scaling


def _llama3(keys: Keys, table: dict[str, Any]) -> dict[str, Any]:
    """The four numbers of Llama 3 whose divisors ``rope_freqs.weight`` holds."""
    from sprat.model.rope import inverse_frequencies

    entry = keys.header.tensors["rope_freqs.weight"]
    half = table.get("head_dim", 0) // 2
    fault = keys.fault("rope_freqs.weight", "these are not the frequencies of Llama 3", "use another model")
    if entry.kind.name != "F32" or entry.shape != (half,) or table["rope_theta"] <= 0 or half > 1 << 16:
        raise fault
    with open(keys.header.path, "rb") as stream:
        stream.seek(entry.offset)
        divisors = struct.unpack(f"<{half}f", stream.read(entry.nbytes))
    scaling = {"rope_type": "llama3", "factor": round(max(divisors), 3), **_LLAMA3}
    if not 1 <= scaling["factor"] <= 1e6:
        raise fault
    bare = parse(ModelConfig, {**table, "rope_scaling": None}, where=str(keys.header.path))
    plain, _ = inverse_frequencies(bare)
    stretched, _ = inverse_frequencies(bare.replace(rope_scaling=scaling))
    if any(abs(float(a / b) / d - 1) > 1e-3 for a, b, d in zip(plain, stretched, divisors, strict=True) if d > 0):
        raise fault
    return scaling

"""What a Hugging Face ``config.json`` says, key by key: read, without effect on what is computed, or not understood.

There are three lists and no fourth. A key that is read reaches ``ModelConfig``, or must have the one value that this
code computes; a key of bookkeeping changes nothing (which library wrote it, how it was trained: dropout and the losses
of a router are for our recipes to decide); any other key that says something is named in a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from sprat.errors import ConfigError

WindowKeys = dict[str, Any]
SLIDING, FULL = "sliding_attention", "full_attention"
# fmt: off
_SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu", "swish"), "mlp_bias": (None, False), "moe_layer_freq": (None, 1),
    "quantization_config": (None,), "partial_rotary_factor": (None, 1, 1.0), "tie_encoder_decoder": (None, False),
    "is_encoder_decoder": (None, False), "add_cross_attention": (None, False), "cross_attention_hidden_size": (None,),
}
_READ_KEYS = {
    "model_type", "num_mtp_layers", "rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "original_max_position_embeddings",
}
_IGNORED_KEYS = {
    "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path",
    "use_cache", "pretraining_tp", "ep_size", "attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout",
    "aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "output_router_logits", "use_bfloat16", "num_experts",
    "num_local_experts", "attn_implementation", "_attn_implementation", "_commit_hash", "id2label", "label2id",
    "problem_type", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward",
    "finetuning_task", "task_specific_params", "torchscript", "pruned_heads", "is_decoder", "tokenizer_class",
    "prefix", "bos_token", "eos_token", "pad_token", "sep_token_id", "decoder_start_token_id", "unk_token_id",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "tf_legacy_loss",
    "model_max_length", "head_dim", "qk_head_dim", "num_key_value_heads", "rope_interleave", "unsloth_version",
    "unsloth_fixed",
}
_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "attention_factor", "low_freq_factor", "high_freq_factor", "truncate", "partial_rotary_factor",
    "finetuned",
}
# fmt: on


def check_keys(table: dict[str, Any], fields: Iterable[str], where: str) -> None:
    """Refuse values that this code does not compute; warn of keys that it does not know.

    Args:
        fields: the keys that become fields of the config.

    Raises:
        ConfigError: a known key has a value that asks for other arithmetic.
    """
    for key, allowed in _SUPPORTED_VALUES.items():
        if table.get(key) not in allowed:
            todo = "convert the checkpoint to the plain form"
            raise ConfigError(f"{key}={table[key]!r} is not supported", where=where, todo=todo)
    known_keys = {*fields, *_READ_KEYS, *_SUPPORTED_VALUES, *_IGNORED_KEYS}
    unknown = [f"{k}={str(v)[:40]}" for k, v in sorted(table.items()) if k not in known_keys and v not in (None, False)]
    if unknown:
        warnings.warn(f"{where}: not understood and not used: {', '.join(unknown)}", stacklevel=4)


def parse_rope(table: dict[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling or None) from the classic or the newer form of config.json.

    What is left out is decided as transformers does: the context of the training is ``max_position_embeddings``; and
    of two forms that differ the classic one counts, which is where people write what they add.

    Raises:
        ConfigError: a key is not understood, there is a factor without a type, or only a part of each head turns.
    """
    scope, rope_table = f"{where}: rope_scaling", table.get("rope_scaling") or table.get("rope_parameters") or {}
    if not isinstance(rope_table, dict):
        raise ConfigError("it is no table", where=scope, todo="write its rope_type and factor")
    merged = {key: value for key, value in rope_table.items() if value is not None}
    if unknown := sorted(merged.keys() - _ROPE_KEYS):
        raise ConfigError(f"{unknown[0]!r} is not understood", where=scope, todo="use yarn, llama3 or linear")
    if merged.pop("partial_rotary_factor", 1) != 1:
        raise ConfigError("partial_rotary_factor: heads must turn whole", where=scope, todo="use another model")
    theta = merged.pop("rope_theta", None) or table.get("rope_theta") or 10000.0
    kinds = [merged.pop(key, None) for key in ("rope_type", "type")]
    kind = kinds[0] or kinds[1] or "default"
    merged.pop("finetuned", None)
    if kind == "default":
        if merged.get("factor", 1) != 1:
            raise ConfigError("there is a factor and no type", where=scope, todo="add the rope_type: yarn or linear")
        return float(theta), None
    if kind in ("yarn", "llama3"):
        top_level = table.get("original_max_position_embeddings")
        original = top_level or merged.get("original_max_position_embeddings") or table.get("max_position_embeddings")
        if original is not None:
            merged["original_max_position_embeddings"] = original
    return float(theta), {"rope_type": kind, **merged}


def parse_window(table: dict[str, Any], layers: int, where: str) -> WindowKeys:
    """``sliding_window`` and ``layer_types`` of our config: empty where every layer sees everything.

    Mistral's window is every layer's, and 4096 where the file does not speak of it; Qwen's is used where
    ``use_sliding_window`` says so, by the layers of ``layer_types``, or those from ``max_window_layers`` on.

    Raises:
        ConfigError: the layers are not described, or a family without windows asks for one.
    """
    kind, window, types = table["model_type"], table.get("sliding_window"), table.get("layer_types")
    if kind == "mistral":
        window = table.get("sliding_window", 4096)
        return {} if window is None else {"sliding_window": window}
    describes = isinstance(types, list) and len(types) == layers and all(each in (SLIDING, FULL) for each in types)
    if types is not None and not describes:
        todo = f"give {layers} of {FULL} and {SLIDING}"
        raise ConfigError("layer_types does not describe the layers", where=where, todo=todo)
    if kind not in ("qwen2", "qwen3"):
        if window is not None or table.get("use_sliding_window") or SLIDING in (types or []):
            what = f"use_sliding_window, sliding_window: {kind} has no windows"
            raise ConfigError(what, where=where, todo="use mistral, qwen2 or qwen3")
        return {}
    active_window = window if table.get("use_sliding_window") else None
    if active_window is None:
        if SLIDING in (types or []):
            todo = "set use_sliding_window and sliding_window"
            raise ConfigError(f"layer_types has {SLIDING}, and there is no window", where=where, todo=todo)
        return {}
    first_sliding = table.get("max_window_layers", 28)
    if type(first_sliding) is not int:
        raise ConfigError(f"max_window_layers={first_sliding!r} is no number of layers", where=where, todo="correct it")
    layer_types = types or [FULL if layer < first_sliding else SLIDING for layer in range(layers)]
    return {"sliding_window": active_window, "layer_types": layer_types} if SLIDING in layer_types else {}


def window_to_hf(kind: str, window: int | None, types: tuple[str, ...] | None, layers: int) -> WindowKeys:
    """The keys of config.json that say what ``parse_window`` reads; empty for families that have no windows."""
    if kind == "mistral":
        return {"sliding_window": window}
    if kind not in ("qwen2", "qwen3"):
        return {}
    if window is None:
        return {"use_sliding_window": False}
    layer_types = list(types or [SLIDING] * layers)
    first = layer_types.index(SLIDING)
    return {
        "use_sliding_window": True, "sliding_window": window, "max_window_layers": first, "layer_types": layer_types,
    }  # fmt: skip

"""The keys of a GGUF file: those that are read, those that change nothing, and no others.

Whatever stands under ``<architecture>.`` may change what is computed. So a key there is read, or says with its value
that it asks for nothing (0, false, empty; a factor of 1), or the file is refused by its name. llama.cpp ignores keys
that it does not know; what it computes then is not what the key's author meant. Keys of a vocabulary that are not known
are named in a warning, as are those of areas that nobody here has heard of.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from sprat.errors import CheckpointError
from sprat.formats.gguf.header import Header

ARCHITECTURES = ("llama", "qwen2", "qwen3", "deepseek2")
# fmt: off
_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "attention.causal", "attention.sliding_window", "expert_count", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
}
_READ_DEEPSEEK = {
    "leading_dense_block_count", "nextn_predict_layers", "attention.q_lora_rank", "attention.kv_lora_rank",
    "attention.key_length_mla", "attention.value_length_mla", "expert_used_count", "expert_group_count",
    "expert_group_used_count", "expert_shared_count", "expert_feed_forward_length", "expert_weights_scale",
    "expert_weights_norm", "expert_gating_func", "expert_shared_feed_forward_length",
}
_FACTORS = {"logit_scale", "residual_scale", "embedding_scale", "attention.output_scale", "expert_group_scale"}
_TOKENIZER_KEYS = {
    "model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_eos_token", "add_space_prefix",
    "token_type_count", "remove_extra_whitespaces", "precompiled_charsmap", "add_sep_token", "bos_token_id",
    "eos_token_id", "eot_token_id", "eom_token_id", "unknown_token_id", "seperator_token_id", "padding_token_id",
    "mask_token_id", "cls_token_id", "fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id", "fim_pad_token_id",
    "fim_rep_token_id", "fim_sep_token_id", "prefix_token_id", "suffix_token_id", "middle_token_id", "eog_token_ids",
}
_AREAS = {"general", "tokenizer", "split", "quantize", "imatrix", "mradermacher", "ollama", "unsloth"}
_OTHER_FILES = {"adapter", "clip", "diffusion", "xielu"}  # areas of files that are no model of ours
# fmt: on


class Keys:
    """The metadata of one architecture, typed."""

    def __init__(self, header: Header) -> None:
        self.header = header
        kind = header.metadata.get("general.architecture")
        if kind not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise self.fault("general.architecture", f"{kind!r} is not known", f"use one of {known}")
        self.kind = str(kind)

    def integer(self, key: str, default: int | None = None) -> int:
        """A natural number; an array of equal ones, one a layer, counts as that number."""
        value = self.header.metadata.get(f"{self.kind}.{key}", default)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]
        if type(value) is not int or value < 0:
            why = "it is missing" if value is None else f"{str(value)[:60]} is no size"
            raise self.fault(f"{self.kind}.{key}", why)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A number."""
        value = self.header.metadata.get(f"{self.kind}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fault(f"{self.kind}.{key}", "it is missing" if value is None else "it is no number")
        return float(value)

    def has(self, key: str) -> bool:
        """Whether the file says anything of ``key``."""
        return f"{self.kind}.{key}" in self.header.metadata

    def fault(self, key: str, why: str, todo: str = "convert the model again") -> CheckpointError:
        """The sentence about one key."""
        return CheckpointError(f"key {key!r}: {why}", where=str(self.header.path), todo=todo)


def check_keys(keys: Keys) -> None:
    """Refuse what would change the result and is not understood; warn of what nobody here knows.

    Raises:
        CheckpointError: naming the key.
    """
    metadata, unknown = keys.header.metadata, []
    kind, version = metadata.get("general.type", "model"), metadata.get("general.quantization_version", 2)
    if kind != "model":
        raise keys.fault("general.type", f"this is no model but {str(kind)[:40]!r}", "give the file of the model")
    if isinstance(version, int) and version > 2:
        raise keys.fault("general.quantization_version", f"version {version} is not known")
    for key, value in metadata.items():
        area, _, rest = key.partition(".")
        if area == keys.kind:
            _check_key(keys, rest, value)
        elif area in _OTHER_FILES or area in ARCHITECTURES:
            raise keys.fault(key, f"this is not understood beside a model of {keys.kind}")
        elif rest.startswith("ggml."):
            unknown += [] if rest[5:] in _TOKENIZER_KEYS or _is_neutral(rest, value) else [key]
        elif area not in _AREAS:
            unknown.append(key)
    if metadata.get("tokenizer.ggml.add_eos_token") is True:
        unknown.append("tokenizer.ggml.add_eos_token")  # an end before the answer
    if unknown:
        warnings.warn(f"{keys.header.path}: not understood and not used: {', '.join(unknown)[:400]}", stacklevel=4)


def _check_key(keys: Keys, key: str, value: Any) -> None:
    """Refuse one key of the architecture."""
    name, deepseek = f"{keys.kind}.{key}", keys.kind == "deepseek2"
    if key == "attention.causal" and value is not True:
        raise keys.fault(name, "attention to later tokens is not supported", "use a model that generates text")
    if key == "attention.sliding_window":
        window, context = keys.integer(key, 0), keys.integer("context_length")
        if 0 < window < context:
            raise keys.fault(name, "this is not supported: which layers slide is not in the file", "use the folder")
    if key in _READ or (deepseek and key in _READ_DEEPSEEK) or _is_neutral(key, value):
        return
    if key == "tensor_data_layout" and value == "Meta AI original pth":
        return  # the order of rows that every file has
    if not deepseek and key.startswith("expert_") and keys.integer("expert_count", 0) == 0:
        return
    raise keys.fault(name, f"its value {str(value)[:40]} is not understood", "use the folder it was made from")


def _is_neutral(key: str, value: Any) -> bool:
    """Whether ``value`` asks for nothing."""
    values = value if isinstance(value, list) else [value]
    neutral: tuple[Any, ...] = (1.0, 0) if key in _FACTORS else (0, "", "none")
    return all(item in neutral for item in values)

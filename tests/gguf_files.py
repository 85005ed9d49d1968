"""GGUF files for tests, written as llama.cpp's converter writes them, with the ``gguf`` package's names."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sprat.formats.gguf import decode
from sprat.formats.hf import disk_names
from sprat.model import Transformer

gguf: Any = pytest.importorskip("gguf")
Kind = Callable[[str], str]
LIKE = {"mistral": "llama"}  # what the converter makes of it
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class Reader(gguf.GGUFReader):  # type: ignore[misc]
    """The package's reader over a plain array: slices of numpy's memory maps cost it most of a large vocabulary."""

    @property
    def data(self) -> np.ndarray:
        """The file's bytes."""
        return self._bytes

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._bytes = np.asarray(mapped)


def write(
    model: Transformer,
    path: Path,
    *,
    kind: Kind = lambda name: "F32",
    split: bool = True,
    extra: dict[str, Tensor] | None = None,
    keys: dict[str, Any] | None = None,
    without: str = "",
) -> Path:
    """``model`` as a GGUF file.

    Args:
        kind: name in the file -> tensor type of a matrix; vectors are F32.
        split: whether DeepSeek's kv_b_proj is written as its two halves.
        extra: more tensors, by their names in the file.
        keys: keys to set last; None leaves one out.
        without: pattern of names of tensors that are left out.
    """
    config = model.config
    arch = "deepseek2" if config.is_mla else LIKE.get(config.architecture, config.architecture)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**converter_keys(model, arch, split), **vocabulary(config.vocab_size), **(keys or {})}.items():
        if value is not None:
            _add(writer, key, value)
    for name, tensor in {**tensors(model, split=split), **(extra or {})}.items():
        if without and re.search(without, name):
            continue
        array = tensor.detach().float().numpy()
        chosen = gguf.GGMLQuantizationType[kind(name) if array.ndim > 1 else "F32"]
        random = chosen.name.endswith("_K")
        data = random_blocks(array.shape, chosen) if random else gguf.quants.quantize(array, chosen)
        writer.add_tensor(name, data, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(model: Transformer, *, split: bool = True) -> dict[str, Tensor]:
    """Name in the file -> weight, converted as ``convert_hf_to_gguf`` does it."""
    config = model.config
    arch = (
        gguf.MODEL_ARCH.DEEPSEEK2
        if config.is_mla
        else gguf.MODEL_ARCH[LIKE.get(config.architecture, config.architecture).upper()]
    )
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("mtp.") or (name == "head.weight" and config.tie_word_embeddings):
            continue
        foreign = disk_names(name, config)[0].replace(".experts.0.", ".experts.")
        if foreign.endswith("e_score_correction_bias"):
            foreign = foreign.replace("e_score_correction_bias", "e_score_correction.bias")
        if foreign.endswith("kv_b_proj.weight") and split:
            nope, value = config.qk_nope_head_dim, config.v_head_dim
            keys, values = tensor.view(config.num_attention_heads, nope + value, -1).split((nope, value), 1)
            parts = {"k_b_proj": keys.transpose(1, 2).contiguous(), "v_b_proj": values.contiguous()}
        else:
            parts = {"": tensor}
        for leaf, part in parts.items():
            there = table.get_name(foreign.replace("kv_b_proj", leaf) if leaf else foreign, (".weight", ".bias"))
            assert there, foreign
            if arch == gguf.MODEL_ARCH.LLAMA and (".attn_q." in there or ".attn_k." in there):
                heads = part.shape[0] // config.attention_head_dim
                part = part.view(heads, 2, -1, *part.shape[1:]).transpose(1, 2).reshape(part.shape)
            found[there] = part
    return found


def random_blocks(shape: tuple[int, ...], kind: Any, seed: int = 0) -> np.ndarray[Any, Any]:
    """Bytes of a tensor of a type that the package can only read: any bits, with factors of a sound size."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    rows = int(np.prod(shape)) // shape[-1]
    blocks = np.random.default_rng(seed).integers(0, 256, (rows, shape[-1] // weights, size), dtype=np.uint8)
    places, largest = {
        "Q2_K": ((80, 82), 3e-3), "Q3_K": ((108,), 4e-4), "Q4_K": ((0, 2), 4e-4), "Q5_K": ((0, 2), 2e-4),
        "Q6_K": ((208,), 2e-5),
    }[kind.name]  # fmt: skip
    for at in places:
        factor = np.random.default_rng(seed + 1).uniform(largest / 4, largest, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = factor[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def converter_keys(model: Transformer, arch: str, split: bool) -> dict[str, Any]:
    """The converter's keys of the model's shape."""
    config = model.config
    table: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1 if config.is_mla else config.kv_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        **_rope_keys(model),
    }
    if not config.is_mla:
        table |= {
            "attention.key_length": config.attention_head_dim,
            "attention.value_length": config.attention_head_dim,
        }
        return {f"{arch}.{key}": value for key, value in table.items()}
    whole = config.qk_head_dim
    table |= {
        "leading_dense_block_count": config.first_k_dense_replace
        if config.n_routed_experts
        else config.num_hidden_layers,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim if split else whole,
        "attention.value_length": config.kv_lora_rank if split else config.v_head_dim,
        "attention.key_length_mla": whole if split else None,
        "attention.value_length_mla": config.v_head_dim if split else None,
        "rope.dimension_count": config.qk_rope_head_dim,
        "expert_feed_forward_length": config.moe_intermediate_size or config.intermediate_size,
        "expert_shared_count": config.n_shared_experts,
    }
    if config.n_routed_experts:
        table |= {
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
            "expert_weights_scale": config.routed_scaling_factor,
            "expert_weights_norm": True if config.norm_topk_prob else None,
            "expert_gating_func": 2 if config.scoring_func == "sigmoid" else 1,
        }
    return {f"{arch}.{key}": value for key, value in table.items()}


def _rope_keys(model: Transformer) -> dict[str, Any]:
    """The converter's keys of stretched positions."""
    scaling = model.config.rope_scaling or {}
    if scaling.get("rope_type") not in ("linear", "yarn"):
        return {}
    table = {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": float(scaling["factor"])}
    if scaling["rope_type"] == "yarn":
        table["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
        for key in ("beta_fast", "beta_slow"):
            if key in scaling:
                table[f"rope.scaling.yarn_{key}"] = float(scaling[key])
        if "mscale_all_dim" in scaling:
            table["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling["mscale_all_dim"]
    return table


def decoded_here(
    command: list[str], *, input: str, pass_fds: tuple[int, int], **_: Any
) -> subprocess.CompletedProcess[str]:
    """What the reading process does, without the process: numpy's start would be most of what a tiny file costs."""
    assert command[1:3] == ["-m", decode.__name__]
    for row in json.loads(input):
        decode.decode(decode.Job(**row), *pass_fds)
    return subprocess.CompletedProcess(command, 0, "{}", "")


def vocabulary(size: int) -> dict[str, Any]:
    """A byte-level vocabulary of at most ``size`` tokens: two that steer, letters, and joins of them."""
    pairs = [left + right for left in ALPHABET for right in ALPHABET if left + right != "ab"]
    tokens = ["<|im_end|>", "<|im_start|>", "a", "b", "ab", *ALPHABET[2:], *pairs][:size]
    merges = [f"{token[0]} {token[1]}" for token in tokens[2:] if len(token) == 2]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 2)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
    }


def _add(writer: Any, key: str, value: Any) -> None:
    """Set a key with the type that the converter gives it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def torch_of(array: np.ndarray[Any, Any]) -> Tensor:
    """``array`` as a tensor of its own."""
    return torch.from_numpy(np.array(array))

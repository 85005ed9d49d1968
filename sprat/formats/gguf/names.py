"""Which tensors of a GGUF file make up ours, and what must be done to them on the way.

Three things differ from the published checkpoints. The converter for ``llama`` re-orders the rows of each query and
key head for another rotary layout (pairs side by side); we sort them back, whole rows of codes at a time. The
experts of a layer are one tensor of three dimensions, as ours are. And ``deepseek2`` files hold DeepSeek's
``kv_b_proj`` either whole or as its two halves, the keys' half transposed for the absorbed product
(``attn_k_b`` [heads, rank, nope], ``attn_v_b`` [heads, value, rank]). Blocks of a half that was transposed lie along
another dimension than ours, so halves are put together as plain float32 numbers: small, and the only place where a
quantized tensor does not stay one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sprat.config.model import ModelConfig
from sprat.formats.gguf.header import Header

_TOP = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}
# fmt: off
_IN_BLOCK = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "enorm": "nextn.enorm", "hnorm": "nextn.hnorm", "eh_proj": "nextn.eh_proj", "shared_norm": "nextn.shared_head_norm",
}
_WHOLE = {
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias", "mlp.experts.w_gate_EFD": "ffn_gate_exps.weight",
    "mlp.experts.w_up_EFD": "ffn_up_exps.weight", "mlp.experts.w_down_EDF": "ffn_down_exps.weight",
}
# fmt: on
IGNORED = re.compile(r"rope_freqs\.weight|blk\.\d+\.(attn_rot_embd|nextn\.(embed_tokens|shared_head_head))\.weight")


@dataclass(frozen=True)
class Source:
    """A tensor of the file that makes up ours, or a part of it.

    Attributes:
        name: in the file.
        shape: that it must have.
        reorder, unit: how its rows are reordered; see ``decode.Job``.
        first, every: for a part of a stack of matrices: its first row in each, and the rows of each; 0 for the whole.
    """

    name: str
    shape: tuple[int, ...]
    reorder: str = ""
    unit: int = 1
    first: int = 0
    every: int = 0


def file_name(name: str, config: ModelConfig) -> str:
    """The name in a GGUF file of our tensor ``name``.

    >>> from sprat.config.sizes import size
    >>> file_name("layers.1.mlp.experts.w_up_EFD", size("pico"))
    'blk.1.ffn_up_exps.weight'
    """
    if name in _TOP:
        return _TOP[name]
    group, number, *rest = name.split(".")
    layer = int(number) + (config.num_hidden_layers if group == "mtp" else 0)
    inner = ".".join(rest).removeprefix("block.")
    if inner in _WHOLE:
        return f"blk.{layer}.{_WHOLE[inner]}"
    stem, _, leaf = inner.rpartition(".")
    return f"blk.{layer}.{_IN_BLOCK[stem]}.{leaf}"


def sources(name: str, shape: tuple[int, ...], header: Header, config: ModelConfig) -> list[Source]:
    """The tensors of the file that make up our tensor ``name`` of ``shape``."""
    gguf_name = file_name(name, config)
    if ".attn_kv_b." in gguf_name and gguf_name not in header.tensors:
        heads, rank = config.num_attention_heads, config.kv_lora_rank
        nope, value = config.qk_nope_head_dim, config.v_head_dim
        keys, values = gguf_name.replace("attn_kv_b", "attn_k_b"), gguf_name.replace("attn_kv_b", "attn_v_b")
        return [
            Source(keys, (heads, rank, nope), "transpose", rank, 0, nope + value),
            Source(values, (heads, value, rank), "", value, nope, nope + value),
        ]
    reordered = header.metadata["general.architecture"] == "llama" and re.search(r"\.attn_[qk]\.", gguf_name)
    return [Source(gguf_name, shape, "pairs", config.attention_head_dim) if reordered else Source(gguf_name, shape)]

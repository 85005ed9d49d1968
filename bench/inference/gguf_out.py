"""Write one of our models as a float32 GGUF file for llama.cpp: `llama` for a dense decoder, `deepseek2` for MLA.

llama.cpp's own quantiser then makes Q4_0 and the other classes of it, so that llama.cpp runs exactly the weights that
it would have made itself. Three things are llama.cpp's own way:

- `llama` turns neighbouring channels where Hugging Face's layout turns halves, so the rows of q and k are reordered.
- `deepseek2` wants `kv_b_proj` taken apart: `attn_k_b` [head][rank][nope] (transposed, for the absorbed product) and
  `attn_v_b` [head][value][rank]; with them, and with one key head announced, it runs absorbed attention.
- a model without `q_lora_rank` writes rank 0; only shapes of 26 or 27 layers may leave the key out.
"""

# D hidden, H heads, R kv_lora_rank, n qk_nope_head_dim, v v_head_dim, E experts, F expert width

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sprat.config.model import ModelConfig
from sprat.model import Transformer

_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.w_gate_EFD": "ffn_gate_exps.weight",
    "mlp.experts.w_up_EFD": "ffn_up_exps.weight",
    "mlp.experts.w_down_EDF": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_OUTER = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}


def write(model: Transformer, vocabulary: dict[str, Any], path: Path) -> None:
    """Write ``model`` (llama or deepseek_v3, float32, no MTP) with ``vocabulary`` to ``path``.

    Args:
        vocabulary: ``tokens`` (str, all ids), ``types`` (int), ``merges`` (str), ``pre`` (llama.cpp's name of the
            pre-tokeniser) and ``eos`` (id) of a byte-level BPE.

    Raises:
        KeyError: a tensor of the model has no place in the file.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "deepseek2" if config.is_mla else "llama")
    _shape(writer, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(vocabulary["eos"])
    writer.add_eos_token_id(vocabulary["eos"])
    writer.add_add_bos_token(False)
    for name, tensor in model.state_dict().items():
        if name == "head.weight" and config.tie_word_embeddings:
            continue
        for disk, part in _placed(name, tensor.detach().float(), config):
            writer.add_tensor(disk, part.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shape(writer: Any, config: ModelConfig) -> None:
    """The hyper-parameters of ``config`` under llama.cpp's keys."""
    import gguf

    writer.add_file_type(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if not config.is_mla:
        writer.add_head_count_kv(config.kv_heads)
        writer.add_rope_dimension_count(config.attention_head_dim)
        return
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType[config.scoring_func.upper()])


def _placed(name: str, tensor: Tensor, config: ModelConfig) -> list[tuple[str, Tensor]]:
    """The tensors on disk that our tensor ``name`` becomes."""
    if name.endswith("self_attn.kv_b_proj.weight"):
        layer = name.split(".")[1]
        both = tensor.view(config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank)
        up_HnR, out_HvR = both.split((config.qk_nope_head_dim, config.v_head_dim), 1)
        return [(f"blk.{layer}.attn_k_b.weight", up_HnR.mT), (f"blk.{layer}.attn_v_b.weight", out_HvR)]
    if not config.is_mla and name.endswith(("q_proj.weight", "k_proj.weight")):
        tensor = pair(tensor, config.num_attention_heads if "q_proj" in name else config.kv_heads)
    return [(_disk(name), tensor)]


def _disk(name: str) -> str:
    """The name on disk of our tensor ``name``, where it is one tensor there."""
    if name in _OUTER:
        return _OUTER[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{_BLOCK[rest]}"


def pair(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k, reordered so that a channel and its partner of the other half lie side by side."""
    paired: Tensor = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
    return paired


def unpair(weight: Tensor, heads: int) -> Tensor:
    """Undo ``pair``.

    >>> rows = torch.arange(8.0).unsqueeze(1)
    >>> bool((unpair(pair(rows, 2), 2) == rows).all())
    True
    """
    halves: Tensor = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
    return halves


def read_dense(path: Path) -> tuple[Transformer, dict[str, Any]]:
    """(float32 model, vocabulary) of a `llama` GGUF file, each tensor dequantised by llama.cpp's own reference.

    This does not use the engine's GGUF reader: an oracle must not rest on the code that it judges.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    held = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF")}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = ModelConfig(
        architecture="llama",
        vocab_size=len(held["tokenizer.ggml.tokens"]),
        hidden_size=held["llama.embedding_length"],
        intermediate_size=held["llama.feed_forward_length"],
        num_hidden_layers=held["llama.block_count"],
        num_attention_heads=held["llama.attention.head_count"],
        num_key_value_heads=held["llama.attention.head_count_kv"],
        rope_theta=held["llama.rope.freq_base"],
        rms_norm_eps=held["llama.attention.layer_norm_rms_epsilon"],
        max_position_embeddings=held["llama.context_length"],
        tie_word_embeddings="output.weight" not in tensors,
    )
    model = Transformer(config, seed=None)
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        if name == "head.weight" and config.tie_word_embeddings:
            continue
        tensor = tensors[_disk(name)]
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = unpair(weight, config.num_attention_heads if "q_proj" in name else config.kv_heads)
        state[name] = weight
    model.load_state_dict(state, strict=False)
    stem = "tokenizer.ggml."
    vocabulary = {
        "tokens": held[stem + "tokens"],
        "types": held[stem + "token_type"],
        "merges": held[stem + "merges"],
        "pre": held[stem + "pre"],
        "eos": held[stem + "eos_token_id"],
    }
    return model, vocabulary

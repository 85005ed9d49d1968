"""Small models of every structure that is folded, with loud channels and norms that are not one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sprat.config.model import ModelConfig
from sprat.model import Transformer

DENSE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
LATENT: dict[str, Any] = DENSE | {
    "kv_lora_rank": 40, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 32,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": DENSE | {"architecture": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": DENSE | {"architecture": "qwen2", "num_key_value_heads": 2},
    "qwen3": DENSE | {"architecture": "qwen3", "head_dim": 16},
    "v3": LATENT | {"q_lora_rank": 40},
    "v2": LATENT | {"architecture": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy"},
    "mtp": LATENT | {"num_nextn_predict_layers": 1},
}
MOE = ("v3", "v2")


def model_of(family: str) -> Transformer:
    """A random model of ``family``; a few channels of the stream are ten times as loud as the rest."""
    model = Transformer(ModelConfig.model_validate({"attention_bias": family == "qwen2"} | FAMILIES[family]), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1:
                tensor.mul_(3)
            elif "norm" in name or "bias" in name:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
            if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                tensor[::16] *= 6
        model.embed_tokens.weight[:, ::16] *= 10
    return model.eval()


def text(rows: int, seed: int) -> Tensor:
    """Tokens of which a few are frequent, as in real text."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, 32, generator=generator).pow(3) * 96).long()


def divergence(exact: Transformer, of: Transformer, tokens_BT: Tensor) -> float:
    """Mean Kullback-Leibler divergence of what ``of`` predicts from what ``exact`` does, in nats."""
    with torch.no_grad():
        truth = exact(tokens_BT).log_softmax(-1)
        return float((truth.exp() * (truth - of(tokens_BT).log_softmax(-1))).sum(-1).mean())

"""How many parameters a model has, how many a token activates, and how many FLOPs a token costs.

Parameters are counted by building the model on torch's meta device: the count is of the code that runs, not of
a formula beside it, and 671 B parameters cost no memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sprat.config.model import ModelConfig
from sprat.model.transformer import Transformer


@dataclass(frozen=True)
class Counts:
    """Parameters: ``total`` without MTP modules, ``active`` for one token, and ``mtp``.

    ``active`` counts the chosen and shared experts and leaves out the embedding, of which a token reads one row;
    so counted, DeepSeek-V3 activates 37 B.
    """

    total: int
    active: int
    mtp: int


def count_parameters(config: ModelConfig) -> Counts:
    """Counts of ``config``, from the meta device."""
    with torch.device("meta"):
        model = Transformer(config, seed=None)
    mtp = sum(parameter.numel() for parameter in model.mtp.parameters())
    total = sum(parameter.numel() for parameter in model.parameters()) - mtp
    routed = sum(p.numel() for name, p in model.layers.named_parameters() if ".experts." in name)
    idle = 0
    if config.n_routed_experts:
        idle = routed // config.n_routed_experts * (config.n_routed_experts - config.num_experts_per_tok)
    looked_up = 0 if config.tie_word_embeddings else model.embed_tokens.weight.numel()
    return Counts(total, total - idle - looked_up, mtp)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs of one token, averaged over a row of ``seq_len`` tokens; training costs three times that.

    Two for each active parameter, and attention over the ``(seq_len + 1) / 2`` keys that a causal token sees on
    average (naive form). MTP modules are left out.
    """
    if config.is_mla:
        width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    else:
        width = 2 * config.num_attention_heads * config.attention_head_dim
    attention = 2.0 * width * (seq_len + 1) / 2 * config.num_hidden_layers
    return 2.0 * count_parameters(config).active + attention

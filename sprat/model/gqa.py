"""Grouped-query attention (arXiv 2305.13245) as Llama, Qwen2 (biases on q, k, v) and Qwen3 (norms on q, k) have it.

Layers of Mistral (arXiv 2310.06825, section 2) and some of Qwen's see the last ``sliding_window`` tokens only.
"""

# B batch, T new tokens, S keys, D hidden, H query heads, G key heads, d head width

from __future__ import annotations

import torch
from torch import Tensor, nn

from sprat.config.model import ModelConfig
from sprat.model.attention import attend
from sprat.model.forward_context import ForwardContext
from sprat.model.layers import Linear, RMSNorm
from sprat.model.rope import apply_rotary_emb, attention_scale


class GQA(nn.Module):
    """One attention layer of a dense decoder."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads = layer, config.num_attention_heads, config.kv_heads
        self.dim = config.attention_head_dim
        self.scale = attention_scale(config, self.dim)
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = Linear(hidden, self.heads * self.dim, bias)
        self.k_proj = Linear(hidden, self.kv_heads * self.dim, bias)
        self.v_proj = Linear(hidden, self.kv_heads * self.dim, bias)
        self.o_proj = Linear(self.heads * self.dim, hidden, bias and config.architecture != "qwen2")
        self.window = config.window(layer)
        self.has_qk_norm = config.architecture == "qwen3"
        if self.has_qk_norm:
            self.q_norm = RMSNorm(self.dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.dim, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        """Attend from ``x_BTD`` to what ``context`` allows, storing keys and values in its cache. -> [B, T, D]."""
        batch, time, _ = x_BTD.shape
        q_BTHd = self.q_proj(x_BTD).view(batch, time, self.heads, self.dim)
        k_BTGd = self.k_proj(x_BTD).view(batch, time, self.kv_heads, self.dim)
        v_BTGd = self.v_proj(x_BTD).view(batch, time, self.kv_heads, self.dim)
        if self.has_qk_norm:
            q_BTHd, k_BTGd = self.q_norm(q_BTHd), self.k_norm(k_BTGd)
        q_BTHd = apply_rotary_emb(q_BTHd, context.freqs_cis_BTr, interleave=False)
        k_BTGd = apply_rotary_emb(k_BTGd, context.freqs_cis_BTr, interleave=False)
        if context.cache is not None:
            stored_BSW = context.update_cache(self.layer, torch.cat((k_BTGd.flatten(2), v_BTGd.flatten(2)), -1))
            if not context.no_past:
                k_BTGd, v_BTGd = stored_BSW.view(batch, -1, 2, self.kv_heads, self.dim).unbind(2)
        out_BTHd = attend(q_BTHd, k_BTGd, v_BTGd, context, self.scale, sliding=self.window is not None)
        out: Tensor = self.o_proj(out_BTHd.flatten(2))
        return out

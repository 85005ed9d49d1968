"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): small KV cache, many heads.

The trick. Keys and values of all heads are linear images of one latent vector ``c`` of ``kv_lora_rank``
numbers; only ``c`` is cached. Positions cannot pass through that map, because a rotation does not commute
with it, so each query and key has a second part of ``qk_rope_head_dim`` channels that carries them; the
rotary key is shared by all heads. For DeepSeek-V3 a token costs 576 numbers a layer instead of 32,768.

Two forms compute the same function:

- *naive*: rebuild ``k = W_uk c`` and ``v = W_uv c`` for each token, then attend as usual. Cheap per
  query-key pair (``qk_head_dim + v_head_dim`` multiplications), so it trains and prefills.
- *absorbed*: ``q . (W_uk c) = (W_uk^T q) . c``. Move ``W_uk`` to the query and ``W_uv`` behind the weighted
  sum: attention then runs on the latents themselves, as if there were one wide key head that all heads share.
  Nothing is rebuilt for the past, so it decodes.

Query and output projections, latents and their norms are exactly DeepSeek's; the norms on latents use an
epsilon of 1e-6 whatever the config says, as the published code does. Left out: sparse attention (V3.2).
"""

# B batch, T new tokens, S keys, D hidden, H heads, R kv_lora_rank, r qk_rope_head_dim, n qk_nope_head_dim, v v_head_dim

from __future__ import annotations

import torch
from torch import Tensor, nn

from sprat.config.model import ModelConfig
from sprat.kernels import ops
from sprat.model.attention import attend
from sprat.model.forward_context import ForwardContext
from sprat.model.layers import Linear, RMSNorm
from sprat.model.rope import apply_rotary_emb, attention_scale

LATENT_NORM_EPS = 1e-6
ABSORB_UP_TO = 8  # new tokens a row; above it rebuilding keys and values costs less than wide scores


class MLA(nn.Module):
    """One attention layer; ``absorb`` forces a form (None: absorbed for short steps on a filled cache)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.interleave = config.rope_interleave or config.architecture == "deepseek_v2"
        self.scale = attention_scale(config, config.qk_head_dim)
        self.absorb: bool | None = None
        hidden, bias, queries = config.hidden_size, config.attention_bias, self.heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, queries)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, queries)
        self.has_q_lora = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(hidden, self.rank + self.rope, bias)
        self.kv_a_layernorm = RMSNorm(self.rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.rank, self.heads * (self.nope + self.value))
        self.o_proj = Linear(self.heads * self.value, hidden, bias)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        """Attend from ``x_BTD`` to what ``context`` allows; stores latents when there is a cache. -> [B, T, D]."""
        batch, time, _ = x_BTD.shape
        raw = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD))) if self.has_q_lora else self.q_proj(x_BTD)
        q_nope, q_rope = raw.view(batch, time, self.heads, -1).split((self.nope, self.rope), -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x_BTD).split((self.rank, self.rope), -1)
        latent = self.kv_a_layernorm(latent)
        if context.varlen is not None:
            kv = self.kv_b_proj(latent).view(batch * time, self.heads, -1)
            queries = raw.view(batch * time, self.heads, -1)
            out = ops.varlen_attention(queries, kv, k_rope.flatten(0, 1), context.varlen, self.scale)
            return self._project(out.reshape(batch, time, -1))
        q_rope = apply_rotary_emb(q_rope, context.freqs_cis_BTr, self.interleave)
        k_rope = apply_rotary_emb(k_rope.unsqueeze(2), context.freqs_cis_BTr, self.interleave).squeeze(2)
        absorb = self.absorb if self.absorb is not None else not context.no_past and time <= ABSORB_UP_TO
        if absorb or context.cache is not None:  # both parts side by side, as they lie in the cache
            keys_BSw = context.update_cache(self.layer, torch.cat((latent, k_rope), -1))
        if absorb:
            return self._project(self._absorbed(q_nope, q_rope, keys_BSw, context).flatten(2))
        if not context.no_past:
            latent, k_rope = keys_BSw.split((self.rank, self.rope), -1)
        return self._project(self._naive(q_nope, q_rope, latent, k_rope, context).flatten(2))

    def _project(self, mixed_BTM: Tensor) -> Tensor:
        """Heads side by side -> [B, T, D]."""
        out: Tensor = self.o_proj(mixed_BTM)
        return out

    def _naive(
        self, q_nope: Tensor, q_rope: Tensor, latent_BSR: Tensor, k_rope_BSr: Tensor, context: ForwardContext
    ) -> Tensor:
        """Rebuild keys and values of each head, then attend. -> [B, T, H, v]."""
        batch, keys, _ = latent_BSR.shape
        k_nope, value = self.kv_b_proj(latent_BSR).view(batch, keys, self.heads, -1).split((self.nope, self.value), -1)
        shared = k_rope_BSr.unsqueeze(2).expand(batch, keys, self.heads, self.rope)
        q_BTHd, k_BSHd = torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, shared), -1)
        return attend(q_BTHd, k_BSHd, value, context, self.scale)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, k_BSw: Tensor, context: ForwardContext) -> Tensor:
        """Attend on the latents: one shared key head of width R + r. -> [B, T, H, v]."""
        up_HmR = self.kv_b_proj.dense_weight().view(self.heads, self.nope + self.value, self.rank)
        q_latent = torch.einsum("bthn,hnr->bthr", q_nope, up_HmR[:, : self.nope])
        q_BTHw = torch.cat((q_latent, q_rope), -1)
        mixed_BTHR = attend(q_BTHw, k_BSw, k_BSw[..., : self.rank], context, self.scale)
        return torch.einsum("bthr,hvr->bthv", mixed_BTHR, up_HmR[:, self.nope :])

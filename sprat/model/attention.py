"""Attention of queries over keys and values: the one place where it is chosen what computes it.

Whatever its layers look like, attention comes down to queries, keys and values that have their positions in them, and
to what the pass lets a query see: causality, a mask of packed rows, a window, or what each row's cache holds. Two
forms compute it:

- Keys of each head's own, or of a group of heads: torch's fused attention, which keeps no scores.
- Keys that all heads share (absorbed latent attention): queries of all heads and tokens are the rows of one product,
  where fused attention would copy the keys for each head.

Packed rows of many documents are attended to document by document, which is the same and less work; of latent
attention ``MLA`` does so before (``ops.varlen_attention``): that kernel rotates too.
"""

# B batch, T new tokens, S keys, H query heads, G key heads, d width of queries and keys, v width of values

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sprat.model.forward_context import ForwardContext


def attend(
    q_BTHd: Tensor, keys: Tensor, values: Tensor, context: ForwardContext, scale: float, *, sliding: bool = False
) -> Tensor:
    """``softmax(q k^T * scale) v`` over the keys that ``context`` lets each query see -> [B, T, H, v].

    Args:
        q_BTHd: float; keys and values have the same dtype.
        keys: [B, S, G, d], where G divides H; or [B, S, d], shared by all heads.
        values: [B, S, G, v] or [B, S, v].
        scale: factor on query-key products.
        sliding: whether the layer has a sliding window.
    """
    if context.document_lengths is not None and keys.dim() == 4:
        return _attend_documents(q_BTHd, keys, values, context.document_lengths, scale)
    mask_B1TS = context.mask(sliding)
    if keys.dim() == 3:
        return _attend_shared(q_BTHd, keys, values, mask_B1TS, scale)
    return _attend_heads(q_BTHd, keys, values, None if mask_B1TS is None else mask_B1TS.to(q_BTHd.dtype), scale)


def _attend_heads(q_BTHd: Tensor, k_BSGd: Tensor, v_BSGv: Tensor, mask_B1TS: Tensor | None, scale: float) -> Tensor:
    """torch's fused attention -> [B, T, H, v]; plainly causal without a mask."""
    out_BHTv = F.scaled_dot_product_attention(
        q_BTHd.transpose(1, 2),
        k_BSGd.transpose(1, 2),
        v_BSGv.transpose(1, 2),
        attn_mask=mask_B1TS,
        is_causal=mask_B1TS is None,
        scale=scale,
        enable_gqa=q_BTHd.shape[2] != k_BSGd.shape[2],
    )
    return out_BHTv.transpose(1, 2)


def _attend_documents(q_BTHd: Tensor, k_BTGd: Tensor, v_BTGv: Tensor, lengths: list[int], scale: float) -> Tensor:
    """``attend`` inside each document; what lies between them is not computed."""
    parts = (x.flatten(0, 1).split(lengths) for x in (q_BTHd, k_BTGd, v_BTGv))
    out = [_attend_heads(q[None], k[None], v[None], None, scale)[0] for q, k, v in zip(*parts, strict=True)]
    joined: Tensor = torch.cat(out).view(*q_BTHd.shape[:2], *out[0].shape[1:])
    return joined


def _attend_shared(q_BTHd: Tensor, k_BSd: Tensor, v_BSv: Tensor, mask_B1TS: Tensor | None, scale: float) -> Tensor:
    """``attend`` with one key head: the T * H queries of a row share its keys."""
    batch, time, heads, _ = q_BTHd.shape
    scores = torch.bmm(q_BTHd.flatten(1, 2), k_BSd.transpose(1, 2)).mul_(scale).view(batch, time, heads, -1)
    if mask_B1TS is not None:
        scores = scores + mask_B1TS.transpose(1, 2)
    elif time > 1:
        scores = scores + scores.new_full((time, time), float("-inf")).triu(1).unsqueeze(1)
    weights = scores.float().softmax(-1).to(v_BSv.dtype).flatten(1, 2)
    return torch.bmm(weights, v_BSv).view(batch, time, heads, -1)

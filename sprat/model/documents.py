"""Latent attention document by document, for training small models on a CPU.

Packed rows hold several short documents, and a token attends inside its own. A masked product over whole rows
spends most of its work on pairs that the mask then throws away: rows of 128 tokens with documents of 40 spend
seven eighths. Here a batch is cut into its documents first. Documents of like length are stacked into chunks whose
scores fit into a core's second-level cache; a chunk gathers its rows of queries and keys, turns them by their
position *inside* the document, attends with plain causality, and puts its results back. The gradient is written
by hand over the same chunks, so that nothing of the size of a whole batch's scores is walked over twice.

The plain form of the same function is ``MLA`` with a mask and stock operators; a test holds the two together.
Left out: other devices and half precision (the stock operators are better there), and long documents, for
which a fused kernel that never stores probabilities is the better trade.
"""

# N tokens, H heads, d query width = n + r, n qk_nope_head_dim, r qk_rope_head_dim, v v_head_dim
# C documents of a chunk, L its longest document, X = C * H stacked heads

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_SCORES = 1 << 17  # scores of one chunk: 512 KB in float32, half of a common second-level cache
LONGEST = 512  # tokens; rows that are longer take the stock path


@dataclass(frozen=True)
class Chunk:
    """Documents of like length, padded to the longest.

    Attributes:
        documents, length: C and L.
        token_M: flat token of each slot, M = C * L; padding reads token 0.
        place_M: where each slot's result goes; padding goes to slot N, which is cut off.
        head_X, head_place_X: the same for tokens times heads, in order (document, head, place).
        padding_X: slots of ``head_X`` that are padding; None if there are none.
        causal_LL: additive mask.
    """

    documents: int
    length: int
    token_M: Tensor
    place_M: Tensor
    head_X: Tensor
    head_place_X: Tensor
    padding_X: Tensor | None
    causal_LL: Tensor


def cut(segments_BT: Tensor | None, batch: int, time: int, heads: int) -> list[Chunk]:
    """The documents of a batch (runs of equal segment in a row; whole rows without segments) as chunks."""
    if segments_BT is None:
        starts = np.arange(batch) * time
        lengths = np.full(batch, time)
    else:
        flat = segments_BT.numpy()
        first = np.ones((batch, time), dtype=bool)
        first[:, 1:] = flat[:, 1:] != flat[:, :-1]
        starts = np.flatnonzero(first)
        lengths = np.diff(starts, append=batch * time)
        order = np.argsort(lengths, kind="stable")
        starts, lengths = starts[order], lengths[order]
    chunks, begin = [], 0
    causal = torch.full((int(lengths.max()),) * 2, float("-inf")).triu_(1)
    for end in range(1, len(starts) + 1):
        if end == len(starts) or (end + 1 - begin) * heads * lengths[end] ** 2 > CHUNK_SCORES:
            longest = int(lengths[end - 1])
            chunks.append(_chunk(starts[begin:end], lengths[begin:end], heads, batch * time, causal[:longest, :longest]))
            begin = end
    return chunks


def _chunk(starts: Any, lengths: Any, heads: int, tokens: int, causal_LL: Tensor) -> Chunk:
    """One chunk of the documents that begin at ``starts`` and have ``lengths``."""
    offsets = np.arange(causal_LL.shape[0])
    real = offsets < lengths[:, None]
    place = np.where(real, starts[:, None] + offsets, tokens)
    token = np.where(real, place, 0)
    every = np.arange(heads)[:, None]
    head, head_place = ((index[:, None, :] * heads + every).reshape(-1) for index in (token, place))
    padding = None
    if not real.all():
        padding = torch.from_numpy(np.flatnonzero(~np.broadcast_to(real[:, None], (len(starts), heads, len(offsets)))))
    rest = [torch.from_numpy(index.reshape(-1)) for index in (token, place, head, head_place)]
    return Chunk(len(starts), len(offsets), rest[0], rest[1], rest[2], rest[3], padding, causal_LL)


def _turn(x: Tensor, start: int, turn_Lr: Tensor) -> None:
    """Rotate the channels of ``x`` [..., L, >= start + r] from ``start`` on, pair by pair, in place."""
    torch.view_as_complex(x[..., start:].unflatten(-1, (-1, 2))).mul_(turn_Lr)


class _DocumentAttention(torch.autograd.Function):
    """See ``attend``."""

    @staticmethod
    def forward(
        ctx: Any, q_NHd: Tensor, kv_NHw: Tensor, k_rope_Nr: Tensor, turn_Lr: Tensor, chunks: list[Chunk], scale: float
    ) -> Tensor:
        """Attend chunk by chunk; keeps turned queries, keys, values and probabilities."""
        tokens, heads, width = q_NHd.shape
        nope = width - k_rope_Nr.shape[1]
        value = kv_NHw.shape[2] - nope
        flat_q, flat_kv = q_NHd.view(-1, width), kv_NHw.view(-1, nope + value)
        out_Xv = q_NHd.new_empty((tokens + 1) * heads, value)
        kept = []
        for chunk in chunks:
            stack, length = chunk.documents * heads, chunk.length
            turn = turn_Lr[:length]
            q = flat_q.index_select(0, chunk.head_X).view(stack, length, width)
            _turn(q, nope, turn)
            k_rope = k_rope_Nr.index_select(0, chunk.token_M).view(chunk.documents, 1, length, -1)
            _turn(k_rope, 0, turn)
            kv = flat_kv.index_select(0, chunk.head_X).view(stack, length, nope + value)
            k = torch.empty_like(q)
            k[..., :nope] = kv[..., :nope]
            k.view(chunk.documents, heads, length, width)[..., nope:] = k_rope
            v = kv[..., nope:]
            p = torch.baddbmm(chunk.causal_LL, q, k.transpose(1, 2), alpha=scale)
            p = torch.softmax(p, -1)
            out_Xv.index_copy_(0, chunk.head_place_X, torch.bmm(p, v).view(-1, value))
            kept.append((q, k, v, p))
        ctx.kept, ctx.chunks, ctx.turn_Lr, ctx.scale = kept, chunks, turn_Lr, scale
        return out_Xv.view(tokens + 1, heads, value)[:tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHv: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys-and-values and rotary keys, over the same chunks."""
        tokens, heads, value = grad_NHv.shape
        flat_grad = grad_NHv.reshape(-1, value)
        width = ctx.kept[0][0].shape[-1]
        rope = 2 * ctx.turn_Lr.shape[1]
        nope = width - rope
        back_Lr = ctx.turn_Lr.conj().resolve_conj()
        dq_Xd = flat_grad.new_empty((tokens + 1) * heads, width)
        dkv_Xw = flat_grad.new_empty((tokens + 1) * heads, nope + value)
        dk_rope_Nr = flat_grad.new_empty(tokens + 1, rope)
        for chunk, (q, k, v, p) in zip(ctx.chunks, ctx.kept, strict=True):
            grad = flat_grad.index_select(0, chunk.head_X)
            if chunk.padding_X is not None:
                grad.index_fill_(0, chunk.padding_X, 0.0)
            grad = grad.view(-1, chunk.length, value)
            dp = torch.bmm(grad, v.transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, torch.float32)
            dq = torch.bmm(ds, k).mul_(ctx.scale)
            dk = torch.bmm(ds.transpose(1, 2), q).mul_(ctx.scale)
            _turn(dq, nope, back_Lr[: chunk.length])
            dq_Xd.index_copy_(0, chunk.head_place_X, dq.view(-1, width))
            dkv = torch.cat((dk[..., :nope], torch.bmm(p.transpose(1, 2), grad)), -1)
            dkv_Xw.index_copy_(0, chunk.head_place_X, dkv.view(-1, nope + value))
            dk_rope = dk.view(chunk.documents, heads, chunk.length, width)[..., nope:].sum(1)
            _turn(dk_rope, 0, back_Lr[: chunk.length])
            dk_rope_Nr.index_copy_(0, chunk.place_M, dk_rope.view(-1, rope))
        dq_NHd = dq_Xd.view(tokens + 1, heads, width)[:tokens]
        dkv_NHw = dkv_Xw.view(tokens + 1, heads, nope + value)[:tokens]
        return dq_NHd, dkv_NHw, dk_rope_Nr[:tokens], None, None, None


def attend(
    q_NHd: Tensor, kv_NHw: Tensor, k_rope_Nr: Tensor, turn_Lr: Tensor, chunks: list[Chunk], scale: float
) -> Tensor:
    """Causal attention inside each document.

    Args:
        q_NHd: queries before rotation, contiguous; the last r channels carry positions, in pairs.
        kv_NHw: for each head n key channels and v value channels, contiguous.
        k_rope_Nr: the rotary key that all heads share, before rotation.
        turn_Lr: complex turns of positions 0..L-1.
        chunks: from ``cut``.
        scale: factor on query-key products.

    Returns:
        [N, H, v].
    """
    out: Tensor = _DocumentAttention.apply(q_NHd, kv_NHw, k_rope_Nr, turn_Lr, chunks, scale)  # type: ignore[no-untyped-call]
    return out

"""Latent attention document by document, for training small models on a CPU.

Packed rows hold several short documents, and a token attends inside its own. A masked product over whole rows
spends most of its work on pairs that the mask then throws away: rows of 128 tokens with documents of 40 spend
two thirds. Here a batch is cut into its documents first, and documents of like length are stacked. One gather
brings queries, keys and values into that order (and heads before places), so that every chunk of documents is a
slice; its scores fit into a core's second-level cache, where one product, one softmax and one product finish it.
One gather by the inverse order brings the results back. The gradient is written by hand over the same slices.

The plain form of the same function is ``MLA`` with a mask and stock operators; a test holds the two together.
Left out: other devices and half precision (the stock operators are better there), and long documents, for
which a fused kernel that skips later keys and never stores probabilities is the better trade.
"""

# N tokens, H heads, d query width = n + r, n qk_nope_head_dim, r qk_rope_head_dim, v v_head_dim
# S slots: (document, head, place) in the order of the stacks; L longest document of a chunk; w = n + v

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_SCORES = 1 << 17  # scores of one chunk: 512 KB in float32, half of a common second-level cache
LONGEST = 256  # tokens; where a document is longer the stock operators are used
WORTH = 0.8  # of the scores of whole rows; where documents leave more than that the stock operators are used


@dataclass(frozen=True)
class Documents:
    """A batch cut into documents.

    Attributes:
        chunks: (first slot, stacked documents times heads, longest document) of each chunk.
        head_S: which row of [N * H] a slot holds; padding holds row 0.
        token_S: which token a slot holds.
        padding: slots that are padding; None if there are none.
        slot_NH: the slot of each row of [N * H]: the inverse of ``head_S``.
        turn_Sr: complex turns of the slots' places.
        turn_Nr: the same turns for each token.
        causal_LL: additive mask for the longest document of all.
    """

    chunks: list[tuple[int, int, int]]
    head_S: Tensor
    token_S: Tensor
    padding: Tensor | None
    slot_NH: Tensor
    turn_Sr: Tensor
    turn_Nr: Tensor
    causal_LL: Tensor


def cut(segments_BT: Tensor | None, batch: int, time: int, heads: int, turn_Tr: Tensor) -> Documents | None:
    """The documents of a batch: runs of equal segment in a row, or whole rows. None where cutting does not pay.

    ``turn_Tr`` holds the complex turns of places 0..T-1.
    """
    if segments_BT is None:
        starts, lengths = np.arange(batch) * time, np.full(batch, time)
    else:
        flat = segments_BT.numpy()
        first = np.ones((batch, time), dtype=bool)
        first[:, 1:] = flat[:, 1:] != flat[:, :-1]
        starts = np.flatnonzero(first)
        lengths = np.diff(starts, append=batch * time)
        order = np.argsort(lengths, kind="stable")
        starts, lengths = starts[order], lengths[order]
    longest = int(lengths[-1])
    if longest > LONGEST:
        return None
    ends = _ends(lengths, heads)
    begins = [0, *ends[:-1]]
    if sum((end - begin) * int(lengths[end - 1]) ** 2 for begin, end in zip(begins, ends, strict=True)) > (
        WORTH * batch * time**2
    ):
        return None
    chunks, tokens, reals, slots = [], [], [], 0
    every = np.arange(heads)[:, None]
    for begin, end in zip(begins, ends, strict=True):
        width = int(lengths[end - 1])
        offsets = np.arange(width)
        real = np.broadcast_to((offsets < lengths[begin:end, None])[:, None], (end - begin, heads, width))
        token = (starts[begin:end, None] + offsets)[:, None] * heads + every
        tokens.append(np.where(real, token, 0).reshape(-1))
        reals.append(real.reshape(-1))
        chunks.append((slots, (end - begin) * heads, width))
        slots += (end - begin) * heads * width
    head, real = np.concatenate(tokens), np.concatenate(reals)
    slot = np.empty(batch * time * heads, dtype=np.int64)
    slot[head[real]] = np.flatnonzero(real)
    head_S, token_S = torch.from_numpy(head), torch.from_numpy(head // heads)
    padding = None if real.all() else torch.from_numpy(np.flatnonzero(~real))
    turn_Nr = turn_Tr.repeat(batch, 1)
    causal = torch.full((longest, longest), float("-inf")).triu_(1)
    return Documents(
        chunks, head_S, token_S, padding, torch.from_numpy(slot), turn_Nr.index_select(0, token_S), turn_Nr, causal
    )


def _ends(lengths: Any, heads: int) -> list[int]:
    """Where chunks end: scores fill a cache, or the next document is over a quarter longer than the first."""
    ends, begin = [], 0
    for end in range(1, len(lengths)):
        large = (end + 1 - begin) * heads * int(lengths[end]) ** 2 > CHUNK_SCORES
        if large or lengths[end] > 1.25 * lengths[begin] + 4:
            ends.append(end)
            begin = end
    return [*ends, len(lengths)]


def _turn(x: Tensor, turn: Tensor) -> None:
    """Rotate the channels of ``x`` [rows, r], pair by pair, in place."""
    torch.view_as_complex(x.view(x.shape[0], -1, 2)).mul_(turn)


class _DocumentAttention(torch.autograd.Function):
    """See ``attend``."""

    @staticmethod
    def forward(
        ctx: Any, q_NHd: Tensor, kv_NHw: Tensor, k_rope_Nr: Tensor, documents: Documents, scale: float
    ) -> Tensor:
        """Attend chunk by chunk; keeps turned queries, keys, values and probabilities."""
        tokens, heads, width = q_NHd.shape
        nope = width - k_rope_Nr.shape[1]
        q_Sd = q_NHd.view(-1, width).index_select(0, documents.head_S)
        _turn(q_Sd[:, nope:], documents.turn_Sr)
        kv_Sw = kv_NHw.view(tokens * heads, -1).index_select(0, documents.head_S)
        k_rope_Nr = k_rope_Nr.contiguous()
        turned_Nr = torch.view_as_real(torch.view_as_complex(k_rope_Nr.view(tokens, -1, 2)) * documents.turn_Nr)
        k_Sd = torch.cat((kv_Sw[:, :nope], turned_Nr.view(tokens, -1).index_select(0, documents.token_S)), 1)
        v_Sv = kv_Sw[:, nope:]
        out_Sv = v_Sv.new_empty(v_Sv.shape)
        kept = []
        for start, stack, length in documents.chunks:
            q, k, v, out = (
                x[start : start + stack * length].view(stack, length, -1) for x in (q_Sd, k_Sd, v_Sv, out_Sv)
            )
            p = torch.baddbmm(documents.causal_LL[:length, :length], q, k.transpose(1, 2), alpha=scale)
            torch.softmax(p, -1, out=p)
            torch.bmm(p, v, out=out)
            kept.append(p)
        ctx.save_for_backward(q_Sd, k_Sd, v_Sv, *kept)
        ctx.documents, ctx.scale, ctx.nope = documents, scale, nope
        return out_Sv.index_select(0, documents.slot_NH).view(tokens, heads, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHv: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys-and-values and rotary keys, over the same chunks."""
        q_Sd, k_Sd, v_Sv, *kept = ctx.saved_tensors
        documents, nope = ctx.documents, ctx.nope
        tokens, heads, value = grad_NHv.shape
        grad_Sv = grad_NHv.reshape(-1, value).index_select(0, documents.head_S)
        if documents.padding is not None:
            grad_Sv.index_fill_(0, documents.padding, 0.0)
        dq_Sd, dk_Sd, dv_Sv = torch.empty_like(q_Sd), torch.empty_like(k_Sd), torch.empty_like(grad_Sv)
        for (start, stack, length), p in zip(documents.chunks, kept, strict=True):
            every = (q_Sd, k_Sd, v_Sv, grad_Sv, dq_Sd, dk_Sd, dv_Sv)
            q, k, v, grad, dq, dk, dv = (x[start : start + stack * length].view(stack, length, -1) for x in every)
            torch.bmm(p.transpose(1, 2), grad, out=dv)
            ds = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), p, -1, torch.float32)
            torch.bmm(ds, k, out=dq)
            torch.bmm(ds.transpose(1, 2), q, out=dk)
        back_Sr = documents.turn_Sr.conj().resolve_conj()
        _turn(dq_Sd[:, nope:], back_Sr)
        dq_NHd = dq_Sd.index_select(0, documents.slot_NH).mul_(ctx.scale).view(tokens, heads, -1)
        dk_Sd.mul_(ctx.scale)
        dkv_NHw = torch.cat((dk_Sd[:, :nope], dv_Sv), 1).index_select(0, documents.slot_NH).view(tokens, heads, -1)
        dk_rope_Nr = dk_Sd[:, nope:].index_select(0, documents.slot_NH).view(tokens, heads, -1).sum(1)
        _turn(dk_rope_Nr, documents.turn_Nr.conj().resolve_conj())
        return dq_NHd, dkv_NHw, dk_rope_Nr, None, None


def attend(q_NHd: Tensor, kv_NHw: Tensor, k_rope_Nr: Tensor, documents: Documents, scale: float) -> Tensor:
    """Causal attention inside each document.

    Args:
        q_NHd: queries before rotation, contiguous; the last r channels carry positions, in pairs.
        kv_NHw: for each head n key channels and v value channels, contiguous.
        k_rope_Nr: the rotary key that all heads share, before rotation.
        documents: from ``cut``.
        scale: factor on query-key products.

    Returns:
        [N, H, v].
    """
    out: Tensor = _DocumentAttention.apply(q_NHd, kv_NHw, k_rope_Nr, documents, scale)  # type: ignore[no-untyped-call]
    return out

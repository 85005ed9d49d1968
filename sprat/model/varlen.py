"""Variable-length latent attention, document by document, for training small models on a CPU.

Packed rows hold several short documents, and a token attends inside its own. A masked product over whole rows
spends most of its work on pairs that the mask then throws away: rows of 128 tokens with documents of 40 spend
two thirds. Here the batch is a list of documents, and ``kernels/src/train_attention.cpp`` goes through them one by one:
what a token may not see is never computed, rotation and layout are part of the same walk, and of the
probabilities only one number a row is kept for the way back.

The plain form of the same function is ``MLA`` with a mask and stock operators, which serve everything else: other
devices, half precision, machines without a compiler, and long documents.
"""

# N tokens, H heads, d query width = n + r, n qk_nope_head_dim, r qk_rope_head_dim, v v_head_dim, w = n + v

from __future__ import annotations

from ctypes import c_float, c_int64
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sprat.kernels import fused

MAX_SEQLEN = 1024  # tokens; for longer documents the stock operators are used


@dataclass(frozen=True)
class VarlenMetadata:
    """The documents of a batch: where each starts among the tokens, how long it is (int64), and the rotary table.

    ``freqs_cis_Tr`` holds the complex rotations of positions 0 .. T - 1 of a row, contiguous.
    """

    starts: Tensor
    lengths: Tensor
    freqs_cis_Tr: Tensor


def varlen_metadata(segments_BT: Tensor | None, batch: int, time: int, freqs_cis_Tr: Tensor) -> VarlenMetadata | None:
    """The documents of a batch: runs of equal segment in a row, or whole rows. None where stock operators serve."""
    if not fused.is_supported(freqs_cis_Tr.real) or batch * time == 0:
        return None
    if segments_BT is None:
        starts = torch.arange(batch) * time
    else:
        first = torch.ones(batch, time, dtype=torch.bool)
        first[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
        starts = first.flatten().nonzero().flatten()
    lengths = torch.diff(starts, append=starts.new_tensor([batch * time]))
    if int(lengths.max()) > MAX_SEQLEN:
        return None
    return VarlenMetadata(starts, lengths, freqs_cis_Tr.contiguous())


def _native_args(varlen: VarlenMetadata, q_NHd: Tensor, kv_NHw: Tensor, k_rope_Nr: Tensor, scale: float) -> list[Any]:
    """What both native functions take after their tensors."""
    heads, width = q_NHd.shape[1:]
    rope = k_rope_Nr.shape[1]
    nope = width - rope
    sizes = (heads, nope, rope, kv_NHw.shape[2] - nope, len(varlen.freqs_cis_Tr))
    arrays = (torch.view_as_real(varlen.freqs_cis_Tr), varlen.starts, varlen.lengths)
    return [*map(fused.data_ptr, arrays), c_int64(len(varlen.starts)), *map(c_int64, sizes), c_float(scale)]


class _VarlenAttention(torch.autograd.Function):
    """See ``varlen_attention``."""

    @staticmethod
    def forward(
        ctx: Any, q_NHd: Tensor, kv_NHw: Tensor, k_rope_Nr: Tensor, varlen: VarlenMetadata, scale: float
    ) -> Tensor:
        """Keeps the inputs and the logarithm of each row's sum."""
        tokens, heads = q_NHd.shape[:2]
        k_rope_Nr = k_rope_Nr.contiguous()
        value = kv_NHw.shape[2] - q_NHd.shape[2] + k_rope_Nr.shape[1]
        out_NHv, log_sum_NH = q_NHd.new_empty(tokens, heads, value), q_NHd.new_empty(tokens, heads)
        inputs = (q_NHd, kv_NHw, k_rope_Nr)
        settings = _native_args(varlen, *inputs, scale)
        fused.require_library().varlen_attention_forward(
            *map(fused.data_ptr, inputs), *settings, fused.data_ptr(out_NHv), fused.data_ptr(log_sum_NH)
        )
        ctx.save_for_backward(*inputs, log_sum_NH)
        ctx.varlen, ctx.scale = varlen, scale
        return out_NHv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHv: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys-and-values and rotary keys."""
        q_NHd, kv_NHw, k_rope_Nr, log_sum_NH = ctx.saved_tensors
        inputs = (q_NHd, kv_NHw, k_rope_Nr)
        grad_NHv, grads = grad_NHv.contiguous(), [torch.empty_like(tensor) for tensor in inputs]
        settings = _native_args(ctx.varlen, *inputs, ctx.scale)
        results = map(fused.data_ptr, (log_sum_NH, *grads))
        fused.require_library().varlen_attention_backward(
            fused.data_ptr(grad_NHv), *map(fused.data_ptr, inputs), *settings, *results
        )
        return *grads, None, None


def varlen_attention(q_NHd: Tensor, kv_NHw: Tensor, k_rope_Nr: Tensor, varlen: VarlenMetadata, scale: float) -> Tensor:
    """Causal attention inside each document.

    Args:
        q_NHd: queries before rotation, contiguous; the last r channels carry positions, in pairs.
        kv_NHw: for each head n key channels and v value channels, contiguous.
        k_rope_Nr: the rotary key that all heads share, before rotation.
        varlen: from ``varlen_metadata``.
        scale: factor on query-key products.

    Returns:
        [N, H, v].
    """
    out: Tensor = _VarlenAttention.apply(q_NHd, kv_NHw, k_rope_Nr, varlen, scale)  # type: ignore[no-untyped-call]
    return out

# size: each operation of training with its native kernel and its torch form side by side, chosen in one place
"""The operations of training that have a native kernel; each function here takes it, or computes in torch.

A small model on a CPU spends its time between the matrix products: stock operators read and write every activation
some forty times a step. A kernel does in one walk over memory what takes stock operators three to twelve. It works on
one thread and without Python's lock, so threads of data-parallel training run side by side.

``_is_native`` is the one place where the choice is made: float32, on a CPU, with a compiled library at hand. Attention
is chosen once a pass (``varlen_metadata``), since its torch form, that of ``model/attention.py``, wants a mask.
"""

# N tokens (rows), D hidden, F width of a gate, V vocabulary, C rows of one chunk, E experts, M rows of all experts,
# I inputs, O outputs; B batch, T time, H heads, d query width = n + r, n qk_nope_head_dim, r qk_rope_head_dim,
# v v_head_dim, w = n + v

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sprat.kernels import native_library
from sprat.kernels.mixed_precision import linear

MAX_SEQLEN = 1024  # tokens; for longer documents the stock operators are used
MIN_ROWS_PER_EXPERT = 32  # rows for each expert; with fewer it does not pay to copy weights side by side
_CHUNK_ELEMENTS = {"cpu": 1 << 17}  # logits of one chunk: 512 KB in float32, half of a common L2
_CHUNK_ELEMENTS_DEVICE = 1 << 26
_LARGE_VOCABULARY = 8192  # words from which on no chunk fits a cache; more rows then share what is read of the head
_CHUNK_ELEMENTS_LARGE, _CHUNK_ROWS_LARGE = 1 << 24, 256
Adapt = Callable[[Tensor, Tensor], Tensor]  # what adapters make of a product: (its rows, its result) -> same shape
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)  # not a fake or functional tensor, which has no memory


def _is_native(x: Tensor) -> bool:
    """Whether kernels take ``x``; under autocast they do not, whatever it is."""
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and type(x) in _PLAIN_TENSORS
    return plain and native_library() is not None and not torch.is_autocast_enabled("cpu")


def _call(kernel: str, *arguments: Tensor | int | c_float) -> Any:
    """Call a kernel with tensors by address, in the layout that it expects, and int as int64."""
    return getattr(native_library(), kernel)(
        *(
            c_void_p(each.data_ptr()) if isinstance(each, Tensor) else c_int64(each) if isinstance(each, int) else each
            for each in arguments
        )
    )


class _RMSNorm(torch.autograd.Function):
    """See ``rms_norm``. In torch, autograd's backward would walk over the activations about a dozen times.

    Written by hand it needs five walks and two matrix-vector products, because the gradient of the gain and the
    projection of the gradient on ``x`` share the product ``g * x_hat``.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Normalize rows of ``x_ND``; keeps one scalar a row for the way back."""
        if _is_native(x_ND):
            out_ND, scale_N = torch.empty_like(x_ND), x_ND.new_empty(len(x_ND))
            _call("rms_forward", x_ND, weight_D, c_float(eps), out_ND, scale_N, *x_ND.shape)
            ctx.save_for_backward(x_ND, weight_D, scale_N)
            return out_ND
        scale_N1 = x_ND.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        return (x_ND * scale_N1).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of ``x_ND`` and ``weight_D``."""
        x_ND, weight_D, scale_N1 = ctx.saved_tensors
        grad_ND = grads[0]
        if scale_N1.ndim == 1:
            grad_x_ND, grad_weight_D = torch.empty_like(x_ND), torch.zeros_like(weight_D)
            arrays = (grad_ND.contiguous(), x_ND, weight_D, scale_N1, grad_x_ND, grad_weight_D)
            _call("rms_backward", *arrays, *x_ND.shape)
            return grad_x_ND, grad_weight_D, None
        unit_ND = x_ND * scale_N1
        product_ND = grad_ND * unit_ND
        grad_weight_D = product_ND.sum(0)
        along_N1 = torch.mv(product_ND, weight_D).mul_(-1.0 / x_ND.shape[-1]).unsqueeze(-1)
        grad_x_ND = (grad_ND * weight_D).addcmul_(unit_ND, along_N1).mul_(scale_N1)
        return grad_x_ND, grad_weight_D, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dim (Zhang and Sennrich 2019, arXiv 1910.07467).

    Computed in float32; ``x`` [..., D] keeps its shape and dtype.
    """
    if x.dtype != torch.float32:
        wide = x.float()
        return weight_D * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    out: Tensor = _RMSNorm.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight_D, eps)  # type: ignore[no-untyped-call]
    return out.view(x.shape)


class _SiluAndMul(torch.autograd.Function):
    """``silu(gate) * up`` [N, F] of rows that hold gate and up side by side, natively."""

    @staticmethod
    def forward(ctx: Any, gate_up_N2F: Tensor) -> Tensor:
        """Keeps its input, which must be contiguous."""
        rows, width = gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2
        hidden_NF = gate_up_N2F.new_empty(rows, width)
        _call("swiglu_forward", gate_up_N2F, hidden_NF, rows, width)
        ctx.save_for_backward(gate_up_N2F)
        return hidden_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Gradient of ``gate_up_N2F``."""
        (gate_up_N2F,) = ctx.saved_tensors
        grad_NF, grad_N2F = grads[0].contiguous(), torch.empty_like(gate_up_N2F)
        _call("swiglu_backward", gate_up_N2F, grad_NF, grad_N2F, *grad_NF.shape)
        return grad_N2F


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` [..., F] of rows [..., 2F] that hold gate and up side by side."""
    if _is_native(gate_up):
        hidden: Tensor = _SiluAndMul.apply(gate_up.flatten(0, -2).contiguous())  # type: ignore[no-untyped-call]
        return hidden.view(*gate_up.shape[:-1], -1)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def swiglu(x: Tensor, gate_FD: Tensor, up_FD: Tensor, adapt: Adapt | None = None) -> Tensor:
    """``silu(x gate^T) * (x up^T)``, ``x`` [..., D] -> [..., F] (Shazeer 2020, arXiv 2002.05202).

    Gate and up are one product where rows are enough to pay for laying the two side by side.

    Args:
        adapt: is given ``x`` and the two products side by side, its own to write to; what it gives is taken for them.
    """
    if x.numel() >= MIN_ROWS_PER_EXPERT * x.shape[-1] and _is_native(x):
        x_ND = x.flatten(0, -2)
        gate_up_N2F = linear(x_ND, torch.cat((gate_FD, up_FD)))
        gate_up_N2F = adapt(x_ND, gate_up_N2F) if adapt else gate_up_N2F
        return silu_and_mul(gate_up_N2F).view(*x.shape[:-1], -1)
    gate, up = linear(x, gate_FD), linear(x, up_FD)
    if adapt:  # contiguous as the products were: the vector units round silu otherwise than what is left over
        gate, up = (half.contiguous() for half in adapt(x, torch.cat((gate, up), -1)).chunk(2, -1))
    return F.silu(gate) * up


def grouped_swiglu(
    x_MD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, ends_E: Tensor, adapt: Adapt | None = None
) -> Tensor:
    """``swiglu`` of rows sorted by expert, each with its expert's matrices -> [M, F]; see ``grouped_mm``."""
    if len(x_MD) >= MIN_ROWS_PER_EXPERT * len(ends_E) and _is_native(x_MD):
        gate_up_M2F = grouped_mm(x_MD, torch.cat((gate_EFD, up_EFD), 1), ends_E)
        gate_up_M2F = adapt(x_MD, gate_up_M2F) if adapt else gate_up_M2F
        return silu_and_mul(gate_up_M2F)
    gate_MF, up_MF = (grouped_mm(x_MD, weight, ends_E) for weight in (gate_EFD, up_EFD))
    if adapt:
        gate_MF, up_MF = (half.contiguous() for half in adapt(x_MD, torch.cat((gate_MF, up_MF), -1)).chunk(2, -1))
    return F.silu(gate_MF) * up_MF


def grouped_mm(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Rows sorted by expert, each times its expert's matrix -> [M, O]; the rows of expert ``e`` end at ``ends_E[e]``.

    Torch's grouped product takes rows of whole 16 bytes only (4 channels in float32, 8 in bfloat16), of input and,
    for the gradient, of output, and no float64; what it does not take gets one product for each expert.
    """
    if x_MI.element_size() < 8 and all(width * x_MI.element_size() % 16 == 0 for width in weight_EOI.shape[1:]):
        return torch._grouped_mm(x_MI, weight_EOI.transpose(1, 2), offs=ends_E)
    parts = x_MI.tensor_split(ends_E[:-1].tolist())
    return torch.cat([part_RI @ weight_OI.T for part_RI, weight_OI in zip(parts, weight_EOI, strict=True)])


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast wants matrix products on the device of ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _chunk_rows(device: str, vocabulary: int) -> int:
    """How many rows of logits are held at once."""
    if device == "cpu" and vocabulary > _LARGE_VOCABULARY:
        return max(64, min(_CHUNK_ROWS_LARGE, _CHUNK_ELEMENTS_LARGE // vocabulary))
    return max(64, _CHUNK_ELEMENTS.get(device, _CHUNK_ELEMENTS_DEVICE) // vocabulary)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, where the two may be narrower."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class _LinearCrossEntropy(torch.autograd.Function):
    """See ``linear_cross_entropy``.

    A chunk of rows is multiplied with the head, turned into probabilities, and at once into the gradients of its rows
    and of the head, while the chunk is still in the second-level cache. The gradient is therefore computed in the
    forward pass and only scaled in the backward pass (the idea of Liger-Kernel, arXiv 2410.10989, section 3.2, and of
    Cut Cross-Entropy, arXiv 2411.09009). In torch, softmax minus one-hot is ``(e - total * onehot) / total`` with
    ``e = exp(logit - top)``: the division by ``total`` moves from the wide side [C, V] to the narrow one [C, D].

    Left out: anything that approximates (small probabilities are not skipped), label smoothing, a bias in the head,
    second derivatives. On other devices than CPUs the chunks are larger, and products run in autocast's dtype; beside a
    narrower head they run in the head's.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, num_items: int) -> Tensor:
        dtype = torch.bfloat16 if weight_VD.dtype == torch.bfloat16 else _product_dtype(x_ND)
        rows, (vocabulary, width) = x_ND.shape[0], weight_VD.shape
        if x_ND.device.type == "cpu" and rows and not 0 <= int(targets_N.min()) <= int(targets_N.max()) < vocabulary:
            raise IndexError(f"a target is outside the vocabulary of {vocabulary}")
        with torch.autocast(x_ND.device.type, enabled=False):
            x, weight = x_ND.to(dtype).contiguous(), weight_VD.to(dtype)
            weight_DV = weight.t() if vocabulary > _LARGE_VOCABULARY else weight.t().contiguous()
            want_x, want_weight = ctx.needs_input_grad[:2]
            grad_x = torch.empty_like(x) if want_x else None
            wide = torch.promote_types(dtype, torch.float32)
            grad_DV = x.new_zeros(width, vocabulary if want_weight else 0, dtype=wide)
            loss = x.new_zeros((), dtype=wide)
            chunk = _chunk_rows(x.device.type, vocabulary)
            for start in range(0, rows, chunk):
                x_CD, target_C1 = x[start : start + chunk], targets_N[start : start + chunk, None]
                logits_CV = torch.mm(x_CD, weight_DV).to(loss.dtype)
                if grad_x is not None and _is_native(logits_CV):
                    loss += float(_call("cross_entropy", logits_CV, target_C1, *logits_CV.shape))
                    grad_CV = logits_CV.to(dtype)
                    torch.mm(grad_CV, weight, out=grad_x[start : start + chunk])
                    if want_weight:
                        _add_product(grad_DV, x_CD.t(), grad_CV)
                    continue
                top_C1 = logits_CV.amax(1, keepdim=True)
                logits_CV.sub_(top_C1)
                picked_C1 = logits_CV.gather(1, target_C1)
                total_C1 = logits_CV.exp_().sum(1, keepdim=True)
                loss += (total_C1.log() - picked_C1).sum()
                if not (want_x or want_weight):
                    continue
                logits_CV.scatter_add_(1, target_C1, -total_C1)
                grad_CV = logits_CV.to(dtype)
                if grad_x is not None:
                    torch.mm(grad_CV, weight, out=grad_x[start : start + chunk]).div_(total_C1)
                if want_weight:
                    _add_product(grad_DV, (x_CD / total_C1).to(dtype).t(), grad_CV)
        scale = 1.0 / max(num_items, 1)
        grad_VD = grad_DV.t().mul(scale).to(weight_VD.dtype) if want_weight else None
        ctx.save_for_backward(None if grad_x is None else grad_x.mul_(scale).to(x_ND.dtype), grad_VD)
        return loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_ND, grad_VD = ctx.saved_tensors
        scaled = [None if g is None else g * grad.to(g.dtype) for g in (grad_ND, grad_VD)]
        return scaled[0], scaled[1], None, None


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, num_items: int | None = None, ignore: int = -100
) -> Tensor:
    """Mean cross-entropy of ``softmax(x W^T)`` against ``targets``, without ever holding all logits.

    Args:
        x_ND: hidden states, ready for the head.
        weight_VD: the head.
        targets_N: long; rows whose target is ``ignore`` are left out before anything is computed.
        num_items: what the sum is divided by where these rows are a part of a larger mean; None for those that count.

    Returns:
        the mean in nats over the rows that count, float32 or wider; 0 where none does.
    """
    counted_N = targets_N != ignore
    if not bool(counted_N.all()):
        rows_M = counted_N.nonzero().squeeze(1)
        x_ND, targets_N = x_ND.index_select(0, rows_M), targets_N.index_select(0, rows_M)
    divisor = len(targets_N) if num_items is None else num_items
    out: Tensor = _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, divisor)  # type: ignore[no-untyped-call]
    return out


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
    if not _is_native(freqs_cis_Tr.real) or batch * time == 0:
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


def _varlen_args(varlen: VarlenMetadata, q_NHd: Tensor, kv_NHw: Tensor, k_rope_Nr: Tensor, scale: float) -> list[Any]:
    """What both kernels take after their tensors."""
    heads, width = q_NHd.shape[1:]
    rope = k_rope_Nr.shape[1]
    nope = width - rope
    sizes = (len(varlen.starts), heads, nope, rope, kv_NHw.shape[2] - nope, len(varlen.freqs_cis_Tr))
    return [torch.view_as_real(varlen.freqs_cis_Tr), varlen.starts, varlen.lengths, *sizes, c_float(scale)]


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
        _call("varlen_attention_forward", *inputs, *_varlen_args(varlen, *inputs, scale), out_NHv, log_sum_NH)
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
        settings = _varlen_args(ctx.varlen, *inputs, ctx.scale)
        _call("varlen_attention_backward", grad_NHv, *inputs, *settings, log_sum_NH, *grads)
        return *grads, None, None


def varlen_attention(q_NHd: Tensor, kv_NHw: Tensor, k_rope_Nr: Tensor, varlen: VarlenMetadata, scale: float) -> Tensor:
    """Causal latent attention inside each document, natively; in torch it is ``MLA`` with a mask.

    Packed rows hold several short documents. A masked product over whole rows spends most of its work on pairs that the
    mask then throws away: rows of 128 tokens with documents of 40 spend two thirds. Here the documents are gone through
    one by one (``src/train_attention.cpp``): what a token may not see is never computed, rotation and layout are part
    of the same walk, and of the probabilities only one number a row is kept for the way back.

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

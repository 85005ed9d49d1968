"""Norm, gated activation and cross-entropy, forwards and backwards, in one walk over memory each.

A small model on a CPU spends its time between the matrix products: stock operators read and write every activation
some forty times a step. These functions do in one walk what takes stock operators three to twelve. They work on one
thread and without Python's lock, so threads of data-parallel training run side by side.

``is_supported`` says whether a tensor is of the kind they take: float32, on a CPU, with a compiled library at hand.
``kernels.native_library`` is asked once. The torch form of each function stands beside its call, in ``norm.py``,
``moe.py`` and ``ops.py`` of ``sprat/model``.
"""

# N rows, D width of a row, F width of a gate, V vocabulary

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from sprat.kernels import native_library


def is_supported(x: Tensor) -> bool:
    """Whether the functions of this module take ``x``; under autocast they do not, whatever it is."""
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and type(x) in _PLAIN_TENSORS
    return plain and native_library() is not None and not torch.is_autocast_enabled("cpu")


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)  # not a fake or functional tensor, which has no memory


def data_ptr(x: Tensor) -> c_void_p:
    """Where the numbers of ``x`` lie; the caller keeps it alive and sees to its layout."""
    return c_void_p(x.data_ptr())


def require_library() -> ctypes.CDLL:
    """The compiled functions; only where ``is_supported`` said so."""
    library = native_library()
    if library is None:
        raise RuntimeError("no native functions here; ask fused.is_supported first")
    return library


def rms_forward(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(``x / rms(x) * weight``, ``1 / rms(x)`` [N]) of contiguous rows (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    rows, width = x_ND.shape
    out_ND, scale_N = torch.empty_like(x_ND), x_ND.new_empty(rows)
    require_library().rms_forward(
        data_ptr(x_ND),
        data_ptr(weight_D),
        c_float(eps),
        data_ptr(out_ND),
        data_ptr(scale_N),
        c_int64(rows),
        c_int64(width),
    )
    return out_ND, scale_N


def rms_backward(grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x_ND`` and ``weight_D``; all rows contiguous."""
    rows, width = x_ND.shape
    grad_x_ND, grad_weight_D = torch.empty_like(x_ND), torch.zeros_like(weight_D)
    arrays = (grad_ND, x_ND, weight_D, scale_N, grad_x_ND, grad_weight_D)
    require_library().rms_backward(*map(data_ptr, arrays), c_int64(rows), c_int64(width))
    return grad_x_ND, grad_weight_D


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, gate_up_N2F: Tensor) -> Tensor:
        rows, width = gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2
        hidden_NF = gate_up_N2F.new_empty(rows, width)
        require_library().swiglu_forward(data_ptr(gate_up_N2F), data_ptr(hidden_NF), c_int64(rows), c_int64(width))
        ctx.save_for_backward(gate_up_N2F)
        return hidden_NF

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        (gate_up_N2F,) = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_NF, grad_N2F = grads[0].contiguous(), torch.empty_like(gate_up_N2F)
        arrays = (gate_up_N2F, grad_NF, grad_N2F)
        require_library().swiglu_backward(*map(data_ptr, arrays), c_int64(len(gate_up_N2F)), c_int64(grad_NF.shape[1]))
        return grad_N2F


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """``silu(gate) * up`` [N, F] of contiguous rows that hold gate and up side by side (arXiv 2002.05202)."""
    out: Tensor = _SwiGLU.apply(gate_up_N2F.contiguous())  # type: ignore[no-untyped-call]
    return out


def cross_entropy(logits_NV: Tensor, target_N: Tensor) -> float:
    """Sum of the rows' softmax cross-entropies; ``logits_NV`` (contiguous) becomes its gradient.

    ``target_N`` (int64, contiguous) must lie in 0 .. V - 1; it is not checked.
    """
    rows, vocabulary = logits_NV.shape
    return float(
        require_library().cross_entropy(data_ptr(logits_NV), data_ptr(target_N), c_int64(rows), c_int64(vocabulary))
    )

"""Root-mean-square norm with a backward pass of its own.

On a CPU a norm is limited by memory passes, not by arithmetic. Autograd's backward of
``x * rsqrt(mean(x^2)) * w`` walks over the activations about a dozen times; written by hand it needs five
walks and two matrix-vector products, because the gradient of the gain and the projection of the gradient on
``x`` share the product ``g * x_hat``. ``kernels.fused`` does each way in one walk where it can.
"""

# N rows, D hidden

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sprat.kernels import fused


class _RMSNorm(torch.autograd.Function):
    """See ``rms_norm``."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Normalize rows of ``x_ND``; keeps one scalar a row for the way back."""
        if fused.is_supported(x_ND):
            out_ND, scale_N = fused.rms_forward(x_ND, weight_D, eps)
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
            return *fused.rms_backward(grad_ND.contiguous(), x_ND, weight_D, scale_N1), None
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


class RMSNorm(nn.Module):
    """``rms_norm`` with a learned gain ``weight`` [dim], set to one."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., dim] -> same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)

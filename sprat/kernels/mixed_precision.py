"""Products in bfloat16 beside everything else in float32: mixed precision (Micikevicius et al., arXiv 1710.03740).

Processors that multiply bfloat16 (AVX512-BF16, AMX) do so at twice float32's rate or more, and sum up in float32.
Weights stay in float32 with the optimizer, so that small steps are not lost; what a product sees of them is rounded for
each pass. bfloat16 has float32's range, so no loss is scaled.

A low-rank adapter is R more inputs of its matrix: ``y = [x | z] [W | s B]^T`` with ``z = x A^T``. Adding it up then
costs no walk over y of its own, and the way back gets the gradient of z beside that of x.
"""

# N rows, I inputs, O outputs of all matrices, R ranks of all adapters, K = I + R

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _NarrowLinear(torch.autograd.Function):
    """See ``linear``: the product and both of its gradients in the matrix's dtype."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        """Keeps its input in the narrow dtype."""
        narrow_NI = x_NI.to(weight_OI.dtype)
        ctx.save_for_backward(narrow_NI, weight_OI)
        ctx.dtype = x_NI.dtype
        return F.linear(narrow_NI, weight_OI).to(x_NI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of ``x_NI`` and ``weight_OI``, where they are wanted."""
        narrow_NI, weight_OI = ctx.saved_tensors
        grad_NO, (want_x, want_weight) = grads[0].to(weight_OI.dtype), ctx.needs_input_grad
        grad_NI = (grad_NO @ weight_OI).to(ctx.dtype) if want_x else None
        return grad_NI, grad_NO.t() @ narrow_NI if want_weight else None


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x W^T + b``, ``x`` [..., I] -> [..., O] in the dtype of ``x``.

    Where the matrix is narrower than ``x`` (bfloat16 beside float32), products are made in its dtype, those of the
    gradients as well.
    """
    if x.dtype != torch.float32 or weight_OI.dtype != torch.bfloat16:
        return F.linear(x, weight_OI, bias_O)
    y: Tensor = _NarrowLinear.apply(x.flatten(0, -2), weight_OI)  # type: ignore[no-untyped-call]
    y = y.view(*x.shape[:-1], -1)
    return y if bias_O is None else y + bias_O


class _AdaptedLinear(torch.autograd.Function):
    """See ``adapted_linear``."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, scaling: float, dtype: torch.dtype, *matrices: Tensor) -> Tensor:
        """``matrices``: W of all, then A of all, then B of all."""
        count, inputs = len(matrices) // 3, x_NI.shape[1]
        weights, downs, ups = matrices[:count], matrices[count : 2 * count], matrices[2 * count :]
        down_RI = torch.cat(downs).to(dtype)
        x_NK = x_NI.new_empty(len(x_NI), inputs + len(down_RI), dtype=dtype)
        x_NK[:, :inputs] = x_NI
        x_NK[:, inputs:] = x_NK[:, :inputs] @ down_RI.t()
        weight_OK = x_NI.new_zeros(sum(map(len, weights)), x_NK.shape[1], dtype=dtype)
        row, column = 0, inputs
        for weight, up in zip(weights, ups, strict=True):
            block = weight_OK[row : (row := row + len(up))]
            block[:, :inputs] = weight
            block[:, column : (column := column + up.shape[1])] = up * scaling
        ctx.save_for_backward(x_NK, weight_OK, down_RI)
        ctx.scaling, ctx.shapes = scaling, [up.shape for up in ups]
        return (x_NK @ weight_OK.t()).to(x_NI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x_NI`` and of every A and B."""
        x_NK, weight_OK, down_RI = ctx.saved_tensors
        inputs, grad_NO = down_RI.shape[1], grads[0].to(weight_OK.dtype)
        grad_NK = grad_NO @ weight_OK
        grad_z_NR = grad_NK[:, inputs:]
        grad_x_NI = torch.addmm(grad_NK[:, :inputs], grad_z_NR, down_RI) if ctx.needs_input_grad[0] else None
        grad_down_RI = (grad_z_NR.t() @ x_NK[:, :inputs]).to(grads[0].dtype)
        grad_ups, row, column = list[Tensor](), 0, inputs
        for rows, rank in ctx.shapes:
            z_NR = x_NK[:, column : (column := column + rank)]
            grad_ups.append((grad_NO[:, row : (row := row + rows)].t() @ z_NR).to(grads[0].dtype).mul_(ctx.scaling))
        grad_downs = grad_down_RI.split([rank for _, rank in ctx.shapes])
        first = None if grad_x_NI is None else grad_x_NI.to(grads[0].dtype)
        return first, None, None, *(None for _ in ctx.shapes), *grad_downs, *grad_ups


def adapted_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """Products of ``x`` with frozen matrices and their low-rank adapters, side by side: ``x (W + s B A)^T`` of each.

    Args:
        x: [..., I], float32.
        weights: each W [O, I], without a gradient.
        downs, ups: each A [R, I] and B [O, R], float32.
        scaling: s.
        dtype: in which products are made.

    Returns:
        [..., sum of O], float32.
    """
    y: Tensor = _AdaptedLinear.apply(x.flatten(0, -2), scaling, dtype, *weights, *downs, *ups)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)

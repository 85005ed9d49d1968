"""SwiGLU feed-forwards, dense and routed, with few walks over memory: what a small model spends its time on.

Stock operators walk over each activation of width F about ten times in a training step, and routed experts add
sorted copies of their inputs and outputs. Here the rows are taken in blocks whose activations stay in a core's
second-level cache: three products and one gated activation forwards, six products backwards, with the block's
rows gathered and its results added in place. Only the two pre-activations are kept. The gradient of a routing
weight is read off the hidden side: with ``y = W h``, ``grad . y = (W^T grad) . h``, so ``y`` is never kept.

Stock operators compute the same in ``MLP`` and ``Experts``; they serve other devices, half precision, and calls
with few rows for each expert. Tests hold the two together.
"""

# N tokens, K chosen experts, M = N * K pairs sorted by expert, D hidden, F width, E experts, b rows of a block

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 1 << 16  # of one activation of a block: 256 KB in float32, and four of them are alive


def applies(x: Tensor) -> bool:
    """Whether ``x`` is of the kind that these functions are faster for."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def _blocks(start: int, stop: int, width: int) -> Iterator[slice]:
    """``start`` to ``stop`` in blocks of as equal size as can be."""
    rows = max(64, BLOCK_ELEMENTS // width)
    count = max(1, -(-(stop - start) // rows))
    edges = [start + (stop - start) * step // count for step in range(count + 1)]
    for begin, end in zip(edges, edges[1:], strict=False):
        yield slice(begin, end)


def _ahead(x_bD: Tensor, gate_FD: Tensor, up_FD: Tensor, gates_bF: Tensor, ups_bF: Tensor) -> Tensor:
    """Hidden activations of a block; fills the pre-activations that are kept."""
    torch.mm(x_bD, gate_FD.t(), out=gates_bF)
    torch.mm(x_bD, up_FD.t(), out=ups_bF)
    return F.silu(gates_bF).mul_(ups_bF)


def _back(gates_bF: Tensor, ups_bF: Tensor, grad_hidden_bF: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the two pre-activations of a block."""
    grad_ups_bF = F.silu(gates_bF).mul_(grad_hidden_bF)
    return torch.ops.aten.silu_backward(grad_hidden_bF * ups_bF, gates_bF), grad_ups_bF


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        rows, width = x_ND.shape[0], gate_FD.shape[0]
        gates_NF, ups_NF = x_ND.new_empty(rows, width), x_ND.new_empty(rows, width)
        out_ND = x_ND.new_empty(rows, down_DF.shape[0])
        for b in _blocks(0, rows, width):
            hidden_bF = _ahead(x_ND[b], gate_FD, up_FD, gates_NF[b], ups_NF[b])
            torch.mm(hidden_bF, down_DF.t(), out=out_ND[b])
        ctx.save_for_backward(x_ND, gate_FD, up_FD, down_DF, gates_NF, ups_NF)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, ...]:
        x_ND, gate_FD, up_FD, down_DF, gates_NF, ups_NF = ctx.saved_tensors
        grads = [torch.zeros_like(weight) for weight in (gate_FD, up_FD, down_DF)]
        grad_x_ND = torch.empty_like(x_ND)
        for b in _blocks(0, x_ND.shape[0], gate_FD.shape[0]):
            x_bD, grad_bD, gates_bF, ups_bF = x_ND[b], grad_ND[b], gates_NF[b], ups_NF[b]
            grads[2].addmm_(grad_bD.t(), F.silu(gates_bF).mul_(ups_bF))
            grad_gates_bF, grad_ups_bF = _back(gates_bF, ups_bF, torch.mm(grad_bD, down_DF))
            grads[0].addmm_(grad_gates_bF.t(), x_bD)
            grads[1].addmm_(grad_ups_bF.t(), x_bD)
            torch.mm(grad_gates_bF, gate_FD, out=grad_x_ND[b]).addmm_(grad_ups_bF, up_FD)
        return grad_x_ND, grads[0], grads[1], grads[2]


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_M: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, plan: Any
    ) -> Tensor:
        token_M, load = plan
        width = gate_EFD.shape[1]
        gates_MF, ups_MF = x_ND.new_empty(len(token_M), width), x_ND.new_empty(len(token_M), width)
        out_ND, start = torch.zeros_like(x_ND), 0
        for expert, rows in enumerate(load):
            for b in _blocks(start, start + rows, width):
                x_bD = x_ND.index_select(0, token_M[b])
                hidden_bF = _ahead(x_bD, gate_EFD[expert], up_EFD[expert], gates_MF[b], ups_MF[b])
                y_bD = torch.mm(hidden_bF, down_EDF[expert].t()).mul_(weight_M[b].unsqueeze(1))
                out_ND.index_add_(0, token_M[b], y_bD)
            start += rows
        ctx.save_for_backward(x_ND, weight_M, gate_EFD, up_EFD, down_EDF, gates_MF, ups_MF)
        ctx.plan = plan
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_M, gate_EFD, up_EFD, down_EDF, gates_MF, ups_MF = ctx.saved_tensors
        token_M, load = ctx.plan
        grads = [torch.zeros_like(weight) for weight in (gate_EFD, up_EFD, down_EDF)]
        grad_x_ND, grad_weight_M, start = torch.zeros_like(x_ND), torch.empty_like(weight_M), 0
        for expert, rows in enumerate(load):
            for b in _blocks(start, start + rows, gate_EFD.shape[1]):
                token_b, gates_bF, ups_bF = token_M[b], gates_MF[b], ups_MF[b]
                x_bD, grad_bD = x_ND.index_select(0, token_b), grad_ND.index_select(0, token_b)
                hidden_bF = F.silu(gates_bF).mul_(ups_bF)
                grad_hidden_bF = torch.mm(grad_bD, down_EDF[expert])
                torch.sum(grad_hidden_bF * hidden_bF, 1, out=grad_weight_M[b])
                scale_b1 = weight_M[b].unsqueeze(1)
                grads[2][expert].addmm_(grad_bD.mul_(scale_b1).t(), hidden_bF)
                grad_gates_bF, grad_ups_bF = _back(gates_bF, ups_bF, grad_hidden_bF.mul_(scale_b1))
                grads[0][expert].addmm_(grad_gates_bF.t(), x_bD)
                grads[1][expert].addmm_(grad_ups_bF.t(), x_bD)
                grad_x_bD = torch.mm(grad_gates_bF, gate_EFD[expert]).addmm_(grad_ups_bF, up_EFD[expert])
                grad_x_ND.index_add_(0, token_b, grad_x_bD)
            start += rows
        return grad_x_ND, grad_weight_M, grads[0], grads[1], grads[2], None


def dense(x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202) for contiguous rows ``x_ND`` -> [N, D]."""
    out: Tensor = _Dense.apply(x_ND, gate_FD, up_FD, down_DF)  # type: ignore[no-untyped-call]
    return out


def routed(
    x_ND: Tensor, weight_M: Tensor, token_M: Tensor, load: list[int], weights: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Weighted sum, for each token, of its experts' outputs.

    Args:
        x_ND: tokens.
        weight_M: routing weight of each token-expert pair, pairs sorted by expert.
        token_M: token of each pair.
        load: pairs of each expert.
        weights: stacked gate [E, F, D], up [E, F, D] and down [E, D, F].

    Returns:
        [N, D].
    """
    out: Tensor = _Routed.apply(x_ND, weight_M, *weights, (token_M, load))  # type: ignore[no-untyped-call]
    return out

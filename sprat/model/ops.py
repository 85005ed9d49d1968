"""Operations that make a small model train fast on an ordinary CPU.

On a CPU a small model does not wait for its matrix products (they run at 100 GFLOP/s a core); it waits for
memory, and for passes over memory that stock autograd makes in between. Each function here is one
``torch.autograd.Function`` that makes fewer passes, keeps what it can in the second-level cache, and gives
the same numbers as the plain formula beside it in the tests (``gradcheck`` in float64).

* ``linear_cross_entropy`` never holds the logits: a chunk of rows is multiplied with the head, turned into
  probabilities, and at once into the gradients of its rows and of the head, while the chunk is still in
  cache. The gradient is therefore computed in the forward pass and only scaled in the backward pass (the
  idea of Liger-Kernel, arXiv 2410.10989, section 3.2, and of Cut Cross-Entropy, arXiv 2411.09009). Rows
  without a target cost nothing.
* ``rms_norm`` (arXiv 1910.07467) saves the normed rows instead of every intermediate, and reads the row
  sums of its backward pass off one product.
* ``expert_mlp`` runs all routed experts of a layer over tokens sorted by expert: per expert the hidden
  activations fit in cache, and the backward pass reuses them there.

What is left out: no C++ (that is ``kernels``), nothing that approximates, and no half precision on CPUs
without matrix tiles, where it is slower. On other devices the stock operators are used.
"""

# N tokens (rows), D hidden, V vocabulary, E experts, F expert width, S sorted token-expert pairs

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = {"cpu": 1 << 17}  # logits of one chunk: 512 KB in float32, half of a common L2
_CHUNK_ELEMENTS_DEVICE = 1 << 26


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast wants matrix products on the device of ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        dtype = _product_dtype(x_ND)
        rows, (vocabulary, width) = x_ND.shape[0], weight_VD.shape
        with torch.autocast(x_ND.device.type, enabled=False):
            x, weight = x_ND.to(dtype).contiguous(), weight_VD.to(dtype)
            weight_DV = weight.t().contiguous()
            want_x, want_weight = ctx.needs_input_grad[:2]
            grad_x = torch.empty_like(x) if want_x else None
            grad_DV = x.new_zeros(width, vocabulary, dtype=torch.promote_types(dtype, torch.float32))
            loss = x.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
            chunk = max(64, _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS_DEVICE) // vocabulary)
            for start in range(0, rows, chunk):
                x_c, target_c1 = x[start : start + chunk], targets_N[start : start + chunk, None]
                logits_cV = torch.mm(x_c, weight_DV).to(loss.dtype)
                top_c1 = logits_cV.amax(1, keepdim=True)
                logits_cV.sub_(top_c1)
                picked_c1 = logits_cV.gather(1, target_c1)
                total_c1 = logits_cV.exp_().sum(1, keepdim=True)
                loss += (total_c1.log() - picked_c1).sum()
                if not (want_x or want_weight):
                    continue
                # softmax minus one-hot is (exp - total * one-hot) / total; the division moves to the small side
                logits_cV.scatter_add_(1, target_c1, -total_c1)
                grad_cV = logits_cV.to(dtype)
                if grad_x is not None:
                    torch.mm(grad_cV, weight, out=grad_x[start : start + chunk]).div_(total_c1)
                if want_weight:
                    grad_DV.addmm_((x_c / total_c1).to(dtype).t(), grad_cV)
        scale = 1.0 / max(rows, 1)
        grad_VD = grad_DV.t().mul(scale).to(weight_VD.dtype) if want_weight else None
        ctx.save_for_backward(None if grad_x is None else grad_x.mul_(scale).to(x_ND.dtype), grad_VD)
        return loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_ND, grad_VD = ctx.saved_tensors
        scaled = [None if g is None else g * grad.to(g.dtype) for g in (grad_ND, grad_VD)]
        return scaled[0], scaled[1], None


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, ignore: int = -100) -> Tensor:
    """Mean cross-entropy of ``softmax(x W^T)`` against ``targets``, without ever holding all logits.

    Args:
        x_ND: hidden states, ready for the head.
        weight_VD: the head.
        targets_N: long; rows whose target is ``ignore`` are left out before anything is computed.

    Returns:
        the mean in nats over the rows that count, float32 or wider; 0 where none does.
    """
    counted_N = targets_N != ignore
    if not bool(counted_N.all()):
        rows_M = counted_N.nonzero().squeeze(1)
        x_ND, targets_N = x_ND.index_select(0, rows_M), targets_N.index_select(0, rows_M)
    out: Tensor = _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N)  # type: ignore[no-untyped-call]
    return out


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_SD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, loads: tuple[int, ...]
    ) -> Tensor:
        pairs, width = x_SD.shape[0], gate_EFD.shape[1]
        out_SD = x_SD.new_empty(pairs, down_EDF.shape[1])
        gates_SF, ups_SF = x_SD.new_empty(pairs, width), x_SD.new_empty(pairs, width)
        hidden_SF = x_SD.new_empty(pairs, width)
        start = 0
        for expert, load in enumerate(loads):
            if not load:
                continue
            rows = slice(start, start + load)
            x, gate, up, hidden = x_SD[rows], gates_SF[rows], ups_SF[rows], hidden_SF[rows]
            torch.mm(x, gate_EFD[expert].t(), out=gate)
            torch.mm(x, up_EFD[expert].t(), out=up)
            torch.ops.aten.silu.out(gate, out=hidden)
            hidden.mul_(up)
            torch.mm(hidden, down_EDF[expert].t(), out=out_SD[rows])
            start += load
        ctx.save_for_backward(x_SD, gate_EFD, up_EFD, down_EDF, gates_SF, ups_SF, hidden_SF)
        ctx.loads = loads
        return out_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, gate_EFD, up_EFD, down_EDF, gates_SF, ups_SF, hidden_SF = ctx.saved_tensors
        grad_SD = grad_SD.contiguous()
        grad_x_SD = torch.empty_like(x_SD)
        grad_gate_EFD, grad_up_EFD = torch.empty_like(gate_EFD), torch.empty_like(up_EFD)
        grad_down_EDF = torch.empty_like(down_EDF)
        start = 0
        for expert, load in enumerate(ctx.loads):
            if not load:
                for grad in (grad_gate_EFD, grad_up_EFD, grad_down_EDF):
                    grad[expert].zero_()
                continue
            rows = slice(start, start + load)
            x, gate, up, grad = x_SD[rows], gates_SF[rows], ups_SF[rows], grad_SD[rows]
            torch.mm(grad.t(), hidden_SF[rows], out=grad_down_EDF[expert])
            grad_hidden = torch.mm(grad, down_EDF[expert])
            active = F.silu(gate)
            grad_gate = torch.ops.aten.silu_backward(grad_hidden * up, gate)
            grad_up = active.mul_(grad_hidden)
            torch.mm(grad_gate.t(), x, out=grad_gate_EFD[expert])
            torch.mm(grad_up.t(), x, out=grad_up_EFD[expert])
            torch.mm(grad_gate, gate_EFD[expert], out=grad_x_SD[rows]).addmm_(grad_up, up_EFD[expert])
            start += load
        return grad_x_SD, grad_gate_EFD, grad_up_EFD, grad_down_EDF, None


def expert_mlp(x_SD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, loads: tuple[int, ...]) -> Tensor:
    """SwiGLU experts over rows sorted by expert: ``down(silu(gate(x)) * up(x))``, expert by expert.

    Args:
        x_SD: the first ``loads[0]`` rows go through expert 0, the next ``loads[1]`` through expert 1, ...
        gate_EFD, up_EFD, down_EDF: stacked weights [E, F, D], [E, F, D], [E, D, F].
        loads: rows of each expert; they add up to S.

    Returns:
        [S, D].
    """
    out: Tensor = _ExpertMLP.apply(x_SD, gate_EFD, up_EFD, down_EDF, loads)  # type: ignore[no-untyped-call]
    return out

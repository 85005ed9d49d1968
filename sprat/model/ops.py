"""The head and its loss in one pass, for training a small model fast.

``linear_cross_entropy`` never holds the logits: a chunk of rows is multiplied with the head, turned into
probabilities, and at once into the gradients of its rows and of the head, while the chunk is still in the
second-level cache. The gradient is therefore computed in the forward pass and only scaled in the backward pass
(the idea of Liger-Kernel, arXiv 2410.10989, section 3.2, and of Cut Cross-Entropy, arXiv 2411.09009). Softmax
minus one-hot is ``(e - total * onehot) / total`` with ``e = exp(logit - top)``: the division by ``total`` moves
from the wide side [C, V] to the narrow one [C, D]. Rows without a target cost nothing.

Left out: anything that approximates (small probabilities are not skipped), label smoothing, a bias in the head,
second derivatives. On other devices than CPUs the chunks are larger, and products run in autocast's dtype.
"""

# N tokens (rows), D hidden, V vocabulary, C rows of one chunk

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sprat.kernels import fused

_CHUNK_ELEMENTS = {"cpu": 1 << 17}  # logits of one chunk: 512 KB in float32, half of a common L2
_CHUNK_ELEMENTS_DEVICE = 1 << 26


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast wants matrix products on the device of ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, num_items: int) -> Tensor:
        dtype = _product_dtype(x_ND)
        rows, (vocabulary, width) = x_ND.shape[0], weight_VD.shape
        if x_ND.device.type == "cpu" and rows and not 0 <= int(targets_N.min()) <= int(targets_N.max()) < vocabulary:
            raise IndexError(f"a target is outside the vocabulary of {vocabulary}")
        with torch.autocast(x_ND.device.type, enabled=False):
            x, weight = x_ND.to(dtype).contiguous(), weight_VD.to(dtype)
            weight_DV = weight.t().contiguous()
            want_x, want_weight = ctx.needs_input_grad[:2]
            grad_x = torch.empty_like(x) if want_x else None
            grad_DV = x.new_zeros(width, vocabulary, dtype=torch.promote_types(dtype, torch.float32))
            loss = x.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
            chunk = max(64, _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS_DEVICE) // vocabulary)
            for start in range(0, rows, chunk):
                x_CD, target_C1 = x[start : start + chunk], targets_N[start : start + chunk, None]
                logits_CV = torch.mm(x_CD, weight_DV).to(loss.dtype)
                if grad_x is not None and want_weight and fused.is_supported(x):
                    loss += fused.cross_entropy(logits_CV, target_C1)
                    torch.mm(logits_CV, weight, out=grad_x[start : start + chunk])
                    grad_DV.addmm_(x_CD.t(), logits_CV)
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
                    scaled_DC = (x_CD / total_C1).to(dtype).t()
                    if dtype == grad_DV.dtype:
                        grad_DV.addmm_(scaled_DC, grad_CV)
                    else:
                        grad_DV += scaled_DC @ grad_CV
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
        over: how many the sum is divided by where these rows are a part of a larger mean; None for those that count.

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

"""The gradient of one step: micro-batches one after another, the rows of each split over those who work at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sprat.config import LoopConfig
from sprat.data.loader import Batch
from sprat.errors import TrainingError
from sprat.model import Transformer
from sprat.model.forward_context import precision
from sprat.train.losses import LossFn
from sprat.train.parallel import Parallel, Share


def backward(
    model: Transformer,
    batch: Batch,
    config: LoopConfig,
    loss_fn: LossFn,
    parameters: Sequence[nn.Parameter],
    parallel: Parallel,
    step_batch: Batch | None = None,
) -> tuple[dict[str, float], list[Tensor]]:
    """Put the gradient of the step's mean loss into ``parameters``; (metrics, summed expert loads of each MoE layer).

    ``loss_fn`` gets the whole step beside each part, so that what it returns is a share and the shares add up: it
    does not matter how the batch is cut, but for rounding.

    Args:
        batch: the rows of this process.
        step_batch: those of all processes; None where this is the only one.

    Raises:
        TrainingError: the rows cannot be cut into ``config.micro_batches``.
    """
    rows = len(batch)
    if not rows or rows % config.micro_batches:
        what = f"{rows} rows cannot be cut into {config.micro_batches} micro-batches"
        raise TrainingError(what, where="micro_batches", todo="choose a divisor of batch_rows")
    device, size = model.norm.weight.device, rows // config.micro_batches

    def compute_share(part: Batch) -> Share:
        with torch.enable_grad(), precision(device):
            loss = loss_fn(model, part, config, step_batch or batch)
        raw_grads = torch.autograd.grad(loss.total, parameters, allow_unused=True)
        # Hand-written backward passes may return views of one buffer; what is clipped in place must own its memory.
        grads = [None if grad is None else grad.clone(memory_format=torch.contiguous_format) for grad in raw_grads]
        return Share(grads, loss.metrics, loss.expert_loads)

    micro_batches = (batch[start : start + size] for start in range(0, rows, size))
    parts = ([part.to(device) for part in parallel.split(micro_batch)] for micro_batch in micro_batches)
    step = parallel.sum(share for each in parts for share in parallel.map(compute_share, each))
    for parameter, grad in zip(parameters, step.grads, strict=True):
        parameter.grad = grad
    return step.metrics, step.expert_loads

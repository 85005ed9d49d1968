"""The gradient of one step: micro-batches one after another, the rows of each split over the threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sprat.config import LoopConfig
from sprat.data.loader import Batch
from sprat.errors import TrainingError
from sprat.model import Transformer
from sprat.model.forward_context import precision
from sprat.train.objective import LossFn
from sprat.train.thread_data_parallel import ThreadDataParallel


@dataclass(frozen=True)
class _WorkerResult:
    """What one thread computed on its rows: their share of the step's gradient and metrics."""

    grads: tuple[Tensor | None, ...]
    metrics: dict[str, float]
    expert_loads: list[Tensor]


def backward(
    model: Transformer,
    batch: Batch,
    config: LoopConfig,
    loss_fn: LossFn,
    parameters: Sequence[nn.Parameter],
    workers: ThreadDataParallel,
) -> tuple[dict[str, float], list[Tensor]]:
    """Put the gradient of the step's mean loss into ``parameters``; (metrics, summed expert loads of each MoE layer).

    ``loss_fn`` gets the whole batch beside each part, so that what it returns is a share and the shares add up: it
    does not matter how the batch is cut, but for rounding.

    Raises:
        TrainingError: the rows cannot be cut into ``config.micro_batches``.
    """
    rows = len(batch.tokens_BT)
    if rows % config.micro_batches:
        what = f"{rows} rows cannot be cut into {config.micro_batches} micro-batches"
        raise TrainingError(what, where="micro_batches", todo="choose a divisor of batch_rows")
    device, size = model.norm.weight.device, rows // config.micro_batches
    num_workers = min(workers.size, size) if device.type == "cpu" else 1

    def compute_share(part: Batch) -> _WorkerResult:
        with torch.enable_grad(), precision(device):
            loss = loss_fn(model, part, config, batch)
        raw_grads = torch.autograd.grad(loss.total, parameters, allow_unused=True)
        # Hand-written backward passes may return views of one buffer; what is clipped in place must own its memory.
        grads = tuple(None if grad is None else grad.clone(memory_format=torch.contiguous_format) for grad in raw_grads)
        return _WorkerResult(grads, loss.metrics, loss.expert_loads)

    metrics: dict[str, float] = {}
    expert_loads: list[Tensor] = []
    for start in range(0, rows, size):
        bounds = [start + size * worker // num_workers for worker in range(num_workers + 1)]
        parts = [batch.slice_rows(a, b).to(device) for a, b in zip(bounds, bounds[1:], strict=False)]
        for result in workers.map(compute_share, parts):
            _accumulate(parameters, result.grads)
            for name, value in result.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value
            loads = result.expert_loads
            expert_loads = [a + b for a, b in zip(expert_loads, loads, strict=True)] if expert_loads else list(loads)
    return metrics, expert_loads


@torch.no_grad()
def _accumulate(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    """Add ``grads`` to what ``parameters`` hold; a parameter that the loss did not reach keeps what it has."""
    accumulated: list[Tensor] = []
    added: list[Tensor] = []
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is None:
            continue
        if parameter.grad is None:
            parameter.grad = grad
        else:
            accumulated.append(parameter.grad)
            added.append(grad)
    if accumulated:
        torch._foreach_add_(accumulated, added)

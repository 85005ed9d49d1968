"""The gradient of one step: micro-batches one after another, the rows of each shared out over the team."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sprat.config import LoopConfig
from sprat.data.loader import Batch
from sprat.errors import TrainingError
from sprat.model import Transformer
from sprat.train import machine
from sprat.train.objective import LossFn
from sprat.train.team import Team


@dataclass(frozen=True)
class _Share:
    """What one member of the team found on its rows: their share of the step's gradient and metrics."""

    grads: tuple[Tensor | None, ...]
    metrics: dict[str, float]
    loads: list[Tensor]


def backward(
    model: Transformer,
    batch: Batch,
    config: LoopConfig,
    loss_fn: LossFn,
    parameters: Sequence[nn.Parameter],
    team: Team,
) -> tuple[dict[str, float], list[Tensor]]:
    """Put the gradient of the step's mean loss into ``parameters``; (metrics, summed expert loads of each MoE layer).

    ``loss_fn`` is told the whole batch beside each part, so that what it gives is a share and the shares add up: it
    does not matter how the batch is cut, but for rounding.

    Raises:
        TrainingError: the rows cannot be cut into ``config.micro_batches``.
    """
    rows = len(batch.tokens_BT)
    if rows % config.micro_batches:
        what = f"{rows} rows cannot be cut into {config.micro_batches} micro-batches"
        raise TrainingError(what, where="micro_batches", todo="choose a divisor of batch_rows")
    device, size = model.norm.weight.device, rows // config.micro_batches
    members = min(team.size, size) if device.type == "cpu" else 1

    def share(part: Batch) -> _Share:
        with torch.enable_grad(), machine.precision(device):
            loss = loss_fn(model, part, config, batch)
        found = torch.autograd.grad(loss.total, parameters, allow_unused=True)
        # Hand-written backward passes may return views of one buffer; what is clipped in place must own its memory.
        grads = tuple(None if grad is None else grad.clone(memory_format=torch.contiguous_format) for grad in found)
        return _Share(grads, loss.metrics, loss.loads)

    metrics: dict[str, float] = {}
    loads: list[Tensor] = []
    for start in range(0, rows, size):
        cuts = [start + size * member // members for member in range(members + 1)]
        parts = [batch.slice_rows(a, b).to(device) for a, b in zip(cuts, cuts[1:], strict=False)]
        for found in team.map(share, parts):
            _add(parameters, found.grads)
            for name, value in found.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value
            loads = [a + b for a, b in zip(loads, found.loads, strict=True)] if loads else list(found.loads)
    return metrics, loads


@torch.no_grad()
def _add(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    """Add ``grads`` to what ``parameters`` hold; a parameter that the loss did not reach keeps what it has."""
    held: list[Tensor] = []
    more: list[Tensor] = []
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is None:
            continue
        if parameter.grad is None:
            parameter.grad = grad
        else:
            held.append(parameter.grad)
            more.append(grad)
    if held:
        torch._foreach_add_(held, more)

"""What pre-training minimizes: the next token, the token after it (MTP), and a little sequence balance.

    total = next-token + mtp_weight * mean over MTP depths + balance_weight * mean over MoE layers

Each term is a mean over a step: of its targets, of the targets that a depth can see, of its rows. A micro-batch gives
its share of each, its sum divided by what the whole step counts, so that the shares add up to the same loss and the
same gradient however the rows are cut.
"""

# B batch, T time, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sprat.config import LoopConfig
from sprat.data.loader import IGNORE_INDEX, Batch
from sprat.kernels.ops import linear_cross_entropy
from sprat.model import Hidden, Routing, Transformer, balance_loss
from sprat.model.forward_context import mtp_segments


@dataclass(frozen=True)
class Loss:
    """What one part of a step's rows gives; the parts' numbers add up to the step's.

    Attributes:
        total: scalar with gradient, this part's share of the mean over the step.
        metrics: plain numbers for the log, shares likewise; their key ``loss`` is the next-token loss in nats.
        expert_loads: load_E of each MoE layer that ran, in the order of ``model.moe_layers()``.
    """

    total: Tensor
    metrics: dict[str, float]
    expert_loads: list[Tensor]


class LossFn(Protocol):
    """What is minimized."""

    def __call__(
        self, model: Transformer, batch: Batch, config: LoopConfig, step_batch: Batch | None = None, /
    ) -> Loss:
        """The share that ``batch`` has in the loss of ``step_batch``, all rows of the step (None: ``batch`` is all)."""
        ...


def next_token_loss(model: Transformer, batch: Batch, config: LoopConfig, step_batch: Batch | None = None) -> Loss:
    """Cross-entropy of the next token, with MTP where the model has modules and ``mtp_weight`` is positive.

    Args:
        step_batch: all rows of the step, of which ``batch`` is a part; see ``LossFn``.

    Sources: MTP in DeepSeek-V3 (arXiv 2412.19437) eq. 24-25; sequence-wise balance there, eq. 17-20.
    """
    step_batch = step_batch or batch
    segments_BT = attention_segments(batch.segments_BT)
    hidden = model.hidden(batch.tokens_BT, segments_BT=segments_BT)
    head_VD = model.head.dense_weight()
    num_items = num_targets(step_batch.targets_BT)
    main = linear_cross_entropy(hidden.x_BTD.flatten(0, 1), head_VD, batch.targets_BT.flatten(), num_items=num_items)
    total, metrics, routing = main, {"loss": main.item()}, list(hidden.routing)
    if model.mtp and config.mtp_weight > 0:
        losses = []
        for depth, (ahead, targets_BT) in enumerate(mtp_outputs(model, hidden, batch), 1):
            num_items = num_targets(mtp_targets(step_batch, depth))
            losses.append(
                linear_cross_entropy(ahead.x_BTD.flatten(0, 1), head_VD, targets_BT.flatten(), num_items=num_items)
            )
            routing += ahead.routing
        mtp = torch.stack(losses).mean()
        total, metrics["mtp_loss"] = total + config.mtp_weight * mtp, mtp.item()
    if config.balance_weight > 0 and hidden.routing:
        total = total + config.balance_weight * balance_term(hidden.routing, batch, step_batch)
    return Loss(total, metrics, [each.load_E for each in routing])


def num_targets(targets_BT: Tensor) -> int:
    """How many of the targets carry loss."""
    return int((targets_BT != IGNORE_INDEX).sum())


def balance_term(routing: list[Routing], batch: Batch, step_batch: Batch) -> Tensor:
    """The share that ``batch`` has in the balance loss of ``step_batch``: mean over rows and MoE layers."""
    rows = len(batch.tokens_BT)
    return torch.stack([balance_loss(each, rows) for each in routing]).mean() * (rows / len(step_batch.tokens_BT))


def mtp_outputs(model: Transformer, hidden: Hidden, batch: Batch) -> Iterator[tuple[Hidden, Tensor]]:
    """For each MTP depth, from 1: what its module makes of ``hidden``, and the targets [B, T - depth] of its places."""
    segments_BT = attention_segments(batch.segments_BT)
    for depth in range(1, len(model.mtp) + 1):
        hidden = model.mtp_hidden(hidden, batch.tokens_BT, segments_BT=segments_BT, depth=depth)
        yield hidden, mtp_targets(batch, depth)


def mtp_targets(batch: Batch, depth: int) -> Tensor:
    """Targets of an MTP module [B, T - depth]; it joins place i with token i + depth, of one document or no loss.

    Place i then predicts what place i + depth predicts.
    """
    return batch.targets_BT[:, depth:].masked_fill(mtp_segments(batch.segments_BT, depth) == 0, IGNORE_INDEX)


def attention_segments(segments_BT: Tensor) -> Tensor | None:
    """None where every row is one whole segment, so that attention may be plainly causal (and faster)."""
    whole = bool((segments_BT == segments_BT[:, :1]).all()) and bool((segments_BT[:, 0] > 0).all())
    return None if whole else segments_BT

"""What pre-training minimises: the next token, the token after it (MTP), and a little sequence balance.

    total = next-token + mtp_weight * mean over MTP depths + balance_weight * mean over MoE layers

All three are means over a micro-batch; the loop weighs micro-batches by their targets.
"""

# B batch, T time, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sprat.config import LoopConfig
from sprat.data.loader import IGNORED, Batch
from sprat.model import Hidden, Routing, Transformer, balance_loss
from sprat.model.ops import linear_cross_entropy


@dataclass(frozen=True)
class Loss:
    """What one micro-batch gives.

    Attributes:
        total: scalar with gradient, mean over the micro-batch's targets.
        metrics: plain numbers for the log; their key ``loss`` is the next-token loss in nats.
        loads: load_E of each MoE layer that ran, in the order of ``model.moe_layers()``.
    """

    total: Tensor
    metrics: dict[str, float]
    loads: list[Tensor]


LossFn = Callable[[Transformer, Batch, LoopConfig], Loss]


def next_token(model: Transformer, batch: Batch, config: LoopConfig) -> Loss:
    """Cross-entropy of the next token, with MTP where the model has modules and ``mtp_weight`` is positive.

    Sources: MTP in DeepSeek-V3 (arXiv 2412.19437) eq. 24-25; sequence-wise balance there, eq. 17-20.
    """
    segments_BT = _needed_segments(batch.segments_BT)
    hidden = model.hidden(batch.tokens_BT, segments_BT=segments_BT)
    main = linear_cross_entropy(hidden.x_BTD.flatten(0, 1), model.head.weight, batch.targets_BT.flatten())
    total, metrics, routing = main, {"loss": main.item()}, list(hidden.routing)
    depths = len(model.mtp) if config.mtp_weight > 0 else 0
    if depths:
        mtp, extra = _mtp(model, hidden, batch, segments_BT, depths)
        total, metrics["mtp_loss"] = total + config.mtp_weight * mtp, mtp.item()
        routing += extra
    if config.balance_weight > 0 and hidden.routing:
        valid_BT = None if segments_BT is None or bool((segments_BT > 0).all()) else segments_BT > 0
        rows = len(batch.tokens_BT)
        balance = torch.stack([balance_loss(each, rows, valid_BT) for each in hidden.routing]).mean()
        total = total + config.balance_weight * balance
    return Loss(total, metrics, [each.load_E for each in routing])


def _needed_segments(segments_BT: Tensor) -> Tensor | None:
    """None where every row is one whole segment, so that attention may be plainly causal (and faster)."""
    whole = bool((segments_BT == segments_BT[:, :1]).all()) and bool((segments_BT[:, 0] > 0).all())
    return None if whole else segments_BT


def _mtp(
    model: Transformer, hidden: Hidden, batch: Batch, segments_BT: Tensor | None, depths: int
) -> tuple[Tensor, list[Routing]]:
    """(mean loss over depths, routing of the modules' MoE layers).

    Depth k at place i has seen token i + k and predicts what place i + k predicts, provided that place lies in
    the segment of place i.
    """
    losses, routing = [], []
    for depth in range(1, depths + 1):
        hidden = model.mtp_hidden(hidden, batch.tokens_BT, segments_BT=segments_BT, depth=depth)
        targets_BT = batch.targets_BT[:, depth:]
        if segments_BT is not None:
            same_BT = segments_BT[:, depth:] == segments_BT[:, :-depth]
            targets_BT = torch.where(same_BT, targets_BT, IGNORED)
        losses.append(linear_cross_entropy(hidden.x_BTD.flatten(0, 1), model.head.weight, targets_BT.flatten()))
        routing += hidden.routing
    return torch.stack(losses).mean(), routing

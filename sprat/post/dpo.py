"""Direct preference optimization: of two answers to one prompt, more of the one that was chosen.

RLHF learns a reward from pairs and then a policy from the reward. DPO (Rafailov et al. 2023, arXiv 2305.18290) notes
that the best policy for a reward r under a KL penalty beta towards the reference is pi ~ ref exp(r / beta), so that a
policy *is* a reward, r = beta log(pi / ref), and the pairs can be fitted without sampling and without a reward model:

    margin = log(pi / ref)(chosen) - log(pi / ref)(rejected),        loss = -log sigmoid(beta margin)

What goes wrong: the loss falls as well when both answers become less likely, the rejected one faster, and where all
pairs are clear it never stops pulling. IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17) asks for a margin of
1 / (2 beta) and no more. Log-probabilities are sums over tokens, so a long answer weighs more; ``sigmoid_norm`` takes
means instead (Tulu 3, arXiv 2411.15124, section 5), and IPO here too, as its authors did.

Computing. A row holds one pair as its two segments, so a row is never cut between processes or threads. The losses
depend on sums of log-probabilities alone: a first pass over the head gives the sums and with them the slope of the loss
by each answer's log-probability, a second one the gradient (``losses.policy_loss``), and no [N, V] logits are held. The
reference is the model before the first step; what it says of each row is computed once and looked up.

Left out: a reference that moves, ratios other than of the reverse KL, and the losses that TRL has beside these three.
"""

# B rows (pairs), T time, N answer tokens, R rows of the data

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sprat.config.finetune import DPOConfig
from sprat.config.recipe import LoopConfig
from sprat.data.loader import IGNORE_INDEX, Batch, gather_rows
from sprat.data.pack import PackedDataset
from sprat.model import Transformer
from sprat.model.forward_context import precision
from sprat.post.examples import CHOSEN
from sprat.train import losses


@dataclass(frozen=True)
class LogRatios:
    """log(pi / ref) of B pairs, summed over an answer's tokens, and how many tokens those are; each [B]."""

    chosen_B: Tensor
    rejected_B: Tensor
    chosen_length_B: Tensor
    rejected_length_B: Tensor

    @property
    def margin_B(self) -> Tensor:
        """By how much more the chosen answer gained."""
        return self.chosen_B - self.rejected_B

    @property
    def mean_margin_B(self) -> Tensor:
        """The same for each token."""
        return self.chosen_B / self.chosen_length_B - self.rejected_B / self.rejected_length_B


class PreferenceLoss(Protocol):
    """What is minimized, for each pair; a pure function."""

    def __call__(self, ratios: LogRatios, beta: float, /) -> Tensor:
        """The loss of each pair [B]."""
        ...


def sigmoid(ratios: LogRatios, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7)."""
    return -F.logsigmoid(beta * ratios.margin_B)


def sigmoid_norm(ratios: LogRatios, beta: float) -> Tensor:
    """DPO of means over tokens (arXiv 2411.15124, eq. 6)."""
    return -F.logsigmoid(beta * ratios.mean_margin_B)


def ipo(ratios: LogRatios, beta: float) -> Tensor:
    """IPO of means over tokens (arXiv 2310.12036, eq. 17, whose tau is ``beta``)."""
    return (ratios.mean_margin_B - 1 / (2 * beta)).square()


LOSSES: dict[str, PreferenceLoss] = {"sigmoid": sigmoid, "sigmoid_norm": sigmoid_norm, "ipo": ipo}


def preference_loss(config: DPOConfig, reference: Callable[[Batch], tuple[Tensor, Tensor]]) -> losses.LossFn:
    """The loss of ``config`` as a function for ``train.loop.train``.

    Args:
        reference: the reference's log-probabilities of a batch's chosen and rejected answers, each [B].

    Its metrics: ``reward_margin`` (beta times the margin) and ``reward_accuracy``, the share of pairs whose chosen
    answer gained more.
    """
    formula = LOSSES[config.loss]

    def loss(model: Transformer, batch: Batch, settings: LoopConfig, whole: Batch | None = None) -> losses.Loss:
        hidden = model.hidden(batch.tokens_BT, segments_BT=losses.attention_segments(batch.segments_BT))
        x_ND, targets_N, pair_N, chosen_N = _answers(hidden.x_BTD, batch)
        head_VD = model.head.dense_weight()
        logprob_N, _ = losses.token_logprob(x_ND.detach(), head_VD.detach(), targets_N)
        sums_2B = _sums(logprob_N, pair_N, chosen_N, len(batch))
        lengths_2B = _sums(torch.ones_like(logprob_N), pair_N, chosen_N, len(batch))
        share = 1 / len(whole or batch)
        with torch.enable_grad():  # also where only the value is asked for
            sums_2B.requires_grad_()
            chosen_B, rejected_B = (sums - ref for sums, ref in zip(sums_2B, reference(batch), strict=True))
            ratios = LogRatios(chosen_B, rejected_B, *lengths_2B)
            value = formula(ratios, config.beta).sum() * share
            (slope_2B,) = torch.autograd.grad(value, sums_2B)
        slope_N = slope_2B[(~chosen_N).long(), pair_N]
        linear, _, _ = losses.policy_loss(
            x_ND, head_VD, targets_N, lambda logprob_C, rows: (slope_N[rows] * logprob_C, slope_N[rows])
        )
        margin_B = ratios.margin_B.detach()
        metrics = {
            "loss": float(value.detach()),
            "reward_margin": float(margin_B.sum()) * config.beta * share,
            "reward_accuracy": float((margin_B > 0).sum()) * share,
        }
        return losses.Loss(linear, metrics, [each.load_E for each in hidden.routing])

    return loss


def reference_logprobs(
    model: Transformer, packed: PackedDataset, rows: int = 4
) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """What ``model`` says of all rows of ``packed``, computed once; later asked for by the rows of a batch."""
    device, table = model.norm.weight.device, dict[bytes, tuple[float, float]]()
    training = model.training
    model.eval()
    for start in range(0, packed.num_rows, rows):
        batch = gather_rows(packed, range(start, min(start + rows, packed.num_rows))).to(device)
        with torch.no_grad(), precision(device):
            x_BTD = model.hidden(batch.tokens_BT, segments_BT=losses.attention_segments(batch.segments_BT)).x_BTD
            x_ND, targets_N, pair_N, chosen_N = _answers(x_BTD, batch)
            logprob_N, _ = losses.token_logprob(x_ND, model.head.dense_weight(), targets_N)
        sums_2B = _sums(logprob_N, pair_N, chosen_N, len(batch))
        table |= {key: (float(c), float(r)) for key, c, r in zip(row_keys(batch), *sums_2B, strict=True)}
    model.train(training)

    def lookup(batch: Batch) -> tuple[Tensor, Tensor]:
        logprobs_B2 = torch.tensor([table[key] for key in row_keys(batch)], device=batch.tokens_BT.device)
        return logprobs_B2[:, 0], logprobs_B2[:, 1]

    return lookup


def mean_metrics(
    model: Transformer, loss_fn: losses.LossFn, packed: PackedDataset, config: DPOConfig, rows: int = 4
) -> dict[str, float]:
    """The metrics of ``loss_fn`` over all rows of ``packed``."""
    whole, total = gather_rows(packed, range(packed.num_rows)), Counter[str]()
    for start in range(0, packed.num_rows, rows):
        with torch.no_grad(), precision(model.norm.weight.device):
            total.update(loss_fn(model, whole[start : start + rows], config, whole).metrics)
    return dict(total)


def row_keys(batch: Batch) -> list[bytes]:
    """What tells a row from others."""
    both = torch.cat([batch.tokens_BT, batch.segments_BT, batch.targets_BT], 1).cpu()
    return [row.numpy().tobytes() for row in both]


def _answers(x_BTD: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the N answer tokens of a batch: hidden states before them, ids, row, and whether it is the chosen answer."""
    is_answer_BT = batch.targets_BT != IGNORE_INDEX
    pair_N = is_answer_BT.nonzero()[:, 0]
    return x_BTD[is_answer_BT], batch.targets_BT[is_answer_BT], pair_N, batch.segments_BT[is_answer_BT] == CHOSEN


def _sums(value_N: Tensor, pair_N: Tensor, chosen_N: Tensor, pairs: int) -> Tensor:
    """Sums over the chosen and the rejected answers of each pair, [2, B]."""
    place_N = (~chosen_N).long() * pairs + pair_N
    return value_N.new_zeros(2 * pairs).index_add(0, place_N, value_N).view(2, pairs)

"""What GRPO minimizes: advantages within a group, and the clipped surrogate of a token (see ``grpo.py``).

Dims: G answers in a group, P groups, N response tokens, C those of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sprat.post.rl.rollout import Rollout

_ROUNDING_STEPS = 4  # steps of the rewards' own precision that still count as equal


def advantages(reward_PG: Tensor, normalize_std: bool) -> Tensor:
    """Group-relative advantages [P, G] of float rewards [P, G]; groups without spread get exactly 0.

    Whatever the unit of the rewards and wherever their zero: two rewards are equal where they differ by no more than
    rounding. NaN abstains: it is no part of its group and gets 0. The deviation is that of the population.

    >>> advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]), True).tolist()
    [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    valid_PG = ~reward_PG.isnan()
    count_P1 = valid_PG.sum(1, keepdim=True).clamp(min=1)
    value_PG = reward_PG.double().masked_fill(~valid_PG, 0.0)
    high_P1 = value_PG.masked_fill(~valid_PG, -torch.inf).amax(1, keepdim=True)
    spread_P1 = high_P1 - value_PG.masked_fill(~valid_PG, torch.inf).amin(1, keepdim=True)
    noise_P1 = _ROUNDING_STEPS * torch.finfo(reward_PG.dtype).eps * value_PG.abs().amax(1, keepdim=True)
    has_spread_PG = valid_PG & (spread_P1 > noise_P1)
    centered_PG = value_PG - value_PG.sum(1, keepdim=True) / count_P1
    if normalize_std:
        # divided by the spread first: the squares can be held, whatever the unit
        centered_PG = (centered_PG / spread_P1).masked_fill(~has_spread_PG, 0.0)
        centered_PG = centered_PG / (centered_PG.square().sum(1, keepdim=True) / count_P1).sqrt()
    return torch.where(has_spread_PG, centered_PG, 0.0).float()


def reward_tensor(rollouts: Sequence[Rollout], group_size: int) -> Tensor:
    """What the answers were paid [P, G], NaN where nobody paid; in float64, for rewards far from zero differ too."""
    rewards = [math.nan if rollout.reward is None else rollout.reward for rollout in rollouts]
    return torch.tensor(rewards, dtype=torch.float64).view(-1, group_size)


@dataclass
class ClippedSurrogate:
    """The clipped surrogate with optional KL, elementwise in the new log-probability (see ``policy_loss``).

    Args:
        old_N: log-probabilities under the policy that sampled.
        advantage_N: of each token's answer.
        weight: of one token, one over the tokens of the minibatch.
        reference_N: log-probabilities under the frozen start, or None.
        kl_ratio: weigh the KL by the ratio, so that its gradient is unbiased.
        importance_N: truncated weights of the tokens, or None.
    """

    old_N: Tensor
    advantage_N: Tensor
    weight: float
    low: float
    high: float
    reference_N: Tensor | None = None
    kl_weight: float = 0.0
    kl_ratio: bool = False
    importance_N: Tensor | None = None

    def __call__(self, logprob_C: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Loss of each token of a chunk and its derivative by the log-probability."""
        advantage_C = self.advantage_N[rows]
        ratio_C = (logprob_C - self.old_N[rows]).exp()
        clipped_C = ratio_C.clamp(1 - self.low, 1 + self.high)
        unclipped_C = ratio_C * advantage_C <= clipped_C * advantage_C  # the minimum is the unclipped branch
        loss_C = -torch.where(unclipped_C, ratio_C, clipped_C) * advantage_C
        slope_C = torch.where(unclipped_C, -ratio_C * advantage_C, 0.0)
        if self.importance_N is not None:
            loss_C, slope_C = loss_C * self.importance_N[rows], slope_C * self.importance_N[rows]
        if self.reference_N is not None:
            log_ratio_ref_C = self.reference_N[rows] - logprob_C
            kl_C, kl_slope_C = log_ratio_ref_C.exp() - 1 - log_ratio_ref_C, 1 - log_ratio_ref_C.exp()
            if self.kl_ratio:
                kl_C, kl_slope_C = ratio_C * kl_C, ratio_C * (kl_C + kl_slope_C)
            loss_C = loss_C + self.kl_weight * kl_C
            slope_C = slope_C + self.kl_weight * kl_slope_C
        return loss_C * self.weight, slope_C * self.weight

    def clipped(self, logprob_N: Tensor) -> Tensor:
        """Bool [N]: tokens that the clip has taken out of the gradient."""
        ratio_N = (logprob_N - self.old_N).exp()
        high_N = (self.advantage_N > 0) & (ratio_N > 1 + self.high)
        return high_N | ((self.advantage_N < 0) & (ratio_N < 1 - self.low))

"""What RL of verifiable rewards minimizes, as pure functions: advantages within a group, and six losses on tokens.

All six move a token of an answer by the answer's advantage A, and by how likely the token has become since it was
sampled, ratio = p_new / p_old. They differ in three places:

| ``loss`` | a token's loss | a token's weight |
|---|---|---|
| ``grpo`` (DeepSeekMath, arXiv 2402.03300, eq. 3) | -min(ratio A, clip(ratio) A) | 1 / (answers x tokens of its own) |
| ``bnpo`` (token-level, as in TRL) | the same | 1 / tokens of the minibatch |
| ``dapo`` (arXiv 2503.14476, eq. 8) | the same | 1 / (tokens of the step / minibatches) |
| ``dr_grpo`` (arXiv 2503.20783, section 3.2) | the same | 1 / (answers x max_tokens), a constant |
| ``gspo`` (arXiv 2507.18071, eq. 5) | the same, the ratio of the whole answer (geometric mean) | as ``grpo`` |
| ``cispo`` (MiniMax-M1, arXiv 2506.13585, eq. 4) | -min(ratio, 1 + high) A log p, no gradient of min | as ``dapo`` |

``clip(ratio)`` lies in [1 - low, 1 + high]. Answers of groups without spread are no part of what is learned, and do not
count in a weight, but in that of ``dr_grpo``, which must not depend on how many there are. Names are as in TRL, whose
numbers these are (``bench/trl_policy_losses.py``), but that TRL's ``epsilon_high`` of cispo is ``1 + high`` here.

On each token may come, added or multiplied, what is the same for all six:
- *KL to the start* (estimator k3, Schulman 2020): its value estimates KL(policy || start), but its gradient through the
  log-probability alone is that of KL(start || policy). Multiplied by the ratio it is KL(policy || start)'s own
  (DeepSeek-V3.2, arXiv 2512.02556, section 3.1; TRL's ``use_bias_correction_kl``, there the default).
- *Off-policy sequence mask* (DeepSeek-V3.2, section 3.1): a bad answer (A < 0) that the policy has left, by more than
  so many nats a token in the mean, is not learned from: to push it further down only disturbs.
- *Truncated importance weights* (Ionides 2008): min(p_trainer / p_sampler, cap) where two programs disagree.

Dims: G answers in a group, P groups, B answers, N response tokens, C those of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossName = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"]
_ROUNDING_STEPS = 4  # steps of the rewards' own precision that still count as equal


def advantages(reward_PG: Tensor, normalize_std: bool, *, sample_std: bool = False, std_epsilon: float = 0.0) -> Tensor:
    """Group-relative advantages [P, G] of float rewards [P, G]; groups without spread get exactly 0.

    Whatever the unit of the rewards and wherever their zero: two rewards are equal where they differ by no more than
    rounding. NaN abstains: it is no part of its group and gets 0.

    Args:
        normalize_std: divide by the deviation of the group (DeepSeekMath); not to is Dr. GRPO.
        sample_std: the deviation of a sample (over G - 1) instead of that of the population (over G), which makes
            advantages larger by ``sqrt(G / (G - 1))``.
        std_epsilon: is added to the deviation (TRL: 1e-4); with it, advantages depend on the rewards' unit.

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
        freedom_P1 = (count_P1 - 1).clamp(min=1) if sample_std else count_P1
        std_P1 = (centered_PG.square().sum(1, keepdim=True) / freedom_P1).sqrt()
        centered_PG = centered_PG / (std_P1 + std_epsilon / spread_P1)
    return torch.where(has_spread_PG, centered_PG, 0.0).float()


def overlong_penalty(tokens: int, max_tokens: int, buffer: int) -> float:
    """What is added to the reward of an answer of ``tokens``: 0, falling to -1 over the last ``buffer`` of
    ``max_tokens`` (soft overlong punishment, DAPO, arXiv 2503.14476, eq. 13).

    >>> [overlong_penalty(tokens, 100, 20) for tokens in (80, 90, 100)]
    [0.0, -0.5, -1.0]
    """
    return max(-1.0, min(0.0, (max_tokens - buffer - tokens) / buffer)) if buffer else 0.0


def answer_weights(
    loss: LossName,
    tokens_B: Sequence[int],
    *,
    step_tokens: int | None = None,
    step_answers: int | None = None,
    minibatches: int = 1,
    max_tokens: int = 1,
) -> list[float]:
    """The weight of each token of the B answers of a minibatch; the sum over tokens of weight x loss is the loss.

    Args:
        tokens_B: tokens of each answer.
        step_tokens: tokens of all answers that the step learns from, for ``dapo`` and ``cispo``; this minibatch's where
            it is all there is.
        step_answers: answers of the step with and without spread, for ``dr_grpo``; B where it is all there is.
        minibatches: of the step.
        max_tokens: of an answer, for ``dr_grpo``.

    >>> answer_weights("grpo", [1, 4]), answer_weights("dapo", [1, 4])
    ([0.5, 0.125], [0.2, 0.2])
    """
    if loss in ("grpo", "gspo"):
        return [1 / (len(tokens_B) * tokens) for tokens in tokens_B]
    if loss == "dr_grpo":
        answers = len(tokens_B) if step_answers is None else step_answers / minibatches
        return [1 / (answers * max_tokens)] * len(tokens_B)
    whole_step = loss != "bnpo" and step_tokens is not None and minibatches > 1
    tokens = step_tokens / minibatches if whole_step and step_tokens is not None else sum(tokens_B)
    return [1 / tokens] * len(tokens_B)


def clipped_surrogate(log_ratio_N: Tensor, advantage_N: Tensor, low: float, high: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) [N]: PPO's, with a ceiling of its own (DAPO, section 3.1).

    A rare token may rise by more than it may fall, else exploration dies: a token at 1 % could only reach 1.2 %.
    """
    ratio_N = log_ratio_N.detach().exp()
    clipped_N = is_clipped(ratio_N, advantage_N, low, high)
    free_N = log_ratio_N.masked_fill(clipped_N, 0.0).exp()  # an overflow that is clipped has a derivative, 0
    return -torch.where(clipped_N, ratio_N.clamp(1 - low, 1 + high), free_N) * advantage_N


def is_clipped(ratio_N: Tensor, advantage_N: Tensor, low: float, high: float) -> Tensor:
    """Bool [N]: tokens that the clip has taken out of the gradient."""
    return ratio_N * advantage_N > ratio_N.clamp(1 - low, 1 + high) * advantage_N


def clipped_importance(logprob_N: Tensor, log_ratio_N: Tensor, advantage_N: Tensor, high: float) -> Tensor:
    """-min(ratio, 1 + high) A log p [N]: no token is ever taken out of the gradient, only its weight is bounded."""
    return -log_ratio_N.detach().exp().clamp(max=1 + high) * advantage_N * logprob_N


def sequence_mean(value_N: Tensor, answer_N: Tensor, answers: int) -> Tensor:
    """The mean over each answer's tokens, at each of its tokens [N]; ``answer_N`` says whose token each is."""
    ones_B = value_N.new_zeros(answers).index_add(0, answer_N, torch.ones_like(value_N))
    sum_B = value_N.new_zeros(answers).index_add(0, answer_N, value_N)
    return (sum_B / ones_B.clamp(min=1))[answer_N]


def kl_to_reference(logprob_N: Tensor, reference_N: Tensor) -> Tensor:
    """k3 [N], in nats: ``exp(d) - 1 - d`` with ``d = reference - logprob``; never negative."""
    log_ratio_N = reference_N - logprob_N
    return log_ratio_N.exp() - 1 - log_ratio_N


def off_policy_mask(logprob_N: Tensor, old_N: Tensor, advantage_N: Tensor, answer_N: Tensor, limit: float) -> Tensor:
    """Bool [N]: tokens of answers that are learned from (see the file's head); ``limit`` in nats a token."""
    answers = int(answer_N.max()) + 1 if len(answer_N) else 0
    return (advantage_N >= 0) | (sequence_mean(old_N - logprob_N.detach(), answer_N, answers) <= limit)


@dataclass
class PolicyLoss:
    """The loss of the tokens of some answers, as ``train.losses.policy_loss`` asks for it.

    Args:
        old_N: log-probabilities under the policy that sampled, in nats.
        advantage_N: of each token's answer.
        weight_N: of each token (``answer_weights``), or one for all.
        loss: see the file's head.
        low, high: the clip.
        answer_N: which answer a token belongs to, int64 from 0; for what is of whole answers.
        reference_N: log-probabilities under the frozen start, or None.
        kl_weight: of the KL to it.
        kl_ratio: weigh the KL by the ratio, so that its gradient is unbiased.
        importance_N: truncated weights of the tokens, or None.
        off_policy_limit: nats a token beyond which bad answers are masked, or None.
        sampled_N: log-probabilities with which the tokens were drawn, where ``old_N`` are the trainer's own: what an
            answer is off policy from (as in TRL).
    """

    old_N: Tensor
    advantage_N: Tensor
    weight_N: float | Tensor
    low: float
    high: float
    reference_N: Tensor | None = None
    kl_weight: float = 0.0
    kl_ratio: bool = False
    importance_N: Tensor | None = None
    loss: LossName = "dapo"
    answer_N: Tensor | None = None
    off_policy_limit: float | None = None
    sampled_N: Tensor | None = None

    @property
    def is_of_tokens(self) -> bool:
        """Whether a token's loss can be told without the other tokens of its answer."""
        return self.loss != "gspo" and self.off_policy_limit is None

    def token_losses(self, logprob_C: Tensor, rows: slice = slice(None)) -> Tensor:
        """Loss of each token of ``rows`` without its weight, differentiable in their log-probabilities ``logprob_C``.

        Raises:
            ValueError: only some of the tokens, where the loss is one of whole answers.
        """
        if rows != slice(None) and not self.is_of_tokens:
            raise ValueError("a loss of whole answers needs all their tokens at once")
        advantage_C = self.advantage_N[rows]
        log_ratio_C = self._log_ratio(logprob_C, rows)
        if self.loss == "cispo":
            loss_C = clipped_importance(logprob_C, log_ratio_C, advantage_C, self.high)
        else:
            loss_C = clipped_surrogate(log_ratio_C, advantage_C, self.low, self.high)
        if self.off_policy_limit is not None:
            assert self.answer_N is not None
            old_N, limit = self.old_N if self.sampled_N is None else self.sampled_N, self.off_policy_limit
            loss_C = loss_C * off_policy_mask(logprob_C, old_N, self.advantage_N, self.answer_N, limit)
        if self.importance_N is not None:
            loss_C = loss_C * self.importance_N[rows]
        if self.reference_N is not None:
            kl_C = kl_to_reference(logprob_C, self.reference_N[rows])
            loss_C = loss_C + self.kl_weight * (log_ratio_C.exp() * kl_C if self.kl_ratio else kl_C)
        return loss_C

    def _log_ratio(self, logprob_C: Tensor, rows: slice) -> Tensor:
        log_ratio_C = logprob_C - self.old_N[rows]
        if self.loss == "gspo":
            assert self.answer_N is not None
            log_ratio_C = sequence_mean(log_ratio_C, self.answer_N, int(self.answer_N.max()) + 1)
        return log_ratio_C

    def __call__(self, logprob_C: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Weighted loss of each token of a chunk, and the derivative of their sum by each log-probability."""
        with torch.enable_grad():
            logprob_C = logprob_C.detach().requires_grad_()
            loss_C = self.token_losses(logprob_C, rows)
            (slope_C,) = torch.autograd.grad(loss_C.sum() if self.is_of_tokens else self._weighted(loss_C), logprob_C)
        loss_C = loss_C.detach()
        if not self.is_of_tokens:
            return loss_C * self.weight_N, slope_C
        weight_C = self.weight_N[rows] if isinstance(self.weight_N, Tensor) else self.weight_N
        return loss_C * weight_C, slope_C * weight_C

    def _weighted(self, loss_N: Tensor) -> Tensor:
        return (loss_N * self.weight_N).sum()

    def clipped(self, logprob_N: Tensor) -> Tensor:
        """Bool [N]: tokens whose ratio is bounded: out of the gradient, or for ``cispo`` of a bounded weight."""
        ratio_N = self._log_ratio(logprob_N, slice(None)).exp()
        if self.loss == "cispo":
            return ratio_N > 1 + self.high
        return is_clipped(ratio_N, self.advantage_N, self.low, self.high)


class WholeAnswers:
    """A loss of whole answers, ready for chunks: its derivative was taken at log-probabilities known before."""

    def __init__(self, loss: PolicyLoss, logprob_N: Tensor) -> None:
        self._loss_N, self._slope_N = loss(logprob_N, slice(None))

    def __call__(self, logprob_C: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """What is known of ``rows``."""
        return self._loss_N[rows], self._slope_N[rows]


def reward_tensor(rewards: Sequence[float | None], group_size: int) -> Tensor:
    """What the answers were paid [P, G], NaN where nobody paid; in float64, for rewards far from zero differ too."""
    paid = [math.nan if reward is None else reward for reward in rewards]
    return torch.tensor(paid, dtype=torch.float64).view(-1, group_size)

"""One step of the trainer: minibatches of paid answers, the gradient of their loss, and what is measured on the way.

Dims: B rows, D hidden, V vocabulary, N response tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sprat.config import GRPOConfig, OptimConfig
from sprat.config.rl import RLRunConfig
from sprat.errors import TrainingError
from sprat.model import Transformer
from sprat.post.rl.batch import ResponseTokens, forward_responses, micro_batches
from sprat.post.rl.logprob_gap import LogprobGap
from sprat.post.rl.losses import PolicyLoss, WholeAnswers, answer_weights
from sprat.post.rl.rollout import Rollout
from sprat.train import optim, schedule
from sprat.train.losses import policy_loss, token_logprob

ANSWERS_PER_OUTLIER = 50  # of as many answers one may be far off by a router's near tie


@dataclass
class TokenMetrics:
    """Sums over tokens, divided at the end of the step."""

    total: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, loss: PolicyLoss, logprob_N: Tensor, entropy_N: Tensor) -> None:
        """Count the tokens of one micro-batch; their new log-probabilities and entropies, in nats."""
        gap_N = logprob_N - loss.old_N
        self.total["tokens"] += len(gap_N)
        self.total["entropy"] += float(entropy_N.sum())
        self.total["clip_fraction"] += float(loss.clipped(logprob_N).sum())
        self.total["kl"] += float((gap_N.exp() - 1 - gap_N).sum())
        if loss.reference_N is not None:
            log_ratio_ref_N = loss.reference_N - logprob_N
            self.total["kl_reference"] += float((log_ratio_ref_N.exp() - 1 - log_ratio_ref_N).sum())

    def means(self) -> dict[str, float]:
        """Each quantity for a token."""
        tokens = max(self.total["tokens"], 1.0)
        return {name: value / tokens for name, value in self.total.items() if name != "tokens"}


@dataclass
class LogprobMismatch:
    """How far the trainer's log-probabilities lie from those that were sampled with, before a weight moved.

    Where two experts are as good as equal, the last bit of a sum decides which is taken, and all that follows in that
    answer is another computation. That is one answer in thousands and no fault; so the bound is on the mean over the
    answers but the worst of every ``ANSWERS_PER_OUTLIER``. Answers of older weights than the trainer's are no part of
    it: they differ because the policy has moved.
    """

    largest: float = 0.0
    answers: list[tuple[float, int]] = field(default_factory=list)  # sum of gaps, tokens

    def add(
        self, trainer_N: Tensor, sampler_N: Tensor, sizes: Sequence[int], stale: Sequence[bool] | None = None
    ) -> None:
        """Compare the tokens of answers of ``sizes`` tokens, but for those that are ``stale``."""
        gaps = (trainer_N - sampler_N).abs().split(list(sizes))
        for gap_N, is_stale in zip(gaps, stale or [False] * len(gaps), strict=True):
            if not is_stale:
                self.largest = max(self.largest, float(gap_N.max()))
                self.answers.append((float(gap_N.sum()), len(gap_N)))

    def check(self, limit: float, step: int) -> dict[str, float]:
        """The two metrics. Raises: TrainingError: the mean is above ``limit``, or no number."""
        ranked = sorted(self.answers, key=lambda a: -math.inf if math.isnan(a[0]) else -a[0] / a[1])
        outliers = math.ceil(len(ranked) / ANSWERS_PER_OUTLIER) if len(ranked) > 1 else 0
        mean, trimmed = _mean(ranked), _mean(ranked[outliers:])
        if not trimmed <= limit or math.isnan(mean):
            what = f"in step {step} the trainer's log-probabilities are {trimmed:.2g} nats from the sampler's (mean)"
            todo = "train float32 weights, or raise rl.max_mismatch and correct for it by rl.importance_cap = 2"
            raise TrainingError(f"{what}, rl.max_mismatch is {limit:g}", where="rl", todo=todo)
        return {"mismatch": self.largest, "mismatch_mean": mean}


def _stale(rollouts: Sequence[Rollout], step: int) -> list[bool]:
    """Of each answer, whether other weights sampled it than those that ``step`` moves."""
    return [any(version != step - 1 for version in rollout.versions) for rollout in rollouts]


def _mean(answers: Sequence[tuple[float, int]]) -> float:
    """The mean gap of the tokens of ``answers``."""
    return sum(total for total, _ in answers) / max(1, sum(count for _, count in answers))


def update_policy(
    model: Transformer,
    optimizer: optim.OptimizersContainer,
    rollouts: Sequence[Rollout],
    advantage_B: Tensor,
    config: RLRunConfig,
    step: int,
    reference: Transformer | None,
    step_answers: int | None = None,
    measure_gap: bool = False,
) -> dict[str, float]:
    """``epochs`` passes over the rollouts that have an advantage; one optimizer step for each minibatch.

    Args:
        step_answers: of the step, with those that teach nothing; as many as ``rollouts`` where nothing else is said.
        measure_gap: tell what ``LogprobGap`` does as well.
    """
    token_metrics, norms, mismatch, gap = (
        TokenMetrics(),
        list[float](),
        LogprobMismatch(),
        LogprobGap(step, measure_gap),
    )
    if config.importance_cap is not None:
        rollouts = _with_importance(model, rollouts, config, mismatch, gap, step)
        metrics = mismatch.check(config.max_mismatch, step)
    sizes, minibatches = [rollout.num_sampled for rollout in rollouts], math.ceil(len(rollouts) / config.minibatch)
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(((config.seed * 100_003 + step) * 101 + epoch) % 2**63)
        shuffled = torch.randperm(len(rollouts), generator=generator)
        for minibatch_index, minibatch in enumerate(shuffled.tensor_split(minibatches)):
            rows = minibatch.tolist()
            row_sizes = [sizes[row] for row in rows]
            weights = answer_weights(
                config.loss,
                row_sizes,
                step_tokens=sum(sizes),
                step_answers=step_answers,
                minibatches=minibatches,
                max_tokens=config.max_tokens,
            )
            weight_B = torch.zeros(len(rollouts)).index_copy(0, minibatch, torch.tensor(weights))
            for micro in micro_batches(rollouts, rows):
                selected = [rollouts[row] for row in micro]
                tokens = forward_responses(model, selected, advantage_B[micro])
                loss = _policy_loss(tokens, weight_B[micro], [sizes[row] for row in micro], config)
                if reference is not None:
                    loss.kl_weight = config.kl_weight
                    loss.reference_N, _ = _logprobs(reference, selected, config, replay_routes=False)
                total, logprob_N, entropy_N = _head_loss(model, tokens, loss, config.temperature)
                total.backward()
                token_metrics.add(loss, logprob_N, entropy_N)
                gap.trained += tokens.routes
                if epoch + minibatch_index == 0 and config.importance_cap is None:
                    gap.compare(logprob_N, tokens, selected)
                    mismatch.add(logprob_N, tokens.old_N, [sizes[row] for row in micro], _stale(selected, step))
            if not norms and config.importance_cap is None:
                metrics = mismatch.check(config.max_mismatch, step)
            norms.append(_step(optimizer, config, step))
    return {**token_metrics.means(), **metrics, **gap.metrics(), "grad_norm": sum(norms) / len(norms)}


def _policy_loss(tokens: ResponseTokens, weight_B: Tensor, sizes: Sequence[int], config: RLRunConfig) -> PolicyLoss:
    """What ``config`` minimizes on the tokens of answers of ``sizes`` tokens, each token of a weight."""
    size_B = torch.tensor(sizes)
    device = tokens.old_N.device
    return PolicyLoss(
        tokens.old_N,
        tokens.advantage_N,
        weight_B.repeat_interleave(size_B).to(device),
        config.clip_low,
        config.clip_high,
        kl_ratio=config.kl_bias_correction,
        importance_N=tokens.importance_N,
        loss=config.loss,
        answer_N=torch.arange(len(sizes)).repeat_interleave(size_B).to(device),
        off_policy_limit=config.off_policy_limit,
        sampled_N=tokens.sampled_N,
    )


def _head_loss(
    model: Transformer, tokens: ResponseTokens, loss: PolicyLoss, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``policy_loss``; a loss of whole answers takes one more pass over the head, to know them whole."""
    head_VD = model.head.dense_weight()
    if loss.is_of_tokens:
        return policy_loss(tokens.x_ND, head_VD, tokens.targets_N, loss, temperature)
    logprob_N, _ = token_logprob(tokens.x_ND, head_VD, tokens.targets_N, temperature)
    return policy_loss(tokens.x_ND, head_VD, tokens.targets_N, WholeAnswers(loss, logprob_N), temperature)


def _with_importance(
    model: Transformer,
    rollouts: Sequence[Rollout],
    config: RLRunConfig,
    mismatch: LogprobMismatch,
    gap: LogprobGap,
    step: int,
) -> list[Rollout]:
    """The rollouts with the trainer's log-probabilities, and with truncated weights for what the sampler's were."""
    with_importance = list(rollouts)
    for micro in micro_batches(rollouts, range(len(rollouts))):
        selected = [rollouts[row] for row in micro]
        trainer_N, tokens = _logprobs(model, selected, config)
        sampler_N, sizes = tokens.old_N, [rollout.num_sampled for rollout in selected]
        gap.compare(trainer_N, tokens, selected)
        mismatch.add(trainer_N, sampler_N, sizes, _stale(selected, step))
        importance_N = (trainer_N - sampler_N).exp().clamp(max=config.importance_cap)
        parts = zip(micro, trainer_N.split(sizes), importance_N.split(sizes), strict=True)
        for row, logprob_N, weight_N in parts:
            own = rollouts[row]
            trainers, weights = own.spread(logprob_N.tolist()), own.spread(weight_N.tolist())
            with_importance[row] = replace(own, logprobs=trainers, importance=weights, sampled_logprobs=own.logprobs)
    return with_importance


@torch.no_grad()
def _logprobs(
    model: Transformer, rollouts: Sequence[Rollout], config: RLRunConfig, *, replay_routes: bool = True
) -> tuple[Tensor, ResponseTokens]:
    """Log-probabilities of the response tokens under ``model``, and the tokens; no gradient."""
    tokens = forward_responses(model, rollouts, torch.zeros(len(rollouts)), replay_routes=replay_routes)
    logprob_N, _ = token_logprob(tokens.x_ND, model.head.dense_weight(), tokens.targets_N, config.temperature)
    return logprob_N, tokens


def _step(optimizer: optim.OptimizersContainer, config: RLRunConfig, step: int) -> float:
    """Clip the gradient, move the weights, forget the gradient; returns the norm before clipping."""
    norm = optimizer.clip_grad_norm(config.grad_clip)
    if not math.isfinite(norm):
        todo = "lower rl.lr and go on from the run's last checkpoint: --init-from RUN"
        raise TrainingError(f"the gradient is not finite in RL step {step}", where="rl", todo=todo)
    optimizer.step(lr_factor=schedule.lr_factor(optim_config(config), step - 1, config.steps))
    optimizer.zero_grad()
    return norm


def optim_config(config: GRPOConfig) -> OptimConfig:
    """One rate for all weights, without a warm-up."""
    lr, decay_fraction = config.lr, config.decay_fraction
    return OptimConfig(name=config.optim, muon_lr=lr, adam_lr=lr, warmup_steps=0, decay_fraction=decay_fraction)

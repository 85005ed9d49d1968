# size: one algorithm is one flat file
"""GRPO: reinforcement learning with a group of answers as its own baseline, in one flat file.

What it is (DeepSeekMath, arXiv 2402.03300, section 4.1). For each question sample a group of G answers
from the policy and pay each by a rule. An answer's *advantage* is how much better it was paid than its
group, ``(r_i - mean(r)) / std(r)``. Each of its tokens gets that advantage, and the policy is moved by
PPO's clipped surrogate,

    ratio_t = p_new(token_t) / p_old(token_t)
    loss    = - mean over tokens of  min(ratio_t A, clip(ratio_t, 1 - low, 1 + high) A)  [ + beta KL ]

Why it works without PPO's value model: the group's mean is an unbiased estimate of what this question is
worth to this policy, which is all that a baseline must be. What is common to the group (an easy
question, a good prompt) cancels; what made one answer better than its siblings remains.

Later corrections, and what became of them here:
- *Token-level loss* (DAPO, arXiv 2503.14476, section 3.3). The paper's ``1/G sum_i 1/|o_i|`` makes a token of
  a long wrong answer cheap, so wrong answers grow. Here each token of a minibatch weighs the same. This
  differs from Dr. GRPO (arXiv 2503.20783), which divides by a constant, only in the size of the step.
- *The spread* is the deviation of the group as a whole population (over G), not of a sample (over G - 1, as in TRL,
  which also adds 1e-4): ours is longer by ``sqrt(G / (G - 1))``, 3 % at G = 16, and does not depend on the unit of
  the rewards.
- *No division by the spread* (Dr. GRPO). Dividing makes questions that are almost always or almost never
  solved weigh most. ``normalize_std = false`` turns it off; tiny groups learn faster with it.
- *Clip higher* (DAPO, section 3.1): a rare token may rise by more than it may fall (0.28 against 0.2), else
  exploration dies: a token at 1 % could only reach 1.2 %.
- *Groups without spread teach nothing* (DAPO, section 3.2) and are skipped, not sampled again: that
  would bias the mix of tasks.
- *KL to the start* (``kl_weight``; estimator k3 of Schulman 2020) is off, as in DAPO: rule rewards
  cannot be flattered, and the policy is meant to move. On, it costs one more forward pass. The value of k3 estimates
  KL(policy || start), but its gradient, taken through the log-probability alone as GRPO does, is that of
  KL(start || policy). ``kl_bias_correction`` multiplies k3 by the ratio, which gives KL(policy || start)'s own
  (DeepSeek-V3.2, arXiv 2512.02556, section 3.1; TRL's ``use_bias_correction_kl``, there the default).

On policy: the answers of a step come from the weights of its beginning. With several minibatches the later ones
are a little off policy; the ratio mends that. Old log-probabilities are those that the engine returned while
sampling. ``mismatch`` (the largest gap, in nats) and ``mismatch_mean`` report how far the trainer is from them on the
first minibatch. In float32 the mean is noise, ~1e-6 (the largest may be a router's near tie); bfloat16 weights or codes
are rounded otherwise by the engine than by the trainer: ~1e-2, and what is trained is not what was sampled. A mean
above ``max_mismatch``, one answer in 50 left out, stops the run before a weight moves. ``importance_cap`` corrects for
the gap where it cannot be avoided: the surrogate's ratio starts from the trainer's own log-probabilities (one more
forward pass), and each token is weighed by ``min(p_trainer / p_sampler, cap)`` (truncated importance sampling,
Ionides 2008, as in verl and TRL).

The router's bias is *not* moved in RL. It decides which experts a token may reach and gets no gradient, so to move
it between steps changes the policy for a reason that is not the reward, and to balance a narrow mix of questions
would spread over all experts what pre-training had settled. It is a frozen part of the policy, as are the
extra depths of multi-token prediction.

Left out: a value model, reward models, asynchronous rollouts, the sequence-level ratio of GSPO.

Dims: G answers in a group, P groups, B rows, T positions, D hidden, V vocabulary, N response tokens.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sprat.config import GRPOConfig, OptimConfig, RLConfig
from sprat.engine import Engine
from sprat.errors import CheckpointError, TrainingError
from sprat.model import Transformer, flops_per_token
from sprat.post.rl.batch import forward_responses, micro_batches
from sprat.post.rl.gate import evaluate_gate
from sprat.post.rl.rewards import Reward, Verifier
from sprat.post.rl.rollout import Rollout, rollout_metrics, sample_groups
from sprat.tasks import Task
from sprat.tokens import Tokenizer
from sprat.train import checkpoint, loop, machine, optim, schedule
from sprat.train.losses import policy_loss, token_logprob
from sprat.trust.run import Run

ANSWERS_PER_OUTLIER = 50  # of as many answers one may be far off by a router's near tie
_ROUNDING_STEPS = 4  # steps of the rewards' own precision that still count as equal


@dataclass
class RLResult:
    """What a run of GRPO did; ``reward`` and ``accuracy`` are those of the last step's rollouts."""

    steps: int = 0
    tokens: int = 0  # sampled
    flops: float = 0.0
    reward: float = 0.0
    accuracy: float = 0.0


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


@dataclass
class _TokenMetrics:
    """Sums over tokens, divided at the end of the step."""

    total: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, loss: ClippedSurrogate, logprob_N: Tensor, entropy_N: Tensor) -> None:
        gap_N = logprob_N - loss.old_N
        self.total["tokens"] += len(gap_N)
        self.total["entropy"] += float(entropy_N.sum())
        self.total["clip_fraction"] += float(loss.clipped(logprob_N).sum())
        self.total["kl"] += float((gap_N.exp() - 1 - gap_N).sum())
        if loss.reference_N is not None:
            log_ratio_ref_N = loss.reference_N - logprob_N
            self.total["kl_reference"] += float((log_ratio_ref_N.exp() - 1 - log_ratio_ref_N).sum())

    def means(self) -> dict[str, float]:
        tokens = max(self.total["tokens"], 1.0)
        return {name: value / tokens for name, value in self.total.items() if name != "tokens"}


@dataclass
class _LogprobMismatch:
    """How far the trainer's log-probabilities lie from those that were sampled with, before a weight moved.

    Where two experts are as good as equal, the last bit of a sum decides which is taken, and all that follows in that
    answer is another computation. That is one answer in thousands and no fault; so the bound is on the mean over the
    answers but the worst of every ``ANSWERS_PER_OUTLIER``.
    """

    largest: float = 0.0
    answers: list[tuple[float, int]] = field(default_factory=list)  # sum of gaps, tokens

    def add(self, trainer_N: Tensor, sampler_N: Tensor, sizes: Sequence[int]) -> None:
        gap_N = (trainer_N - sampler_N).abs()
        self.largest = max(self.largest, float(gap_N.max()))
        self.answers += [(float(part.sum()), len(part)) for part in gap_N.split(list(sizes))]

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


def _mean(answers: Sequence[tuple[float, int]]) -> float:
    """The mean gap of the tokens of ``answers``."""
    return sum(total for total, _ in answers) / max(1, sum(count for _, count in answers))


def _update_policy(
    model: Transformer,
    optimizer: optim.OptimizersContainer,
    rollouts: Sequence[Rollout],
    advantage_B: Tensor,
    config: RLConfig,
    step: int,
    reference: Transformer | None,
) -> dict[str, float]:
    """``epochs`` passes over the rollouts that have an advantage; one optimizer step for each minibatch."""
    token_metrics, norms, mismatch = _TokenMetrics(), list[float](), _LogprobMismatch()
    if config.importance_cap is not None:
        rollouts = _with_importance(model, rollouts, config, mismatch)
        metrics = mismatch.check(config.max_mismatch, step)
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(((config.seed * 100_003 + step) * 101 + epoch) % 2**63)
        shuffled = torch.randperm(len(rollouts), generator=generator)
        for minibatch_index, minibatch in enumerate(shuffled.tensor_split(math.ceil(len(rollouts) / config.minibatch))):
            rows = minibatch.tolist()
            weight = 1 / sum(len(rollouts[row].token_ids) for row in rows)
            for micro in micro_batches(rollouts, rows):
                selected = [rollouts[row] for row in micro]
                tokens = forward_responses(model, selected, advantage_B[micro])
                loss = ClippedSurrogate(tokens.old_N, tokens.advantage_N, weight, config.clip_low, config.clip_high)
                loss.importance_N, loss.kl_ratio = tokens.importance_N, config.kl_bias_correction
                if reference is not None:
                    loss.kl_weight = config.kl_weight
                    loss.reference_N, _ = _logprobs(reference, selected, config)
                head_VD, temperature = model.head.dense_weight(), config.temperature
                total, logprob_N, entropy_N = policy_loss(tokens.x_ND, head_VD, tokens.targets_N, loss, temperature)
                total.backward()
                token_metrics.add(loss, logprob_N, entropy_N)
                if epoch + minibatch_index == 0 and config.importance_cap is None:
                    mismatch.add(logprob_N, tokens.old_N, [len(answer.token_ids) for answer in selected])
            if not norms and config.importance_cap is None:
                metrics = mismatch.check(config.max_mismatch, step)
            norms.append(_step(optimizer, config, step))
    return {**token_metrics.means(), **metrics, "grad_norm": sum(norms) / len(norms)}


def _with_importance(
    model: Transformer, rollouts: Sequence[Rollout], config: RLConfig, mismatch: _LogprobMismatch
) -> list[Rollout]:
    """The rollouts with the trainer's log-probabilities, and with truncated weights for what the sampler's were."""
    with_importance = list(rollouts)
    for micro in micro_batches(rollouts, range(len(rollouts))):
        selected = [rollouts[row] for row in micro]
        trainer_N, sampler_N = _logprobs(model, selected, config)
        sizes = [len(rollout.token_ids) for rollout in selected]
        mismatch.add(trainer_N, sampler_N, sizes)
        importance_N = (trainer_N - sampler_N).exp().clamp(max=config.importance_cap)
        parts = zip(micro, trainer_N.split(sizes), importance_N.split(sizes), strict=True)
        for row, logprob_N, weight_N in parts:
            with_importance[row] = replace(rollouts[row], logprobs=logprob_N.tolist(), importance=weight_N.tolist())
    return with_importance


@torch.no_grad()
def _logprobs(model: Transformer, rollouts: Sequence[Rollout], config: RLConfig) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response tokens under ``model``, and those of the rollouts; no gradient."""
    tokens = forward_responses(model, rollouts, torch.zeros(len(rollouts)))
    logprob_N, _ = token_logprob(tokens.x_ND, model.head.dense_weight(), tokens.targets_N, config.temperature)
    return logprob_N, tokens.old_N


def _step(optimizer: optim.OptimizersContainer, config: RLConfig, step: int) -> float:
    """Clip the gradient, move the weights, forget the gradient; returns the norm before clipping."""
    norm = optimizer.clip_grad_norm(config.grad_clip)
    if not math.isfinite(norm):
        todo = "lower rl.lr and go on from the run's last checkpoint: --init-from RUN"
        raise TrainingError(f"the gradient is not finite in RL step {step}", where="rl", todo=todo)
    optimizer.step(lr_factor=schedule.lr_factor(_optim_config(config), step - 1, config.steps))
    optimizer.zero_grad()
    return norm


def grpo(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    weights: Sequence[float],
    config: RLConfig,
    run: Run,
    *,
    reward: Reward | None = None,
    gate: bool = True,
) -> RLResult:
    """Train ``model`` in place by GRPO; resumes exactly from the run's checkpoints, also after kill -9.

    Args:
        weights: share of each task among the questions.
        reward: pays instead of the tasks' judges (see ``rewards.load_reward``); accuracy is measured anyway, and the
            gate asks it too. It may abstain by None, and a fault of its own abstains for it.
        gate: run ``evaluate_gate`` first (a fresh start only).

    Raises:
        TrainingError: the model is quantised, the policy is not ready for RL, the sampler's log-probabilities are not
            the trainer's, ``reward`` fails on every answer of a step, or the gradient is not finite.
    """
    optim.check_trainable(model, run)
    machine.tune_allocator()
    reference = copy.deepcopy(model).eval().requires_grad_(False) if config.kl_weight > 0 else None
    optimizer = optim.build(model, _optim_config(config))
    result = _resume(model, optimizer, config, run)
    engine = Engine(model, tokenizer, max_batch=config.prompts_per_step * config.group_size)
    if reward is not None and not isinstance(reward, Verifier):
        reward = Verifier(reward, timeout_seconds=config.reward_timeout)
    if gate and result.steps == 0:
        evaluate_gate(engine, tasks, weights, config, reward).raise_if_failed()
    with loop.progress_bar(run, config.steps, result.steps) as advance, loop.deferred_interrupt() as interrupted:
        for step in range(result.steps + 1, config.steps + 1):
            rollouts = sample_groups(engine, tasks, weights, config, step, reward)
            faults = {} if reward is None else {"reward_faults": reward.pop_faults()}
            run.log(step, **_train_step(model, optimizer, rollouts, config, step, reference, result), **faults)
            extra = {"config": config.digest(), "result": vars(result)}
            if step == schedule.stable_steps(_optim_config(config), config.steps):
                checkpoint.save(run.checkpoints / checkpoint.STABLE, step, model, optimizer, extra)
            if (stop := interrupted()) or step % config.checkpoint_every == 0 or step == config.steps:
                checkpoint.save(run.checkpoints, step, model, optimizer, extra)
            if stop:
                raise KeyboardInterrupt
            advance(step, f"reward {result.reward:.3f}")
        if interrupted():  # it came while the last checkpoint was written
            raise KeyboardInterrupt
    return result


def _optim_config(config: GRPOConfig) -> OptimConfig:
    """One rate for all weights, without a warm-up."""
    lr, decay_fraction = config.lr, config.decay_fraction
    return OptimConfig(name=config.optim, muon_lr=lr, adam_lr=lr, warmup_steps=0, decay_fraction=decay_fraction)


def check_start(start: checkpoint.Checkpoint, model: Transformer, config: GRPOConfig) -> None:
    """Refuse a checkpoint from which ``grpo`` could not start, before anything is set aside for it.

    Raises:
        CheckpointError: it is not before the last step, or of another model or optimizer.
    """
    loop.check_start_step(start, config.steps)
    checkpoint.check_compatible(start, model, optim.build(model, _optim_config(config)))


def _train_step(
    model: Transformer,
    optimizer: optim.OptimizersContainer,
    rollouts: list[Rollout],
    config: RLConfig,
    step: int,
    reference: Transformer | None,
    result: RLResult,
) -> dict[str, float]:
    """Turn the rewards of one step into advantages and learn from the groups with spread; returns the metrics."""
    reward_PG = reward_tensor(rollouts, config.group_size)
    advantage_PG = advantages(reward_PG, config.normalize_std)
    has_spread_P = advantage_PG.any(1)
    rows = (has_spread_P.unsqueeze(1) & ~reward_PG.isnan()).flatten().nonzero().flatten().tolist()
    selected = [rollouts[row] for row in rows]
    metrics = {**rollout_metrics(rollouts), "live_groups": float(has_spread_P.float().mean())}
    if selected:
        metrics |= _update_policy(model, optimizer, selected, advantage_PG.flatten()[rows], config, step, reference)
    _add_costs(result, model, rollouts, selected, config, step)
    return metrics


def _resume(model: Transformer, optimizer: optim.OptimizersContainer, config: RLConfig, run: Run) -> RLResult:
    """Take over the last whole checkpoint of the run, else that of ``init_from``; what was done so far, or nothing."""
    own_checkpoint = checkpoint.latest(run.checkpoints)
    start = own_checkpoint or loop.load_start(config.init_from, config.steps, run)
    if start is None:
        run.truncate_metrics(0)
        return RLResult()
    if own_checkpoint and start.extra.get("config") != config.digest():
        todo = "remove the checkpoints or go back to that recipe"
        raise CheckpointError("the checkpoint was made with another recipe", where=str(start.folder), todo=todo)
    checkpoint.restore(start, model, optimizer)
    run.truncate_metrics(start.step)
    return RLResult(**start.extra["result"]) if own_checkpoint else RLResult(steps=start.step)


def _add_costs(
    result: RLResult, model: Transformer, rollouts: list[Rollout], trained: list[Rollout], config: RLConfig, step: int
) -> None:
    """Add one step's sampled tokens and FLOPs: a forward pass to sample, three to train, one for the reference."""
    forward = flops_per_token(model.config, sum(rollout.length for rollout in rollouts) // len(rollouts))
    sampled = sum(len(rollout.token_ids) for rollout in rollouts)
    passes = config.epochs * (4 if config.kl_weight > 0 else 3) + (config.importance_cap is not None)
    updated = passes * sum(rollout.length for rollout in trained)
    result.steps = step
    result.tokens += sampled
    result.flops += forward * (sampled + sum(rollout.prefill_tokens for rollout in rollouts) + updated)
    means = rollout_metrics(rollouts)
    result.reward, result.accuracy = means["reward"], means["accuracy"]

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
- *No division by the spread* (Dr. GRPO). Dividing makes questions that are almost always or almost never
  solved weigh most. ``normalise_std = false`` turns it off; tiny groups learn faster with it.
- *Clip higher* (DAPO, section 3.1): a rare token may rise by more than it may fall (0.28 against 0.2), else
  exploration dies: a token at 1 % could only reach 1.2 %.
- *Groups without spread teach nothing* (DAPO, section 3.2) and are skipped, not sampled again: that
  would bias the mix of tasks.
- *KL to the start* (``kl_weight``; estimator k3 of Schulman 2020) is off, as in DAPO: rule rewards
  cannot be flattered, and the policy is meant to move. On, it costs one more forward pass.

On policy: the answers of a step come from the weights of its beginning. With several minibatches the later ones
are a little off policy; the ratio mends that. Old log-probabilities are those that the engine returned while
sampling; ``mismatch`` reports how far the trainer is from them on the first minibatch (float noise, ~1e-5; anything
larger is a bug that elsewhere is papered over with importance weights).

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
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sprat.config import OptimConfig, RLConfig
from sprat.engine import Engine
from sprat.errors import CheckpointError, TrainingError
from sprat.model import Transformer, flops_per_token
from sprat.post.batch import gather, micro_batches
from sprat.post.logprob import policy_loss, token_logprob
from sprat.post.readiness import readiness
from sprat.post.rewards import Reward
from sprat.post.rollout import Rollout, sample_groups, summary
from sprat.tasks import Task
from sprat.tokens import Tokenizer
from sprat.train import checkpoint, loop, machine, optim, trainable
from sprat.train.progress import bar
from sprat.trust.run import Run

_NO_SPREAD = 1e-6


@dataclass
class RLResult:
    """What a run of GRPO did; ``reward`` and ``accuracy`` are those of the last step's rollouts."""

    steps: int = 0
    tokens: int = 0  # sampled
    flops: float = 0.0
    reward: float = 0.0
    accuracy: float = 0.0


def advantages(reward_PG: Tensor, normalise_std: bool) -> Tensor:
    """Group-relative advantages [P, G] of rewards [P, G]; groups without spread get exactly 0.

    >>> advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]), True).tolist()
    [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    centred_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    std_P1 = centred_PG.square().mean(1, keepdim=True).sqrt()
    scale_P1 = 1 / std_P1.clamp(min=_NO_SPREAD) if normalise_std else torch.ones_like(std_P1)
    return torch.where(std_P1 > _NO_SPREAD, centred_PG * scale_P1, 0.0)


@dataclass
class Clipped:
    """The clipped surrogate with optional KL, elementwise in the new log-probability (see ``policy_loss``).

    Args:
        old_N: log-probabilities under the policy that sampled.
        advantage_N: of each token's answer.
        weight: of one token, one over the tokens of the minibatch.
        reference_N: log-probabilities under the frozen start, or None.
    """

    old_N: Tensor
    advantage_N: Tensor
    weight: float
    low: float
    high: float
    reference_N: Tensor | None = None
    kl_weight: float = 0.0

    def __call__(self, logprob_C: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Loss of each token of a chunk and its derivative by the log-probability."""
        advantage_C = self.advantage_N[rows]
        ratio_C = (logprob_C - self.old_N[rows]).exp()
        clipped_C = ratio_C.clamp(1 - self.low, 1 + self.high)
        free_C = ratio_C * advantage_C <= clipped_C * advantage_C  # the minimum is the unclipped branch
        loss_C = -torch.where(free_C, ratio_C, clipped_C) * advantage_C
        slope_C = torch.where(free_C, -ratio_C * advantage_C, 0.0)
        if self.reference_N is not None:
            back_C = self.reference_N[rows] - logprob_C
            loss_C = loss_C + self.kl_weight * (back_C.exp() - 1 - back_C)
            slope_C = slope_C + self.kl_weight * (1 - back_C.exp())
        return loss_C * self.weight, slope_C * self.weight

    def clipped(self, logprob_N: Tensor) -> Tensor:
        """Bool [N]: tokens that the clip has taken out of the gradient."""
        ratio_N = (logprob_N - self.old_N).exp()
        high_N = (self.advantage_N > 0) & (ratio_N > 1 + self.high)
        return high_N | ((self.advantage_N < 0) & (ratio_N < 1 - self.low))


@dataclass
class _Sums:
    """Sums over tokens, divided at the end of the step."""

    total: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, loss: Clipped, logprob_N: Tensor, entropy_N: Tensor, first: bool) -> None:
        gap_N = logprob_N - loss.old_N
        self.total["tokens"] += len(gap_N)
        self.total["entropy"] += float(entropy_N.sum())
        self.total["clip_fraction"] += float(loss.clipped(logprob_N).sum())
        self.total["kl"] += float((gap_N.exp() - 1 - gap_N).sum())
        if loss.reference_N is not None:
            back_N = loss.reference_N - logprob_N
            self.total["kl_reference"] += float((back_N.exp() - 1 - back_N).sum())
        if first:
            self.total["mismatch"] = max(self.total["mismatch"], float(gap_N.abs().max()))

    def means(self) -> dict[str, float]:
        tokens = max(self.total["tokens"], 1.0)
        kept = {name: value for name, value in self.total.items() if name not in ("tokens", "mismatch")}
        return {**{name: value / tokens for name, value in kept.items()}, "mismatch": self.total["mismatch"]}


def _optimise(
    model: Transformer,
    optimiser: optim.Optimiser,
    rollouts: Sequence[Rollout],
    advantage_B: Tensor,
    config: RLConfig,
    step: int,
    reference: Transformer | None,
) -> dict[str, float]:
    """``epochs`` passes over the rollouts that have an advantage; one optimiser step for each minibatch."""
    sums, norms = _Sums(), []
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed((config.seed * 100_003 + step) * 101 + epoch)
        shuffled = torch.randperm(len(rollouts), generator=generator)
        for number, part in enumerate(shuffled.tensor_split(math.ceil(len(rollouts) / config.minibatch))):
            rows = part.tolist()
            weight = 1 / sum(len(rollouts[row].token_ids) for row in rows)
            for micro in micro_batches(rollouts, rows):
                chosen = [rollouts[row] for row in micro]
                tokens = gather(model, chosen, advantage_B[micro])
                loss = Clipped(tokens.old_N, tokens.advantage_N, weight, config.clip_low, config.clip_high)
                if reference is not None:
                    loss.kl_weight, loss.reference_N = config.kl_weight, _reference(reference, chosen, config)
                head_VD, heat = model.head.dense_weight(), config.temperature
                total, logprob_N, entropy_N = policy_loss(tokens.x_ND, head_VD, tokens.targets_N, loss, heat)
                total.backward()
                sums.add(loss, logprob_N, entropy_N, first=epoch + number == 0)
            norms.append(_step(optimiser, config, step))
    return {**sums.means(), "grad_norm": sum(norms) / len(norms)}


def _reference(reference: Transformer, rollouts: Sequence[Rollout], config: RLConfig) -> Tensor:
    """Log-probabilities of the response tokens under the frozen start."""
    with torch.no_grad():
        tokens = gather(reference, rollouts, torch.zeros(len(rollouts)))
        return token_logprob(tokens.x_ND, reference.head.dense_weight(), tokens.targets_N, config.temperature)[0]


def _step(optimiser: optim.Optimiser, config: RLConfig, step: int) -> float:
    """Clip the gradient, move the weights, forget the gradient; returns the norm before clipping."""
    norm = optimiser.clip(config.grad_clip)
    if not math.isfinite(norm):
        todo = "lower rl.lr and go on from the run's last checkpoint: --init-from RUN"
        raise TrainingError(f"the gradient is not finite in RL step {step}", where="rl", todo=todo)
    optimiser.step()
    optimiser.zero_grad()
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
        reward: pays instead of the tasks' judges (see ``rewards.load_reward``); accuracy is measured anyway.
        gate: check ``readiness`` first (a fresh start only).

    Raises:
        TrainingError: the model is quantised, the policy is not ready for RL, or the gradient is not finite.
    """
    trainable.check(model, run)
    machine.tune()
    reference = copy.deepcopy(model).eval().requires_grad_(False) if config.kl_weight > 0 else None
    settings = OptimConfig(name=config.optim, muon_lr=config.lr, adam_lr=config.lr, schedule="constant", warmup_steps=0)
    optimiser = optim.build(model, settings)
    result = _resume(model, optimiser, config, run)
    engine = Engine(model, tokenizer, max_batch=config.prompts_per_step * config.group_size)
    if gate and result.steps == 0:
        readiness(engine, tasks, weights, config).check()
    with bar(run, config.steps, result.steps) as advance, loop.held_interrupt() as interrupted:
        for step in range(result.steps + 1, config.steps + 1):
            rollouts = sample_groups(engine, tasks, weights, config, step, reward)
            run.log(step, **_learn(model, optimiser, rollouts, config, step, reference, result))
            if (stop := interrupted()) or step % config.checkpoint_every == 0 or step == config.steps:
                extra = {"config": config.digest(), "result": vars(result)}
                checkpoint.save(run.checkpoints, step, model, optimiser, extra)
            if stop:
                raise KeyboardInterrupt
            advance(step, f"reward {result.reward:.3f}")
    return result


def _learn(
    model: Transformer,
    optimiser: optim.Optimiser,
    rollouts: list[Rollout],
    config: RLConfig,
    step: int,
    reference: Transformer | None,
    result: RLResult,
) -> dict[str, float]:
    """Turn the rewards of one step into advantages and learn from the groups with spread; returns the metrics."""
    reward_PG = torch.tensor([rollout.reward for rollout in rollouts]).view(-1, config.group_size)
    advantage_PG = advantages(reward_PG, config.normalise_std)
    live_P = advantage_PG.any(1)
    kept = live_P.repeat_interleave(config.group_size).nonzero().flatten().tolist()
    chosen = [rollouts[row] for row in kept]
    metrics = {**summary(rollouts), "live_groups": float(live_P.float().mean())}
    if chosen:
        metrics |= _optimise(model, optimiser, chosen, advantage_PG.flatten()[kept], config, step, reference)
    _account(result, model, rollouts, chosen, config, step)
    return metrics


def _resume(model: Transformer, optimiser: optim.Optimiser, config: RLConfig, run: Run) -> RLResult:
    """Take over the last whole checkpoint of the run, else that of ``init_from``; what was done so far, or nothing."""
    own = checkpoint.latest(run.checkpoints)
    found = own or loop.begin_from(config.init_from, config.steps, run)
    if found is None:
        run.rewind(0)
        return RLResult()
    if own and found.extra.get("config") != config.digest():
        todo = "remove the checkpoints or go back to that recipe"
        raise CheckpointError("the checkpoint was made with another recipe", where=str(found.folder), todo=todo)
    checkpoint.restore(found, model, optimiser)
    run.rewind(found.step)
    return RLResult(**found.extra["result"]) if own else RLResult(steps=found.step)


def _account(
    result: RLResult, model: Transformer, rollouts: list[Rollout], trained: list[Rollout], config: RLConfig, step: int
) -> None:
    """Add one step's sampled tokens and FLOPs: a forward pass to sample, three to train, one for the reference."""
    forward = flops_per_token(model.config, sum(rollout.length for rollout in rollouts) // len(rollouts))
    sampled = sum(len(rollout.token_ids) for rollout in rollouts)
    passes = config.epochs * (4 if config.kl_weight > 0 else 3)
    updated = passes * sum(rollout.length for rollout in trained)
    result.steps = step
    result.tokens += sampled
    result.flops += forward * (sampled + sum(rollout.prefilled for rollout in rollouts) + updated)
    result.reward = sum(rollout.reward for rollout in rollouts) / len(rollouts)
    result.accuracy = sum(rollout.accuracy for rollout in rollouts) / len(rollouts)

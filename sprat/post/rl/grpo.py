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
from collections.abc import Sequence
from dataclasses import dataclass

from sprat.config import GRPOConfig, RLConfig
from sprat.engine import Engine
from sprat.errors import CheckpointError
from sprat.model import Transformer, flops_per_token
from sprat.post.rl.gate import evaluate_gate
from sprat.post.rl.losses import advantages, reward_tensor
from sprat.post.rl.rewards import Reward, Verifier
from sprat.post.rl.rollout import Rollout, rollout_metrics, sample_groups
from sprat.post.rl.update import optim_config, update_policy
from sprat.tasks import Task
from sprat.tokens import Tokenizer
from sprat.train import checkpoint, loop, machine, optim, schedule
from sprat.trust.run import Run


@dataclass
class RLResult:
    """What a run of GRPO did; ``reward`` and ``accuracy`` are those of the last step's rollouts."""

    steps: int = 0
    tokens: int = 0  # sampled
    flops: float = 0.0
    reward: float = 0.0
    accuracy: float = 0.0


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
    optimizer = optim.build(model, optim_config(config))
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
            if step == schedule.stable_steps(optim_config(config), config.steps):
                checkpoint.save(run.checkpoints / checkpoint.STABLE, step, model, optimizer, extra)
            if (stop := interrupted()) or step % config.checkpoint_every == 0 or step == config.steps:
                checkpoint.save(run.checkpoints, step, model, optimizer, extra)
            if stop:
                raise KeyboardInterrupt
            advance(step, f"reward {result.reward:.3f}")
        if interrupted():  # it came while the last checkpoint was written
            raise KeyboardInterrupt
    return result


def check_start(start: checkpoint.Checkpoint, model: Transformer, config: GRPOConfig) -> None:
    """Refuse a checkpoint from which ``grpo`` could not start, before anything is set aside for it.

    Raises:
        CheckpointError: it is not before the last step, or of another model or optimizer.
    """
    loop.check_start_step(start, config.steps)
    checkpoint.check_compatible(start, model, optim.build(model, optim_config(config)))


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
        metrics |= update_policy(model, optimizer, selected, advantage_PG.flatten()[rows], config, step, reference)
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

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
- *Groups without spread teach nothing* (DAPO, section 3.2) and are skipped. Further ones are sampled in their
  place only where ``dynamic_sampling`` says so, for that shifts the mix of tasks (see the file of that name).
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
from collections.abc import Callable, Sequence

from sprat.config import GRPOConfig, RLConfig
from sprat.config.rl import RLRunConfig
from sprat.engine import Engine
from sprat.model import Transformer, flops_per_token
from sprat.post.rl.gate import evaluate_gate
from sprat.post.rl.losses import advantages, reward_tensor
from sprat.post.rl.problem_mix import StationProblems
from sprat.post.rl.rewards import FAULTS, Reward, Verifier, all_failed
from sprat.post.rl.rollout import InProcess, Payer, Rollout, RolloutSource, rollout_metrics
from sprat.post.rl.training_state import Monitor, resume, roll_back
from sprat.post.rl.training_state import RLResult as RLResult
from sprat.post.rl.update import optim_config, update_policy
from sprat.tasks import Task
from sprat.tokens import Tokenizer
from sprat.train import checkpoint, loop, machine, optim, schedule
from sprat.trust.run import Run


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
    if reward is not None and not isinstance(reward, Verifier):
        reward = Verifier(reward, timeout_seconds=config.reward_timeout)
    engine = Engine(model, tokenizer, max_batch=config.prompts_per_step * config.group_size)
    settings = RLRunConfig.from_station(config)
    problems, payer = StationProblems(tasks, weights, config), Payer(tokenizer, settings, reward)
    source = InProcess(engine, problems, settings, payer)

    def check_gate() -> None:
        if gate:
            evaluate_gate(engine, tasks, weights, config, reward).raise_if_failed()

    name = reward.name if isinstance(reward, Verifier) else ""
    return train(model, source, config, run, before_start=check_gate, reward_name=name)


def train(
    model: Transformer,
    source: RolloutSource,
    config: RLConfig,
    run: Run,
    *,
    before_start: Callable[[], None] = lambda: None,
    reward_name: str = "",
    monitor: Monitor | None = None,
) -> RLResult:
    """Train ``model`` in place on what ``source`` samples; see ``grpo``.

    Args:
        before_start: is called before the first step of all, and may refuse it.
        reward_name: of the user's verifier, whose faults are counted; empty without one.
        monitor: measures and watches the run, and may send it back or end it.

    Raises:
        TrainingError: see ``grpo``; or a trip wire of the monitor's ends the run.
    """
    machine.tune_allocator()
    reference = copy.deepcopy(model).eval().requires_grad_(False) if config.kl_weight > 0 else None
    state = resume(model, config, run)
    result = state.result
    source.publish(result.steps, model, state.rollbacks)
    if result.steps == 0:
        before_start()
    if monitor is not None:
        monitor.start(result.steps, model, state.watched)
        if result.steps == 0 and monitor.can_roll_back:
            state.save(run.checkpoints, 0)
    with loop.progress_bar(run, config.steps, result.steps) as advance, loop.deferred_interrupt() as interrupted:
        while result.steps < config.steps and not (monitor is not None and monitor.has_ended(result.steps)):
            step = result.steps + 1
            rollouts = source.groups(step)
            state.note_groups(step, rollouts)
            faults = check_faults(rollouts, reward_name)
            row = train_step(model, state.optimizer, rollouts, state.config, step, reference, result)
            source.publish(step, model, state.rollbacks)
            extra = faults if monitor is None else monitor.measure(step, rollouts, result)
            state.watched = {} if monitor is None else monitor.state()
            run.log(step, **row, **extra)
            trip = None if monitor is None else monitor.check({"step": step, **row, **extra})
            if trip is not None and not trip.is_end:
                assert monitor is not None
                state = roll_back(state, monitor, trip, run, source)
                continue
            if step == schedule.stable_steps(optim_config(config), config.steps):
                state.save(run.checkpoints / checkpoint.STABLE, step)
            is_last = step == config.steps or trip is not None
            if (stop := interrupted()) or step % config.checkpoint_every == 0 or is_last:
                state.save(run.checkpoints, step)
            if stop:
                raise KeyboardInterrupt
            advance(step, f"reward {result.reward:.3f}")
        if interrupted():  # it came while the last checkpoint was written
            raise KeyboardInterrupt
    return result


def check_faults(rollouts: Sequence[Rollout], reward_name: str) -> dict[str, int]:
    """How many answers of a step the verifier failed on, by the name that the log has for it; empty without a verifier.

    Raises:
        TrainingError: it failed on all of them.
    """
    faults = [rollout for rollout in rollouts if rollout.outcome in FAULTS]
    if rollouts and len(faults) == len(rollouts):
        raise all_failed(reward_name, len(faults), faults[-1].detail)
    return {"reward_faults": len(faults)} if reward_name else {}


def check_start(start: checkpoint.Checkpoint, model: Transformer, config: GRPOConfig) -> None:
    """Refuse a checkpoint from which ``grpo`` could not start, before anything is set aside for it.

    Raises:
        CheckpointError: it is not before the last step, or of another model or optimizer.
    """
    loop.check_start_step(start, config.steps)
    checkpoint.check_compatible(start, model, optim.build(model, optim_config(config)))


def train_step(
    model: Transformer,
    optimizer: optim.OptimizersContainer,
    rollouts: list[Rollout],
    config: RLConfig,
    step: int,
    reference: Transformer | None,
    result: RLResult,
) -> dict[str, float]:
    """Turn the rewards of one step into advantages and learn from the groups with spread; returns the metrics."""
    settings = config if isinstance(config, RLRunConfig) else RLRunConfig.from_station(config)
    reward_PG = reward_tensor([rollout.reward for rollout in rollouts], config.group_size)
    sample_std, epsilon = settings.sample_std, settings.std_epsilon
    advantage_PG = advantages(reward_PG, config.normalize_std, sample_std=sample_std, std_epsilon=epsilon)
    has_spread_P = advantage_PG.any(1)
    rows = (has_spread_P.unsqueeze(1) & ~reward_PG.isnan()).flatten().nonzero().flatten().tolist()
    selected = [rollouts[row] for row in rows]
    metrics = {**_means(rollouts, config), "live_groups": float(has_spread_P.float().mean())}
    if settings.dynamic_sampling:
        metrics["sampled_groups"] = float(len(has_spread_P))
    if selected:
        advantage_B = advantage_PG.flatten()[rows]
        own = isinstance(config, RLRunConfig)  # the station's log keeps its columns
        count = settings.prompts_per_step * settings.group_size if settings.dynamic_sampling else len(rollouts)
        metrics |= update_policy(model, optimizer, selected, advantage_B, settings, step, reference, count, own)
    _add_costs(result, model, rollouts, selected, config, step)
    return metrics


def _means(rollouts: Sequence[Rollout], config: RLConfig) -> dict[str, float]:
    """The station measures accuracy by the tasks' own judges, whatever its reward says; a user's run by its reward."""
    return rollout_metrics(rollouts, of_judged=isinstance(config, RLRunConfig))


def _add_costs(
    result: RLResult, model: Transformer, rollouts: list[Rollout], trained: list[Rollout], config: RLConfig, step: int
) -> None:
    """Add one step's sampled tokens and FLOPs: a forward pass to sample, three to train, one for the reference."""
    forward = flops_per_token(model.config, sum(rollout.length for rollout in rollouts) // len(rollouts))
    sampled = sum(rollout.num_sampled for rollout in rollouts)
    passes = config.epochs * (4 if config.kl_weight > 0 else 3) + (config.importance_cap is not None)
    updated = passes * sum(rollout.length for rollout in trained)
    result.steps = step
    result.tokens += sampled
    result.flops += forward * (sampled + sum(rollout.prefill_tokens for rollout in rollouts) + updated)
    means = _means(rollouts, config)
    result.reward, result.accuracy = means["reward"], means["accuracy"]

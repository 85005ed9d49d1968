"""Rollouts: groups of sampled answers to the same question, read and paid.

The engine samples from the very model that is trained, so its log-probabilities are those of the policy
and need not be computed again (decision: one model definition; a test holds the parity). Everything here
is a pure function of (weights, seed, step): a run that was killed samples the same answers again.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sprat.config import RLConfig
from sprat.engine import Engine, Output, Sampling
from sprat.eval.tasks import problem_messages
from sprat.post.rl.rewards import Response, Reward, accuracy_reward, format_reward, parse_response
from sprat.post.sft import sample_problems
from sprat.tasks import Problem, Task, is_correct
from sprat.tokens import Tokenizer


@dataclass(frozen=True)
class Rollout:
    """One sampled answer: ``token_ids`` follow ``prompt_ids``; ``logprobs`` are the sampling policy's, in nats.

    ``reward`` is None where the verifier abstained; ``score`` is the judge's, from 0 to 1. ``importance`` holds a
    weight for each token where the trainer corrects for its mismatch with the sampler.
    """

    task: str
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    response: Response
    reward: float | None
    score: float
    prefill_tokens: int  # prompt tokens that were computed for this row
    importance: list[float] | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.token_ids)


def sample_groups(
    engine: Engine,
    tasks: Sequence[Task],
    weights: Sequence[float],
    config: RLConfig,
    step: int,
    reward: Reward | None = None,
) -> list[Rollout]:
    """``prompts_per_step`` groups of ``group_size`` answers, group after group.

    Args:
        reward: pays instead of the task's own judge; the format reward is added either way.
    """
    problems = sample_problems(tasks, weights, config.prompts_per_step, f"rl/{config.seed}/{step}")
    sampling = Sampling(
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        seed=random.Random(f"rollout/{config.seed}/{step}").randrange(1 << 31),
        thinking=None,
        logprobs=True,
        n=config.group_size,
    )
    outputs = engine.generate([problem_messages(problem) for _, problem in problems], sampling)
    sampled_problems = [pair for pair in problems for _ in range(config.group_size)]
    pairs = zip(sampled_problems, outputs, strict=True)
    return [_pay_rollout(engine.tokenizer, task, problem, output, config, reward) for (task, problem), output in pairs]


def _pay_rollout(
    tokenizer: Tokenizer, task: Task, problem: Problem, output: Output, config: RLConfig, reward: Reward | None
) -> Rollout:
    """Read one answer and pay it: judge (or plug-in) plus ``format_weight`` for the form."""
    response = parse_response(tokenizer, output.token_ids, thinking=None, finished=output.finish_reason == "stop")
    score = accuracy_reward(task)(problem, response)
    task_reward = score if reward is None else reward(problem, response)
    return Rollout(
        task=task.name,
        prompt_ids=output.prompt_ids,
        token_ids=output.token_ids,
        logprobs=output.logprobs or [],
        response=response,
        reward=None if task_reward is None else task_reward + config.format_weight * format_reward(problem, response),
        score=score,
        prefill_tokens=output.usage.cache_miss_tokens,
    )


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over answers: reward, accuracy (also of each task), format, response length, think share.

    The reward is that of the answers that were paid (0 if none was), ``abstained`` the share of the others.
    """
    by_task: dict[str, list[bool]] = defaultdict(list)
    for rollout in rollouts:
        by_task[rollout.task].append(is_correct(rollout.score))
    count = len(rollouts)
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    return {
        "reward": sum(rewards) / max(len(rewards), 1),
        "abstained": 1 - len(rewards) / count,
        "accuracy": sum(is_correct(rollout.score) for rollout in rollouts) / count,
        "format": sum(rollout.response.well_formed for rollout in rollouts) / count,
        "response_length": sum(len(rollout.token_ids) for rollout in rollouts) / count,
        "think_share": sum(bool(rollout.response.reasoning.strip()) for rollout in rollouts) / count,
        **{f"accuracy/{task}": sum(flags) / len(flags) for task, flags in sorted(by_task.items())},
    }

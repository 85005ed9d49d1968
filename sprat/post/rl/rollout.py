"""Rollouts: groups of sampled answers to the same question, read and paid.

The engine samples from the very model that is trained, so its log-probabilities are those of the policy
and need not be computed again (decision: one model definition; a test holds the parity). Everything here
is a pure function of (weights, seed, group): a run that was killed samples the same answers again.

Groups are numbered over the whole run, in order of dispatch: with P = ``prompts_per_step``, step s trains exactly the
groups (s - 1) P to s P - 1, in that order, whoever samples them (``RolloutSource``).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from sprat.config import RLConfig
from sprat.config.rl import RLRunConfig
from sprat.engine import Engine, Output, Sampling
from sprat.eval.tasks import problem_messages
from sprat.model import Transformer
from sprat.post.rl.rewards import Response, Reward, accuracy_reward, format_reward, parse_response
from sprat.post.sft import sample_problems
from sprat.tasks import Problem, Task, is_correct
from sprat.tokens import Tokenizer


@dataclass(frozen=True)
class Rollout:
    """One sampled answer: ``token_ids`` follow ``prompt_ids``; ``logprobs`` are the sampling policy's, in nats.

    ``reward`` is None where the verifier abstained; ``score`` is the judge's, from 0 to 1. ``importance`` holds a
    weight for each token where the trainer corrects for its mismatch with the sampler.

    Attributes:
        group: number of its group in the whole run, in order of dispatch.
        sample: its place in the group.
        problem_id: what the question is known by in its task.
        versions: of the weights that sampled each token of the response; s is after step s, 0 the start.
        routes: experts that each place of prompt and response took, uint8 or int16 [positions, MoE layers, top_k]; None
            of dense models, and where nobody asked.
        finish: why the answer ended, as the engine says it.
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
    group: int = 0
    sample: int = 0
    problem_id: str = ""
    versions: list[int] = field(default_factory=list)
    routes: Tensor | None = None
    finish: str = "stop"

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.token_ids)


class RolloutSource(Protocol):
    """Where the trainer's answers come from: sampled in this process (``InProcess``), or by others."""

    def groups(self, step: int) -> list[Rollout]:
        """The paid answers of the groups of ``step`` (from 1), group after group, in order of dispatch."""
        ...

    def publish(self, version: int, model: Transformer) -> None:
        """Take over the weights after step ``version`` (0: the start), before anything is asked and after each step."""
        ...

    def close(self) -> None:
        """End whatever was started for it."""
        ...


class InProcess:
    """Samples with an engine on the very model that is trained.

    Args:
        weights: share of each task among the questions.
        reward: pays instead of the tasks' own judges; the format reward is added either way.
    """

    def __init__(
        self,
        engine: Engine,
        tasks: Sequence[Task],
        weights: Sequence[float],
        config: RLRunConfig,
        reward: Reward | None = None,
    ) -> None:
        self._engine, self._tasks, self._weights = engine, tasks, weights
        self._config, self._reward, self._version = config, reward, 0

    def groups(self, step: int) -> list[Rollout]:
        """See ``RolloutSource``."""
        return sample_groups(
            self._engine, self._tasks, self._weights, self._config, step, self._reward, version=self._version
        )

    def publish(self, version: int, model: Transformer) -> None:
        """See ``RolloutSource``: the engine computes with these very weights."""
        self._version = version

    def close(self) -> None:
        """Nothing was started."""


def sample_groups(
    engine: Engine,
    tasks: Sequence[Task],
    weights: Sequence[float],
    config: RLConfig,
    step: int,
    reward: Reward | None = None,
    *,
    version: int = 0,
) -> list[Rollout]:
    """``prompts_per_step`` groups of ``group_size`` answers, group after group.

    Args:
        reward: pays instead of the task's own judge; the format reward is added either way.
        version: of the engine's weights.
    """
    first, by_group = (step - 1) * config.prompts_per_step, getattr(config, "seeding", "step") == "group"
    groups = range(first, first + config.prompts_per_step)
    if by_group:
        problems = [sample_problems(tasks, weights, 1, f"rl/{config.seed}/group/{group}")[0] for group in groups]
        settings = [_sampling(config, f"rollout/{config.seed}/group/{group}") for group in groups]
    else:
        problems = sample_problems(tasks, weights, config.prompts_per_step, f"rl/{config.seed}/{step}")
        settings = [_sampling(config, f"rollout/{config.seed}/{step}")] * len(problems)
    outputs = engine.generate([problem_messages(problem) for _, problem in problems], settings)
    size, rollouts = config.group_size, list[Rollout]()
    for place, output in enumerate(outputs):
        task, problem = problems[place // size]
        group, sample = first + place // size, place % size
        rollout = _pay_rollout(engine.tokenizer, task, problem, output, config, reward)
        versions = [version] * len(output.token_ids)
        rollouts.append(replace(rollout, group=group, sample=sample, versions=versions))
    return rollouts


def _sampling(config: RLConfig, key: str) -> Sampling:
    """How the answers of a group are drawn, with the noise of ``key``."""
    return Sampling(
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        seed=random.Random(key).randrange(1 << 31),
        thinking=None,
        logprobs=True,
        n=config.group_size,
    )


def problem_id(problem: Problem) -> str:
    """What ``problem`` is known by in its task: the id that its row has, else its number."""
    return str(problem.meta.get("id", problem.index))


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
        problem_id=problem_id(problem),
        finish=str(output.finish_reason),
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

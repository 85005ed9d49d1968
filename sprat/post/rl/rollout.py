# size: a rollout, who samples it, who pays it and what is measured of it are one contract
"""Rollouts: groups of sampled answers to the same question, read and paid.

The engine samples from the very model that is trained, so its log-probabilities are those of the policy
and need not be computed again (decision: one model definition; a test holds the parity). Everything here
is a pure function of (weights, seed, group): a run that was killed samples the same answers again.

Groups are numbered over the whole run, in order of dispatch: with P = ``prompts_per_step``, step s trains exactly the
groups (s - 1) P to s P - 1, in that order, whoever samples them (``RolloutSource``); with dynamic sampling, those that
follow on the step before until P of them have spread.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from sprat.config.rl import RLRunConfig
from sprat.engine import Engine, Output, Sampling
from sprat.eval.tasks import problem_messages
from sprat.model import Transformer
from sprat.post.rl.dynamic_sampling import sample_step
from sprat.post.rl.losses import overlong_penalty
from sprat.post.rl.problem_mix import ProblemSource
from sprat.post.rl.rewards import (
    BatchReward,
    Outcome,
    Response,
    Verdict,
    accuracy_reward,
    format_reward,
    parse_response,
    verdict_of,
)
from sprat.tasks import Problem, Task, is_correct
from sprat.tokens import Tokenizer


@dataclass(frozen=True)
class Rollout:
    """One sampled answer: ``token_ids`` follow ``prompt_ids``; ``logprobs`` are the sampling policy's, in nats.

    ``reward`` is None where the verifier abstained; ``score`` is the judge's, from 0 to 1. ``importance`` holds a
    weight for each token where the trainer corrects for its mismatch with the sampler; ``logprobs`` are the trainer's
    then, and ``sampled_logprobs`` the sampler's.

    Attributes:
        group: number of its group in the whole run, in order of dispatch.
        sample: its place in the group.
        problem_id: what the question is known by in its task.
        versions: of the weights that sampled each token of the response; s is after step s, 0 the start.
        routes: experts that each place of prompt and response took, uint8 or int16 [positions, MoE layers, top_k]; None
            of dense models, and where nobody asked.
        finish: why the answer ended, as the engine says it.
        outcome, detail: what became of it at the verifier, and of a fault what was said.
        second: what the hidden second judge says; None where there is none, or it abstained.
        trained: of an episode of several turns, where in ``token_ids`` the tokens lie that the model sampled: first
            place and count of each turn. The others are an environment's: they are context, have a log-probability of
            0, and no part in any loss. None: all are the model's.
        tool_calls, tool_errors, environment_seed: of an episode: calls, those that failed, and the seed it began with.
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
    sampled_logprobs: list[float] | None = None
    group: int = 0
    sample: int = 0
    problem_id: str = ""
    versions: list[int] = field(default_factory=list)
    routes: Tensor | None = None
    finish: str = "stop"
    outcome: Outcome = "paid"
    detail: str = ""
    second: float | None = None
    trained: list[tuple[int, int]] | None = None
    tool_calls: int = 0
    tool_errors: int = 0
    environment_seed: int = 0

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def trained_places(self) -> list[int]:
        """The places in ``token_ids`` of the tokens that the model sampled."""
        spans = [(0, len(self.token_ids))] if self.trained is None else self.trained
        return [place for first, count in spans for place in range(first, first + count)]

    @property
    def num_sampled(self) -> int:
        """Tokens that the model sampled."""
        return len(self.token_ids) if self.trained is None else sum(count for _, count in self.trained)

    def spread(self, values: Sequence[float]) -> list[float]:
        """One value for each of ``token_ids``, of one for each that the model sampled; 0 for the others."""
        if self.trained is None:
            return list(values)
        spread = [0.0] * len(self.token_ids)
        for place, value in zip(self.trained_places, values, strict=True):
            spread[place] = value
        return spread


class RolloutSource(Protocol):
    """Where the trainer's answers come from: sampled in this process (``InProcess``), or by others."""

    def groups(self, step: int, first: int | None = None) -> list[Rollout]:
        """The paid answers of the groups of ``step`` (from 1), group after group, in order of dispatch.

        ``first``: number of its first group, for whoever does not know where the step before ended.
        """
        ...

    def publish(self, version: int, model: Transformer, rollbacks: int = 0) -> None:
        """Take over the weights after step ``version`` (0: the start), before anything is asked and after each step.

        ``rollbacks``: how often the run was sent back by now; after the last time ``version`` is where it was sent.
        """
        ...

    def close(self) -> None:
        """End whatever was started for it."""
        ...


class InProcess:
    """Samples with an engine in this process, on the very weights that are trained.

    Args:
        take_over: called with the model that is trained after each step, where the engine computes with a copy of it;
            the engine to go on with, where that is another one.
    """

    def __init__(
        self,
        engine: Engine,
        problems: ProblemSource,
        config: RLRunConfig,
        payer: Payer,
        take_over: Callable[[Transformer], Engine | None] = lambda model: None,
    ) -> None:
        self._engine, self._problems, self._config, self._payer = engine, problems, config, payer
        self._take_over, self._version = take_over, 0

    def groups(self, step: int, first: int | None = None) -> list[Rollout]:
        """See ``RolloutSource``."""
        config = self._config
        sample = partial(sample_groups, self._engine, self._problems, config, payer=self._payer, version=self._version)
        return sample_step(sample, (step - 1) * config.prompts_per_step if first is None else first, config)

    def publish(self, version: int, model: Transformer, rollbacks: int = 0) -> None:
        """See ``RolloutSource``."""
        self._engine = self._take_over(model) or self._engine
        self._version = version

    def close(self) -> None:
        """Nothing was started."""


class Payer:
    """Reads sampled answers and pays them.

    Args:
        reward: pays instead of the tasks' own judges.
        second: a judge that pays nothing and is never shown to the policy; see ``trip_wires``.
        by_reward: an answer's score is what the reward pays, not what the task's own judge says.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: RLRunConfig,
        reward: BatchReward | None = None,
        *,
        second: BatchReward | None = None,
        by_reward: bool = False,
    ) -> None:
        self.tokenizer, self.reward, self.second = tokenizer, reward, second
        self._config, self._by_reward = config, by_reward and reward is not None

    def sample(
        self,
        engine: Engine,
        asked: Sequence[tuple[Task, Problem]],
        settings: Sequence[Sampling],
        *,
        shaped: bool = True,
    ) -> list[Rollout]:
        """The paid answers to ``asked``, ``n`` of each by its own of ``settings``, those of one problem side by side.

        All settings have one ``thinking``. See ``pay``.
        """
        outputs = engine.generate([problem_messages(problem) for _, problem in asked], settings)
        pairs = [pair for pair, own in zip(asked, settings, strict=True) for _ in range(own.n)]
        return self.pay(pairs, outputs, shaped=shaped, thinking=settings[0].thinking if settings else None)

    def pay(
        self,
        asked: Sequence[tuple[Task, Problem]],
        outputs: Sequence[Output],
        *,
        shaped: bool = True,
        thinking: bool | None = None,
    ) -> list[Rollout]:
        """The answers to ``asked``, one of each.

        Args:
            thinking: that they were asked with.
            shaped: the reward is what policies are trained with: ``format_weight`` for the form is added, long answers
                lose, cut ones may abstain. Else it is what the judge (or plug-in) pays, and nothing else.

        Raises:
            TrainingError: the verifier is broken.
        """
        responses = [
            parse_response(self.tokenizer, each.token_ids, thinking=thinking, finished=each.finish_reason == "stop")
            for each in outputs
        ]
        pairs = [(problem, response) for (_, problem), response in zip(asked, responses, strict=True)]
        verdicts = self.judge(asked, responses)
        if self._by_reward or self.reward is None:
            scores = [verdict.reward or 0.0 for verdict in verdicts]
        else:
            scores = [score or 0.0 for score in _own_scores(asked, responses)]
        seconds = [None] * len(pairs) if self.second is None else [each.reward for each in self.second.pay(pairs)]
        rewards = [verdict.reward for verdict in verdicts]
        if shaped:
            ends = [(len(each.token_ids), each.finish_reason == "length") for each in outputs]
            rewards = [self.shaped(*each) for each in zip(rewards, pairs, ends, strict=True)]
        return [
            Rollout(
                task=task.name,
                prompt_ids=output.prompt_ids,
                token_ids=output.token_ids,
                logprobs=output.logprobs or [],
                response=response,
                reward=reward,
                score=score,
                prefill_tokens=output.usage.cache_miss_tokens,
                problem_id=problem_id(problem),
                finish=str(output.finish_reason),
                outcome=verdict.outcome,
                detail=verdict.detail,
                second=second,
                routes=None if output.routes is None else torch.from_numpy(output.routes),
            )
            for (task, problem), response, output, reward, score, verdict, second in zip(
                asked, responses, outputs, rewards, scores, verdicts, seconds, strict=True
            )
        ]

    def judge(self, asked: Sequence[tuple[Task, Problem]], responses: Sequence[Response]) -> list[Verdict]:
        """What the reward says of ``responses``, or without one the tasks' own judges."""
        if self.reward is None:
            return [verdict_of(score) for score in _own_scores(asked, responses)]
        return self.reward.pay([(problem, each) for (_, problem), each in zip(asked, responses, strict=True)])

    def again(
        self, asked: Sequence[tuple[Task, Problem]], rollouts: Sequence[Rollout]
    ) -> tuple[list[Verdict], list[Verdict]] | None:
        """Twice what the reward says of answers that were given; None where there is none to ask."""
        if self.reward is None:
            return None
        pairs = [(problem, rollout.response) for (_, problem), rollout in zip(asked, rollouts, strict=True)]
        return self.reward.pay(pairs), self.reward.pay(pairs)

    def shaped(self, reward: float | None, pair: tuple[Problem, Response], end: tuple[int, bool]) -> float | None:
        """What an answer is trained with that was paid ``reward``; ``end``: its tokens, and whether it was cut off."""
        config, (tokens, is_cut) = self._config, end
        if reward is None or (config.mask_truncated and is_cut):
            return None
        form = config.format_weight * format_reward(*pair)
        return reward + form + overlong_penalty(tokens, config.max_tokens, config.overlong_buffer)


def _own_scores(asked: Sequence[tuple[Task, Problem]], responses: Sequence[Response]) -> list[float | None]:
    """What each task's own judge says, from 0 to 1; None where it abstains."""
    return [accuracy_reward(task)(problem, each) for (task, problem), each in zip(asked, responses, strict=True)]


def sample_groups(
    engine: Engine,
    problems: ProblemSource,
    config: RLRunConfig,
    groups: Sequence[int],
    payer: Payer,
    *,
    version: int = 0,
) -> list[Rollout]:
    """The paid answers of ``groups``, ``group_size`` of each, group after group.

    Args:
        groups: numbers of groups; with ``seeding = "step"`` all those of one step, together.
        version: of the engine's weights.
    """
    asked = [problems.problem(group) for group in groups]
    settings = [group_sampling(config, group) for group in groups]
    size = config.group_size
    rollouts = payer.sample(engine, asked, settings)
    for place, rollout in enumerate(rollouts):
        group, sample, versions = groups[place // size], place % size, [version] * len(rollout.token_ids)
        rollouts[place] = replace(rollout, group=group, sample=sample, versions=versions)
        if (
            config.seeding == "group" and rollout.trained is None
        ):  # a group's cost does not depend on what is sampled beside it
            prefill = len(rollout.prompt_ids) if sample == 0 else 0
            rollouts[place] = replace(rollouts[place], prefill_tokens=prefill)
    return rollouts


def group_sampling(config: RLRunConfig, group: int) -> Sampling:
    """How the answers of ``group`` are drawn: by its own noise, or with ``seeding = "step"`` by that of its step."""
    own = config.seeding == "group"
    key = f"group/{group}" if own else str(group // config.prompts_per_step + 1)
    return Sampling(
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        seed=random.Random(f"rollout/{config.seed}/{key}").randrange(1 << 31),
        thinking=None,
        logprobs=True,
        routes=config.replay_routes,
        n=config.group_size,
    )


def problem_id(problem: Problem) -> str:
    """What ``problem`` is known by in its task: the id that its row has, else its number."""
    return str(problem.meta.get("id", problem.index))


def rollout_metrics(rollouts: Sequence[Rollout], *, of_judged: bool = False) -> dict[str, float]:
    """Means over answers: reward, accuracy (also of each task), format, response length, think share.

    The reward is that of the answers that were paid (0 if none was), ``abstained`` the share of the others.

    Args:
        of_judged: accuracy is that of the answers on which a verdict came, where the reward's is the only one.
    """
    by_task: dict[str, list[bool]] = defaultdict(list)
    for rollout in rollouts:
        if rollout.outcome == "paid" or not of_judged:
            by_task[rollout.task].append(is_correct(rollout.score))
    count, right = len(rollouts), [flag for flags in by_task.values() for flag in flags]
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    return {
        "reward": sum(rewards) / max(len(rewards), 1),
        "abstained": 1 - len(rewards) / count,
        "accuracy": sum(right) / max(len(right), 1),
        "format": sum(rollout.response.well_formed for rollout in rollouts) / count,
        "response_length": sum(rollout.num_sampled for rollout in rollouts) / count,
        "think_share": sum(bool(rollout.response.reasoning.strip()) for rollout in rollouts) / count,
        **{f"accuracy/{task}": sum(flags) / len(flags) for task, flags in sorted(by_task.items())},
        **_episode_metrics(rollouts),
    }


def _episode_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over episodes: turns, calls of tools, calls that failed; nothing where there are none."""
    episodes = [rollout for rollout in rollouts if rollout.trained is not None]
    if not episodes:
        return {}
    return {
        "turns": sum(len(rollout.trained or ()) for rollout in episodes) / len(episodes),
        "tool_calls": sum(rollout.tool_calls for rollout in episodes) / len(episodes),
        "tool_errors": sum(rollout.tool_errors for rollout in episodes) / len(episodes),
    }

"""The gate before RL: is there anything to reinforce?

RL can only raise what the policy already does now and then. Two traps follow. If even the best of eight
samples is mostly wrong, most groups have no spread and nothing is learnt. And if thinking does not help
yet, the shortest way to a little more reward is not to think: the policy collapses to an empty think and
stays there, because what is never sampled is never rewarded. Both can be measured in a second or two.

Right is what RL will pay: where the user brings a verifier, it is asked here too, and its full marks are 1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from sprat.config import RLConfig
from sprat.engine import Engine, Output
from sprat.errors import TrainingError
from sprat.eval.score import SIGNIFICANCE_LEVEL, Score, pool_scores, two_proportion_p_value
from sprat.eval.tasks import Scorer, evaluate, pass_at_k, score_output
from sprat.post.rl.rewards import Reward, Verifier, parse_response
from sprat.tasks import Problem, Task
from sprat.tokens import Tokenizer

MIN_THINKING_GAIN = 0.1  # forced thinking must be right this much more often than direct answers, and not by chance
_SEED = 7919
_NOT_READY = "the policy is not ready for RL"


@dataclass(frozen=True)
class GateResult:
    """What the gate saw, weighted over the mix: pass@8 as RL samples, accuracy with and without thinking."""

    pass_at_8: float
    thinking_accuracy: float
    direct_accuracy: float
    p_value: float
    min_pass_at_8: float

    @property
    def failure(self) -> str:
        """Why RL should not start; empty when it may."""
        if self.pass_at_8 < self.min_pass_at_8:
            return f"{_NOT_READY}: pass@8 is {self.pass_at_8:.0%}, the gate asks for {self.min_pass_at_8:.0%}"
        if self.thinking_accuracy - self.direct_accuracy < MIN_THINKING_GAIN or self.p_value > SIGNIFICANCE_LEVEL:
            thinking, direct = f"{self.thinking_accuracy:.0%}", f"{self.direct_accuracy:.0%}"
            comparison = f"made to think it is right in {thinking}, at once in {direct}"
            return f"{_NOT_READY}: {comparison}, so RL would teach it not to think"
        return ""

    def raise_if_failed(self) -> None:
        """Raises: TrainingError: the policy is not ready; says what to do."""
        if self.failure:
            todo = "pre-train longer on worked examples, show more demonstrations with reasoning, or ease the tasks"
            raise TrainingError(self.failure, where="rl.gate_pass_at_8", todo=todo)


def evaluate_gate(
    engine: Engine,
    tasks: Sequence[Task],
    weights: Sequence[float],
    config: RLConfig,
    reward: Reward | None = None,
    *,
    count: int = 256,
) -> GateResult:
    """Measure a policy on about ``count`` training problems, shared out over the tasks by weight.

    Args:
        reward: says what is right instead of the tasks' own judges; an answer from which it abstains is not.

    Raises:
        TrainingError: ``reward`` pays less than 0 or more than 1, so that nobody knows what right is, or it failed
            on every answer.
    """
    total = sum(weights)
    task_shares = [(task, weight / total) for task, weight in zip(tasks, weights, strict=True) if weight > 0]
    pass_at_8 = 0.0
    scores: dict[bool, list[Score]] = {True: [], False: []}
    for task, share in task_shares:
        n, limit = max(8, round(count * share)), config.max_tokens
        pass_at_8 += share * pass_at_k(
            engine,
            task,
            8,
            max(8, n // 4),
            max_tokens=limit,
            temperature=config.temperature,
            seed=config.seed + _SEED,
            split="train",
            scorer=_scorer(engine.tokenizer, reward, None),
        )
        for thinking in scores:
            scorer = _scorer(engine.tokenizer, reward, thinking)
            score = evaluate(engine, task, count=n, thinking=thinking, max_tokens=limit, split="train", scorer=scorer)
            scores[thinking].append(score)
    if isinstance(reward, Verifier):
        reward.pop_faults()
    with_thinking, direct = pool_scores(scores[True]), pool_scores(scores[False])
    p_value = two_proportion_p_value(with_thinking, direct)
    return GateResult(pass_at_8, with_thinking.accuracy, direct.accuracy, p_value, config.gate_pass_at_8)


def _scorer(tokenizer: Tokenizer, reward: Reward | None, thinking: bool | None) -> Scorer:
    """Who scores answers that were asked for with ``thinking``: ``reward``, or without one the task's own judge."""
    return score_output if reward is None else functools.partial(_verifier_score, tokenizer, reward, thinking)


def _verifier_score(
    tokenizer: Tokenizer, reward: Reward, thinking: bool | None, _: Task, problem: Problem, output: Output
) -> float:
    """What ``reward`` pays the answer, 0 where it abstains."""
    finished = output.finish_reason == "stop"
    score = reward(problem, parse_response(tokenizer, output.token_ids, thinking=thinking, finished=finished)) or 0.0
    if not 0 <= score <= 1:
        todo = "let the verifier pay from 0 to 1, where 1 is right, or leave the gate out (rl.gate = false)"
        raise TrainingError(f"the verifier paid {score:g}, so the gate cannot tell right", where="rl.gate", todo=todo)
    return score

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
from sprat.post.evaluate import Judge, Score, evaluate, judge, pass_at_k, significant
from sprat.post.rewards import Reward, Verifier, read_response
from sprat.tasks import Problem, Task
from sprat.tokens import Tokenizer

MARGIN = 0.1  # forced thinking must be right this much more often than direct answers
LEVEL = 0.05  # and the difference must not be chance
_SEED = 7919
_NOT_READY = "the policy is not ready for RL"


@dataclass(frozen=True)
class Readiness:
    """What the gate saw, weighted over the mix: pass@8 as RL samples, accuracy with and without thinking."""

    pass_at_8: float
    forced: float
    direct: float
    p_value: float
    needed: float

    @property
    def fault(self) -> str:
        """Why RL should not start; empty when it may."""
        if self.pass_at_8 < self.needed:
            return f"{_NOT_READY}: pass@8 is {self.pass_at_8:.0%}, the gate asks for {self.needed:.0%}"
        if self.forced - self.direct < MARGIN or self.p_value > LEVEL:
            found = f"made to think it is right in {self.forced:.0%}, at once in {self.direct:.0%}"
            return f"{_NOT_READY}: {found}, so RL would teach it not to think"
        return ""

    def check(self) -> None:
        """Raises: TrainingError: the policy is not ready; says what to do."""
        if self.fault:
            todo = "pre-train longer on worked examples, show more demonstrations with reasoning, or ease the tasks"
            raise TrainingError(self.fault, where="rl.gate_pass_at_8", todo=todo)


def readiness(
    engine: Engine,
    tasks: Sequence[Task],
    weights: Sequence[float],
    config: RLConfig,
    reward: Reward | None = None,
    *,
    count: int = 256,
) -> Readiness:
    """Measure a policy on about ``count`` training problems, shared out over the tasks by weight.

    Args:
        reward: says what is right instead of the tasks' own judges; an answer from which it abstains is not.

    Raises:
        TrainingError: ``reward`` pays less than 0 or more than 1, so that nobody knows what right is, or it failed
            on every answer.
    """
    total = sum(weights)
    parts = [(task, weight / total) for task, weight in zip(tasks, weights, strict=True) if weight > 0]
    passed, forced, direct = 0.0, _Pool(), _Pool()
    for task, share in parts:
        problems = max(8, round(count * share))
        passed += share * pass_at_k(
            engine,
            task,
            8,
            max(8, problems // 4),
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=config.seed + _SEED,
            split="train",
            score=_judge(engine.tokenizer, reward, None),
        )
        for pool, thinking in ((forced, True), (direct, False)):
            limit, score = config.max_tokens, _judge(engine.tokenizer, reward, thinking)
            found = evaluate(
                engine, task, count=problems, thinking=thinking, max_tokens=limit, split="train", score=score
            )
            pool.add(found)
    if isinstance(reward, Verifier):
        reward.take_faults()
    first, second = forced.score(), direct.score()
    return Readiness(passed, first.accuracy, second.accuracy, significant(first, second), config.gate_pass_at_8)


def _judge(tokenizer: Tokenizer, reward: Reward | None, thinking: bool | None) -> Judge:
    """Who scores answers that were asked for with ``thinking``: ``reward``, or without one the task's own judge."""
    return judge if reward is None else functools.partial(_verified, tokenizer, reward, thinking)


def _verified(
    tokenizer: Tokenizer, reward: Reward, thinking: bool | None, _: Task, problem: Problem, output: Output
) -> float:
    """What ``reward`` pays the answer, 0 where it abstains."""
    finished = output.finish_reason == "stop"
    paid = reward(problem, read_response(tokenizer, output.token_ids, thinking=thinking, finished=finished)) or 0.0
    if not 0 <= paid <= 1:
        todo = "let the verifier pay from 0 to 1, where 1 is right, or leave the gate out (rl.gate = false)"
        raise TrainingError(f"the verifier paid {paid:g}, so the gate cannot tell right", where="rl.gate", todo=todo)
    return paid


class _Pool:
    """Adds up scores of several tasks."""

    def __init__(self) -> None:
        self.correct = self.count = 0

    def add(self, score: Score) -> None:
        self.correct, self.count = self.correct + score.correct, self.count + score.count

    def score(self) -> Score:
        share = self.correct / self.count
        return Score("mix", self.count, self.correct, share, share, share, 0.0)

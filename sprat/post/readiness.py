"""The gate before RL: is there anything to reinforce?

RL can only raise what the policy already does now and then. Two traps follow. If even the best of eight
samples is mostly wrong, most groups have no spread and nothing is learnt. And if thinking does not help
yet, the shortest way to a little more reward is not to think: the policy collapses to an empty think and
stays there, because what is never sampled is never rewarded. Both can be measured in a second or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sprat.config import RLConfig
from sprat.engine import Engine
from sprat.errors import TrainingError
from sprat.post.evaluate import Score, evaluate, pass_at_k, significant
from sprat.tasks import Task

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
    engine: Engine, tasks: Sequence[Task], weights: Sequence[float], config: RLConfig, *, count: int = 256
) -> Readiness:
    """Measure a policy on about ``count`` training problems, shared out over the tasks by weight."""
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
        )
        for pool, thinking in ((forced, True), (direct, False)):
            limit = config.max_tokens
            pool.add(evaluate(engine, task, count=problems, thinking=thinking, max_tokens=limit, split="train"))
    first, second = forced.score(), direct.score()
    return Readiness(passed, first.accuracy, second.accuracy, significant(first, second), config.gate_pass_at_8)


class _Pool:
    """Adds up scores of several tasks."""

    def __init__(self) -> None:
        self.correct = self.count = 0

    def add(self, score: Score) -> None:
        self.correct, self.count = self.correct + score.correct, self.count + score.count

    def score(self) -> Score:
        share = self.correct / self.count
        return Score("mix", self.count, self.correct, share, share, share, 0.0)

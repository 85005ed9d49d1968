"""What goes between the dispatcher and those who ask it: questions, groups for a worker, answers that came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sprat.engine import Sampling
from sprat.post.rl.ledger_tables import Question
from sprat.post.rl.rollout import Rollout
from sprat.post.rl.sampled import Request, SampledAnswer


class Asker(Protocol):
    """What groups are asked, and what their answers are paid; pure functions of the group's number, but for the pay."""

    def question(self, group: int) -> Question:
        """What ``group`` is asked."""
        ...

    def sampling(self, group: int) -> Sampling:
        """How its answers are drawn."""
        ...

    def pay(self, question: Question, answers: Sequence[SampledAnswer]) -> list[Rollout]:
        """Its answers, paid."""
        ...


@dataclass(frozen=True)
class Assignment:
    """Groups for a worker, the weights to sample them with, and how often the run was sent back by now."""

    version: int
    digest: str
    rollbacks: int
    requests: list[Request]


@dataclass(frozen=True)
class Sampled:
    """Answers that came and are not paid yet."""

    question: Question
    worker: str
    rollbacks: int
    answers: list[SampledAnswer]


@dataclass(frozen=True)
class Range:
    """The groups of a run: from ``first`` to before ``end``, ``per_step`` in each step; of a dynamic one more."""

    first: int
    end: int
    per_step: int

"""What a task is: it draws problems, explains them, and judges answers.

No two splits share a problem, whatever words it is asked in: its canonical form (``sprat.tasks.canonical``) decides by
its salted SHA-256 whether it belongs to test (two in ten), to dev (one in ten: recipes are tuned on it) or to train.
The split is thus a property of the problem, not of a seed, and holds for every task, every setting and every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from sprat.errors import DataError
from sprat.tasks import canonical

Split = Literal["train", "dev", "test"]
HELD_OUT_SPLITS: tuple[Split, ...] = ("test", "dev")
CORRECT_SCORE = 1.0 - 1e-6  # full marks, but for the rounding of a score that was added up
SPLIT_SHARES: dict[Split, int] = {"test": 2, "dev": 1, "train": 7}  # of ten problems
_SPLITS = [split for split, share in SPLIT_SHARES.items() for _ in range(share)]
SPLIT_SALT = "3"  # another whenever forms change: splits are drawn anew, from the same problems
MAX_ATTEMPTS = 1000  # draws before a generator is said to have no question in the split


@dataclass(frozen=True)
class Problem:
    """One question with a verifiable answer.

    Attributes:
        task: the title of the task that drew it.
        index: its index within the split.
        question, answer: plain text.
        meta: what the judge and the report need; ``num_terms`` where length has a meaning.
        canonical: one text for all ways to ask this (``sprat.tasks.canonical``); left out, it is the question's own.
    """

    task: str
    index: int
    question: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    canonical: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "canonical", self.canonical or canonical.text(self.question))


class Task(Protocol):
    """A source of problems that knows how to explain and judge them."""

    @property
    def name(self) -> str:
        """Title, unique within a mix."""
        ...

    def problem(self, split: Split, index: int) -> Problem:
        """Problem ``index`` of ``split``: a pure function of its arguments."""
        ...

    def score(self, problem: Problem, answer: str | None) -> float:
        """How right ``answer`` is, from 0 to 1."""
        ...

    def chain_of_thought(self, problem: Problem) -> str:
        """A chain of thought that leads to the answer."""
        ...


def is_correct(score: float) -> bool:
    """Whether ``score`` (0 to 1) means a right answer; partial credit does not.

    >>> is_correct(0.1 * 3 + 0.7), is_correct(0.99)
    (True, False)
    """
    return score >= CORRECT_SCORE


def task_verdict(task: Task, problem: Problem, answer: str | None) -> float | None:
    """``task.score``; None where the task's judge went over its bounds, so that nobody knows what it is worth."""
    verdict: Callable[[Problem, str | None], float | None] = getattr(task, "verdict", task.score)
    return verdict(problem, answer)


def split_of(form: str) -> Split:
    """The split of the problem whose canonical form is ``form``, by the SHA-256 of ``SPLIT_SALT`` and form.

    >>> split_of("sum 1 2 3") in ("train", "dev", "test")
    True
    """
    hash_bytes = hashlib.sha256(f"{SPLIT_SALT}\n{form}".encode()).digest()[:8]
    return _SPLITS[int.from_bytes(hash_bytes, "big") % len(_SPLITS)]


def sample_problem(generate: Callable[[int], Problem], split: Split, index: int) -> Problem:
    """The first of ``generate(index * MAX_ATTEMPTS + k)``, k = 0, 1, …, that lies in ``split``.

    Raises:
        DataError: none of ``MAX_ATTEMPTS`` draws does; the task has too few distinct questions.
    """
    for attempt in range(MAX_ATTEMPTS):
        problem = generate(index * MAX_ATTEMPTS + attempt)
        if split_of(problem.canonical) == split:
            return problem
    what = f"no {split} question in {MAX_ATTEMPTS} draws"
    raise DataError(what, where="task settings", todo="widen the task's settings")


def held_out_problems(task: Task, count: int, split: Split = "test") -> list[Problem]:
    """``count`` problems of ``split``, no two of one canonical form.

    A task with fewer distinct problems there gives all that ``20 * count`` draws find.
    """
    by_form: dict[str, Problem] = {}
    for index in range(20 * count):
        if len(by_form) == count:
            break
        problem = task.problem(split, index)
        by_form.setdefault(problem.canonical, problem)
    return list(by_form.values())


@dataclass(frozen=True)
class HeldOutTask:
    """A task whose problems of one held-out split were drawn before and kept; all others are drawn anew."""

    task: Task
    problems: tuple[Problem, ...]
    split: Split = "test"

    @property
    def name(self) -> str:
        """The task's own title."""
        return self.task.name

    def problem(self, split: Split, index: int) -> Problem:
        """Kept problem ``index`` (around and around), or a fresh one of another split."""
        return self.problems[index % len(self.problems)] if split == self.split else self.task.problem(split, index)

    def score(self, problem: Problem, answer: str | None) -> float:
        """The task's own judgement."""
        return self.task.score(problem, answer)

    def chain_of_thought(self, problem: Problem) -> str:
        """The task's own explanation."""
        return self.task.chain_of_thought(problem)

"""What a task is: it draws problems, explains them, and judges answers.

Train and test never share a question: a question belongs to the test split when the SHA-256 of its
text says so (one in ten). The split is thus a property of the question, not of a seed, and holds
for every generator, every setting and every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from sprat.errors import DataError

Split = Literal["train", "test"]
RIGHT = 1.0 - 1e-6  # full marks, but for the rounding of a score that was added up
TEST_SHARE = 10  # one question in ten is held out
ATTEMPTS = 1000  # draws before a generator is said to have no question in the split


@dataclass(frozen=True)
class Problem:
    """One question with a verifiable answer.

    Attributes:
        task: the title of the task that drew it.
        index: its index within the split.
        question, answer: plain text.
        meta: what the judge and the report need; ``num_terms`` where length has a meaning.
    """

    task: str
    index: int
    question: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)


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

    def explain(self, problem: Problem) -> str:
        """A chain of thought that leads to the answer."""
        ...


def is_right(score: float) -> bool:
    """Whether ``score`` (0 to 1) means a right answer; partial credit does not.

    >>> is_right(0.1 * 3 + 0.7), is_right(0.99)
    (True, False)
    """
    return score >= RIGHT


def split_of(question: str) -> Split:
    """The split that ``question`` belongs to, by its SHA-256.

    >>> split_of("What is 1 + 2 + 3?") in ("train", "test")
    True
    """
    first = hashlib.sha256(question.encode()).digest()[:8]
    return "test" if int.from_bytes(first, "big") % TEST_SHARE == 0 else "train"


def draw(generate: Callable[[int], Problem], split: Split, index: int) -> Problem:
    """The first of ``generate(index * ATTEMPTS + k)``, k = 0, 1, …, that lies in ``split``.

    Raises:
        DataError: none of ``ATTEMPTS`` draws does; the task has too few distinct questions.
    """
    for attempt in range(ATTEMPTS):
        problem = generate(index * ATTEMPTS + attempt)
        if split_of(problem.question) == split:
            return problem
    raise DataError(f"no {split} question in {ATTEMPTS} draws", where="task settings", todo="widen the task's settings")


def held_out(task: Task, count: int) -> list[Problem]:
    """``count`` test problems, distinct as long as the task has that many (then it repeats none).

    A task with fewer distinct held-out questions than ``count`` gives all that ``20 * count`` draws find.
    """
    return list(_distinct(task, count))


def _distinct(task: Task, count: int) -> Iterator[Problem]:
    seen: set[str] = set()
    for index in range(20 * count):
        if len(seen) == count:
            return
        problem = task.problem("test", index)
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


@dataclass(frozen=True)
class Drawn:
    """A task whose held-out problems were drawn before and kept; training problems are drawn anew."""

    task: Task
    kept: tuple[Problem, ...]

    @property
    def name(self) -> str:
        """The task's own title."""
        return self.task.name

    def problem(self, split: Split, index: int) -> Problem:
        """Kept problem ``index`` (around and around) of the test split, or a fresh one of the training split."""
        return self.kept[index % len(self.kept)] if split == "test" else self.task.problem(split, index)

    def score(self, problem: Problem, answer: str | None) -> float:
        """The task's own judgement."""
        return self.task.score(problem, answer)

    def explain(self, problem: Problem) -> str:
        """The task's own explanation."""
        return self.task.explain(problem)

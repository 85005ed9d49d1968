"""Which problem each group of a run is asked, and which problems are kept from training.

Both are pure functions: of the run's seed and the group's number, and of what a problem says. A file's problems are
gone through in a new order each time around, so that each is asked as often as any other; a generator draws a new
problem for each group. No problem that is held out is ever trained, whatever file or seed it comes from.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from sprat.config import RLConfig
from sprat.config.rl import HeldOutConfig
from sprat.errors import DataError
from sprat.post.rl.problem_file import ProblemFile
from sprat.post.sft import sample_problems
from sprat.tasks import Problem, Task, UserClassTask, UserTask, held_out_problems

_MAX_ATTEMPTS = 100  # draws of a generator that gives held-out problems again and again
_NUM_TRAIN_INDICES = 1 << 31


class ProblemSource(Protocol):
    """What the groups of a run are asked."""

    def problem(self, group: int) -> tuple[Task, Problem]:
        """The problem of group number ``group``: a pure function of it and of the run's seed."""
        ...


class StationProblems:
    """As the quickstart draws them: all those of a step together."""

    def __init__(self, tasks: Sequence[Task], weights: Sequence[float], config: RLConfig) -> None:
        self._tasks, self._weights, self._config = tasks, weights, config
        self._step, self._problems = 0, list[tuple[Task, Problem]]()

    def problem(self, group: int) -> tuple[Task, Problem]:
        """See ``ProblemSource``."""
        count = self._config.prompts_per_step
        step = group // count + 1
        if step != self._step:
            self._problems = sample_problems(self._tasks, self._weights, count, f"rl/{self._config.seed}/{step}")
            self._step = step
        return self._problems[group % count]


@dataclass
class Part:
    """A task of the mix: its problems to train on, or None where it draws a new one each time.

    ``held_out`` are the problems that are kept from training; ``others``, by their canonical forms, those that other
    parts hold out; ``fits`` says whether a problem that is drawn can be asked at all.
    """

    task: Task
    problems: tuple[Problem, ...] | None
    held_out: tuple[Problem, ...]
    weight: float = 1.0
    others: frozenset[str] = frozenset()
    fits: Callable[[Problem], bool] = lambda problem: True
    _orders: dict[str, list[int]] = field(default_factory=dict)

    def nth(self, number: int, key: str) -> Problem:
        """The problem that is trained ``number``-th of this task.

        Raises:
            DataError: a generator gives nothing but held-out problems, or too long ones.
        """
        if self.problems is not None:
            around, place = divmod(number, len(self.problems))
            if (name := f"{key}/{around}") not in self._orders:
                order = list(range(len(self.problems)))
                random.Random(name).shuffle(order)
                self._orders = {name: order}
            return self.problems[self._orders[name][place]]
        rng, forms = random.Random(f"{key}/{number}"), {problem.canonical for problem in self.held_out} | self.others
        for _ in range(_MAX_ATTEMPTS):
            problem = self.task.problem("train", rng.randrange(_NUM_TRAIN_INDICES))
            if problem.canonical not in forms and self.fits(problem):
                return problem
        what = f"{_MAX_ATTEMPTS} training problems in a row are held-out ones, or leave no room for an answer"
        todo = "let its splits differ, or lower held_out.problems or max_tokens"
        raise DataError(what, where=self.task.name, todo=todo)


class ProblemMix:
    """The problems of a run of ``sprat rl MODEL``; tasks take turns by chance, by their weights."""

    def __init__(self, parts: Sequence[Part], seed: int) -> None:
        self.parts, self._seed = parts, seed
        self._turns = list[tuple[int, int]]()  # of each group: its part, and how many groups of that part came before
        self._counts = [0] * len(parts)

    def problem(self, group: int) -> tuple[Task, Problem]:
        """See ``ProblemSource``."""
        while len(self._turns) <= group:
            rng = random.Random(f"rl/{self._seed}/turn/{len(self._turns)}")
            (place,) = rng.choices(range(len(self.parts)), weights=[part.weight for part in self.parts])
            self._turns.append((place, self._counts[place]))
            self._counts[place] += 1
        place, number = self._turns[group]
        part = self.parts[place]
        return part.task, part.nth(number, f"rl/{self._seed}/{place}")

    @property
    def held_out(self) -> list[tuple[Task, Problem]]:
        """All problems that are kept from training."""
        return [(part.task, problem) for part in self.parts for problem in part.held_out]


def split_tasks(tasks: Sequence[Task], config: HeldOutConfig) -> list[Part]:
    """``split_task`` of each, none of which trains what another one holds out.

    Raises:
        DataError: there is nothing to train on.
    """
    parts = [split_task(task, config) for task in tasks]
    others = [_forms(each for other in parts if other is not part for each in other.held_out) for part in parts]
    return [_without(part, forms) for part, forms in zip(parts, others, strict=True)]


def _forms(problems: Iterable[Problem]) -> frozenset[str]:
    return frozenset(problem.canonical for problem in problems)


def _without(part: Part, forms: frozenset[str]) -> Part:
    """``part`` that trains nothing of ``forms``. Raises: DataError: nothing is left."""
    if part.problems is None:
        return replace(part, others=forms)
    train = tuple(each for each in part.problems if each.canonical not in forms)
    if not train:
        what, todo = "each of its problems is held out by another task", "name it once, or hold none of them out"
        raise DataError(what, where=part.task.name, todo=todo)
    return replace(part, problems=train)


def split_task(task: Task, config: HeldOutConfig) -> Part:
    """``task`` with what is kept of it, ``config.problems`` at most.

    A file that says which of its rows are held out is taken at its word; else a share of it is, by a hash of what each
    question says: neither the order of the rows nor the seed matters. A generator has splits of its own
    (``tasks.base``).

    Raises:
        DataError: there is nothing to train on.
    """
    if isinstance(task, ProblemFile):
        return _split_rows(task, task.problems, task.held_out, config)
    if isinstance(task, UserTask):
        train = task.problems["train"]
        others = tuple(problem for split in ("test", "dev") for problem in task.problems[split])
        return _split_rows(task, train or others, others if train else (), config)
    count = config.problems if config.share else 0
    if isinstance(task, UserClassTask) and task.num_problems is not None:
        count = min(count, task.num_problems)
    return Part(task, None, tuple(held_out_problems(task, count)) if count else ())


def _split_rows(task: Task, rows: tuple[Problem, ...], held_out: tuple[Problem, ...], config: HeldOutConfig) -> Part:
    """The part of a file: ``held_out`` where it says so, else the rows with the least hashes."""
    if not held_out and config.share:
        count = min(max(1, round(config.share * len(rows))), config.problems, len(rows) - 1)
        held_out = tuple(sorted(rows, key=_hash)[: max(0, count)])
    forms = {problem.canonical for problem in held_out}
    train = tuple(problem for problem in rows if problem.canonical not in forms)
    if not train:
        raise DataError("no problem to train on", where=task.name, todo="give more rows, or hold none of them out")
    kept = sorted(held_out, key=_hash)[: config.problems] if config.share else []
    return Part(task, train, tuple(kept))


def _hash(problem: Problem) -> str:
    return hashlib.sha256(f"held out/{problem.canonical}".encode("utf-8", "surrogatepass")).hexdigest()

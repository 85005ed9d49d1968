"""A task of the user's as a Python class: ``file.py:ClassName`` or ``package.module:ClassName``.

The class is made without arguments and has ``problem(split, index) -> Problem`` and ``score(problem, answer) ->
float`` from 0 to 1; what it leaves out of ``sprat.tasks.Task`` is filled in. One answer never ends an evaluation:
where ``score`` raises, takes too long or returns what is no such number, the answer is wrong and the fault is counted.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

from sprat.errors import ConfigError, DataError, SpratError
from sprat.files import digest as file_digest
from sprat.tasks.base import Problem, Split
from sprat.tasks.source_files import source_files
from sprat.tasks.user_code import TimeUpError, finite_float, import_source, time_limit

log = logging.getLogger(__name__)
TIMEOUT_SECONDS = 10.0  # for one call
EXPECTED = {
    "problem": ("(self, split, index) -> sprat.tasks.Problem", 2),
    "score": ("(self, problem, answer) -> float from 0 to 1", 2),
}


class UserClassTask:
    """An object of the user's class, guarded.

    Args:
        source: what the user named, ``file.py:ClassName``.
        inner: the object.

    Attributes:
        digest: SHA-256 (hex) of the class's name and of its code, with what that imports from its own folder.
        faults, num_scored: calls of ``score`` that failed, and all of them.
        last_fault: what happened the last time.
    """

    def __init__(self, source: str, inner: Any, digest: str = "") -> None:
        self.source, self.digest, self._inner = source, digest, inner
        name = getattr(inner, "name", None)
        self.name = name if isinstance(name, str) and name.strip() else source.rpartition(":")[2]
        self.num_scored, self.faults, self.last_fault = 0, 0, ""

    @property
    def num_problems(self) -> int | None:
        """How many problems a split has, where the class says so with a ``__len__``.

        Raises:
            DataError: its ``__len__`` fails.
        """
        if not hasattr(self._inner, "__len__"):
            return None
        try:
            return len(self._inner)
        except (Exception, SystemExit) as error:
            what = f"raised {type(error).__name__}: {error}"
            raise DataError(what, where=f"{self.source}.__len__", todo="mend the class") from error

    def problem(self, split: Split, index: int) -> Problem:
        """The user's problem.

        Raises:
            DataError: it is none, or making it raised or took too long.
        """
        where = f"{self.source}.problem({split!r}, {index})"
        todo = "return a sprat.tasks.Problem with a question and an answer, both text"
        try:
            with time_limit(TIMEOUT_SECONDS):
                problem = self._inner.problem(split, index)
        except TimeUpError:
            raise DataError(f"took longer than {TIMEOUT_SECONDS:g} s", where=where, todo="make it faster") from None
        except SpratError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(f"raised {type(error).__name__}: {error}", where=where, todo="mend the class") from error
        if not isinstance(problem, Problem) or not isinstance(problem.answer, str):
            raise DataError(f"returned {type(problem).__name__}, no problem", where=where, todo=todo)
        if not isinstance(problem.question, str) or not problem.question.strip():
            raise DataError("returned a problem without a question", where=where, todo=todo)
        return problem

    def score(self, problem: Problem, answer: str | None) -> float:
        """The user's judgement, from 0 to 1; 0 where there is no answer, or no judgement."""
        if answer is None:
            return 0.0
        self.num_scored += 1
        try:
            with time_limit(TIMEOUT_SECONDS):
                value = finite_float(self._inner.score(problem, answer))
            if not 0 <= value <= 1:
                raise ValueError(f"{value!r} was returned, which is not from 0 to 1")
            return value
        except TimeUpError:
            fault = f"took longer than {TIMEOUT_SECONDS:g} s"
        except (Exception, SystemExit) as error:
            fault = f"raised {type(error).__name__}: {error}"
        if not self.faults:
            log.warning("%s.score %s (question %r)", self.source, fault, problem.question)
        self.faults, self.last_fault = self.faults + 1, fault
        return 0.0

    def check_faults(self) -> None:
        """See whether the class ever judged.

        Raises:
            DataError: ``score`` failed on each answer, so it is broken and not the answers.
        """
        if self.num_scored and self.faults == self.num_scored:
            what = f"score failed on each of {self.faults} answers; the last time it {self.last_fault}"
            raise DataError(what, where=self.source, todo="mend the class")

    def chain_of_thought(self, problem: Problem) -> str:
        """The user's, where the class has any.

        Raises:
            DataError: it has none.
        """
        if not callable(getattr(self._inner, "chain_of_thought", None)):
            raise DataError("no chain of thought", where=self.source, todo="give the class chain_of_thought(problem)")
        return str(self._inner.chain_of_thought(problem))


def load_class_task(source: str) -> UserClassTask:
    """The task ``file.py:ClassName`` or ``package.module:ClassName``.

    Raises:
        ConfigError: the name is not written so, there is no such class, it cannot be made without arguments, or it
            lacks ``problem`` or ``score``.
    """
    module_name, colon, class_name = source.rpartition(":")
    where = f"task {source}"
    if not colon or not module_name or not class_name:
        raise ConfigError(f"cannot read the task {source!r}", where="task", todo="write file.py:ClassName")
    module = import_source(module_name, where)
    task_class = getattr(module, class_name, None)
    todo = f"write class {class_name} with problem{EXPECTED['problem'][0]} and score{EXPECTED['score'][0]}"
    if not inspect.isclass(task_class):
        what = (
            f"{module_name!r} has no class {class_name!r}" if task_class is None else f"{class_name!r} is not a class"
        )
        raise ConfigError(what, where=where, todo=todo)
    try:
        inner = task_class()
    except (Exception, SystemExit) as error:
        what = f"making {class_name} raised {type(error).__name__}: {error}"
        raise ConfigError(what, where=where, todo="let it be made without arguments") from error
    for name, (signature, count) in EXPECTED.items():
        try:
            inspect.signature(getattr(inner, name)).bind(*[None] * count)
        except (AttributeError, TypeError, ValueError):
            what = f"{class_name} has no method {name}{signature}"
            raise ConfigError(what, where=where, todo=todo) from None
    path = Path(module_name if module_name.endswith(".py") else getattr(module, "__file__", None) or "")
    files = source_files(path) if path.is_file() else {}
    code = {name: file_digest.of_file(file) for file, name in files.items()}
    return UserClassTask(source, inner, file_digest.of_json({"class": class_name, "files": code}))

"""Tasks: each owns its data and its judge."""

from __future__ import annotations

from pathlib import Path

from sprat.config import TaskConfig
from sprat.errors import DataError
from sprat.tasks.base import (
    HELD_OUT_SPLITS,
    HeldOutTask,
    Problem,
    Split,
    Task,
    held_out_problems,
    is_correct,
    split_of,
    task_verdict,
)
from sprat.tasks.gym import GymTask
from sprat.tasks.overlap import QuestionIndex, overlap
from sprat.tasks.sums import Sums
from sprat.tasks.user_class import UserClassTask, load_class_task
from sprat.tasks.user_file import UserTask, read_task

__all__ = [
    "HELD_OUT_SPLITS",
    "HeldOutTask",
    "GymTask",
    "Problem",
    "QuestionIndex",
    "Split",
    "Sums",
    "Task",
    "UserClassTask",
    "UserTask",
    "held_out_problems",
    "is_correct",
    "load",
    "load_class_task",
    "load_user_task",
    "overlap",
    "read_task",
    "split_of",
    "task_input",
    "task_verdict",
]


def load(config: TaskConfig) -> Task:
    """The task that ``config`` names: ``sums`` (own) or ``reasoning-gym/FAMILY``.

    Raises:
        DataError: no such task, or settings that it does not know.
    """
    title = config.title or config.name
    source, _, family = config.name.partition("/")
    if source == "reasoning-gym" and family:
        return GymTask(title, family, config.settings)
    if config.name == "sums":
        try:
            return Sums(title, **config.settings)  # type: ignore[arg-type]
        except TypeError as error:
            raise DataError(f"sums: {error}", where=title, todo="settings: min_terms, max_terms, max_value") from None
    raise DataError(f"no task {config.name!r}", where=title, todo="use sums or reasoning-gym/FAMILY")


def load_user_task(source: str) -> UserTask | UserClassTask:
    """The task of the user's that ``source`` names: a JSONL file, or ``file.py:ClassName``.

    Raises:
        DataError, ConfigError, MachineError: see ``read_task`` and ``load_class_task``.
    """
    return load_class_task(source) if _is_class(source) else read_task(source)


def task_input(source: str) -> Path | str:
    """The task ``source`` as an input of a run: a file of questions itself, of a class the digest of its code.

    Raises:
        ConfigError: see ``load_class_task``.
    """
    return load_class_task(source).digest if _is_class(source) else Path(source)


def _is_class(source: str) -> bool:
    return ":" in source and not source.endswith(".jsonl")

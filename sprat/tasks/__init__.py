"""Tasks: each owns its data and its judge."""

from __future__ import annotations

from sprat.config import TaskConfig
from sprat.errors import DataError
from sprat.tasks.base import HELD_OUT_SPLITS, HeldOutTask, Problem, Split, Task, held_out_problems, is_correct, split_of
from sprat.tasks.gym import GymTask
from sprat.tasks.sums import Sums

__all__ = [
    "HELD_OUT_SPLITS",
    "HeldOutTask",
    "GymTask",
    "Problem",
    "Split",
    "Sums",
    "Task",
    "held_out_problems",
    "is_correct",
    "load",
    "split_of",
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

"""What says a question of an evaluation task: learned by heart it shows as skill, so it is left out of what is trained.

Examples are looked at, and text that is replayed beside them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from sprat.data.example import Conversation, Example, Text
from sprat.errors import DataError
from sprat.eval.task_files import select_problems
from sprat.tasks import Problem, QuestionIndex, UserClassTask, UserTask

log = logging.getLogger(__name__)
_MIN_WORDS = 4  # of a question that is looked for within a longer text; "why?" stands in many
_NUM_NAMES = 5


def remove_overlap(
    examples: Sequence[Example],
    tasks: Sequence[UserTask | UserClassTask],
    how: Literal["drop", "keep", "refuse"],
    noun: str = "examples",
) -> tuple[tuple[Example, ...], dict[str, Any]]:
    """``examples`` without those that ask what one of ``tasks`` asks, and how many those are, with the first places.

    Texts are compared by their words (``tasks.overlap``): each turn of the user's, or the whole of a plain text. A
    question of less than four words counts only where it is the whole turn.

    Args:
        how: ``drop`` leaves them out, ``keep`` only counts them, ``refuse`` is an error where there is one.
        noun: what they are called.

    Raises:
        DataError: see ``how``; or nothing is left.
    """
    problems = [(task.name, problem) for task in tasks for problem in select_problems(task)]
    index, by_task = QuestionIndex([problem for _, problem in problems]), dict.fromkeys((t.name for t in tasks), 0)
    clean, sources = list[Example](), list[str]()
    for example in examples:
        names = {problems[number][0] for text in _asked(example) for number in index.find(text, _MIN_WORDS)}
        for name in names:
            by_task[name] += 1
        sources += [str(example.where)] if names else []
        clean += [] if names else [example]
    if not sources:
        return tuple(examples), {}
    asked = " and ".join(name for name, count in by_task.items() if count)
    what = f"{len(sources)} of {len(examples)} {noun} ask what {asked} asks"
    todo = f"give other {noun}, or set examples.overlap=keep"
    if how == "refuse" or (how == "drop" and not clean):
        raise DataError(what, where=", ".join(sources[:_NUM_NAMES]), todo=todo)
    log.warning(
        "%s and are %s: %s", what, {"drop": "left out", "keep": "learned"}[how], ", ".join(sources[:_NUM_NAMES])
    )
    facts = {"count": len(sources), "how": how, "tasks": by_task, "names": sources[:_NUM_NAMES]}
    return tuple(clean if how == "drop" else examples), facts


def remove_held_out(
    examples: Sequence[Example], questions: Sequence[Problem], noun: str = "examples"
) -> tuple[tuple[Example, ...], dict[str, Any]]:
    """``examples`` without those that ask one of ``questions``, as ``remove_overlap`` compares, and how many those are.

    Raises:
        DataError: nothing is left.
    """
    index = QuestionIndex(questions)
    asking = [example for example in examples if any(index.find(text, _MIN_WORDS) for text in _asked(example))]
    if not asking:
        return tuple(examples), {}
    names = [str(example.where) for example in asking[:_NUM_NAMES]]
    what = f"{len(asking)} of {len(examples)} {noun} ask what is held out"
    if len(asking) == len(examples):
        raise DataError(what, where=", ".join(names), todo=f"give other {noun}")
    log.warning("%s and are left out: %s", what, ", ".join(names))
    found = set(map(id, asking))
    return tuple(each for each in examples if id(each) not in found), {"count": len(asking), "names": names}


def _asked(example: Example) -> list[str]:
    """The texts of an example in which a question may stand."""
    if isinstance(example, Text):
        return [example.text]
    if isinstance(example, Conversation):
        messages = example.messages
    else:
        messages = (*example.prompt, *example.chosen, *example.rejected)
    return [message.content for message in messages if message.role == "user"]

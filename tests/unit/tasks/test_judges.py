"""A fire drill: hundreds of wrong answers for each task, near to the right one, and none earns anything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sprat import tasks
from sprat.config import TaskConfig
from sprat.pipeline.recipe import load_recipe

RECIPE = load_recipe("quickstart").data
ALL = (*RECIPE.tasks, *RECIPE.unseen)


def wrong(answer: str) -> Iterator[str]:
    """What is not ``answer``, though it holds it, begins or ends like it, or means it in another spelling."""
    number = int(answer)
    yield from (f"{digit}{answer}" for digit in "0123456789")
    yield from (f"{answer}{digit}" for digit in "0123456789")
    yield from (str(-number) if number else "-0", f"+{answer}", f"--{answer}", f"- {answer}")
    yield from (f"{answer}.0", f"{answer}.", f"0{answer}", f"{answer},000", f"{number:.1e}", f"{answer}e0")
    yield from (f"The answer is {answer}", f"{answer} legs", f"= {answer}", f"x = {answer}", f"({answer})")
    yield from (f"{answer} or {number + 1}", f"{number - 1}, {answer}", f"{answer} {answer}", f"{answer}\n{number + 1}")
    yield from (str(number + step) for step in (-10, -2, -1, 1, 2, 10))
    yield from (answer[1:], answer[:-1], answer[::-1] + "0", "", " ", "none", "<think>", f"\\boxed{{{answer}}}")


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.title)
def test_two_hundred_wrong_answers_earn_nothing(config: TaskConfig) -> None:
    task, tried = tasks.load(config), 0
    for problem in tasks.held_out_problems(task, 10, "dev"):
        assert task.score(problem, problem.answer) == task.score(problem, f" {problem.answer}\n") == 1.0
        for answer in {*wrong(problem.answer)} - {problem.answer}:
            assert task.score(problem, answer) == 0.0, (problem.question, problem.answer, answer)
            tried += 1
    assert tried >= 200


def test_part_of_the_marks_of_another_family_is_nothing_and_full_marks_are_one() -> None:
    """Where many answers are right its own scorer says which: words in any case, for example."""
    gym = pytest.importorskip("reasoning_gym")
    task = tasks.load(TaskConfig(name="reasoning-gym/sentence_reordering"))
    theirs = gym.create_dataset("sentence_reordering", size=1, seed=0)
    problem = task.problem("train", 0)
    words = problem.answer.split()
    near = " ".join([words[1], words[0], *words[2:]])
    assert 0.0 < theirs.score_answer(near, problem.meta["entry"]) < 1.0  # what it pays by itself
    assert task.score(problem, near) == 0.0 and task.score(problem, problem.answer) == 1.0

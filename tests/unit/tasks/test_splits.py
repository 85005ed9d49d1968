"""No problem is in two splits, in whatever words: forms by Python's own arithmetic on the question, not by our code."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from sprat import tasks
from sprat.config import TaskConfig
from sprat.road.recipe import named
from sprat.tasks import canonical

RECIPE = named("quickstart").data
ALL = (*RECIPE.tasks, *RECIPE.unseen)
Form = tuple[object, ...]


def signed(expression: str) -> Form:
    """The terms of a sum, each with the sign that is left of a 1 in its place when all others are 0."""
    numbers = [int(digits) for digits in re.findall(r"\d+", expression)]

    def value(place: int) -> int:
        here = iter(range(len(numbers)))
        return int(eval(re.sub(r"\d+", lambda _: str(int(next(here) == place)), expression.strip())))

    return tuple(sorted(value(place) * number for place, number in enumerate(numbers)))


def coefficients(equation: str) -> Form:
    """a, c and d of ``a*x + c = d`` from the left side's values for 0 and 1; a is positive."""
    left, right = equation.split("=")
    shift, moved = (int(eval(re.sub("[a-z]", f"({value})", left))) for value in (0, 1))
    sign = 1 if moved > shift else -1
    return sign * (moved - shift), sign * shift, sign * int(right)


def form(name: str, question: str) -> Form:
    """What is asked, read from the question alone."""
    if name.endswith("simple_equations"):
        return "equation", *coefficients(question.split(":")[-1])
    if name.endswith("gcd"):
        return "gcd", *sorted(map(int, re.findall(r"\d+", question)))
    if name.endswith("leg_counting"):
        from reasoning_gym.arithmetic.leg_counting import ANIMALS

        found = re.findall(r"(\d+) ([a-z ]+?)(?=,|\?)", question)
        each = {animal + plural: count for animal, count in ANIMALS.items() for plural in ("", "s")}
        return "legs", *sorted((int(count), each[animal]) for count, animal in found)
    return "sum", *signed(max(re.findall(r"[-+()\d\s]+", question), key=len))


def forms(config: TaskConfig, split: tasks.Split, count: int) -> Iterator[Form]:
    task = tasks.load(config)
    for index in range(count):
        yield form(config.name, task.problem(split, index).question)


def test_no_problem_of_one_split_is_in_another_in_other_words_or_in_another_task() -> None:
    pytest.importorskip("reasoning_gym")
    counts: dict[tasks.Split, int] = {"train": 400, "dev": 100, "test": 150}
    seen = {split: {each for config in ALL for each in forms(config, split, counts[split])} for split in counts}
    assert all(len(found) > 400 for found in seen.values())
    assert not seen["train"] & seen["dev"] and not seen["train"] & seen["test"] and not seen["dev"] & seen["test"]


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.title)
def test_two_held_out_problems_are_never_the_same_in_other_words(config: TaskConfig) -> None:
    task = tasks.load(config)
    for split in tasks.HELD_OUT:
        problems = tasks.held_out(task, 150, split)
        assert len(problems) == 150 == len({form(config.name, problem.question) for problem in problems})


@pytest.mark.slow
@pytest.mark.parametrize("config", RECIPE.tasks, ids=lambda config: config.title)
def test_a_task_has_a_thousand_test_problems(config: TaskConfig) -> None:
    assert len(tasks.held_out(tasks.load(config), 1000)) == 1000


def test_the_splits_have_their_shares() -> None:
    """Two in ten, one in ten: within four standard deviations of ten thousand forms."""
    found = [tasks.split_of(f"sum {number}") for number in range(10_000)]
    assert abs(found.count("test") - 2000) < 160 and abs(found.count("dev") - 1000) < 120


@pytest.mark.parametrize(
    "one, other",
    [
        ("4 - 1 - 7", "4 - ( 1 + 7 )"),
        ("-( 3 - 5 ) + 2", "2 + 5 - 3"),
        ("2 - -3", "3 + 2"),
        ("2 * ( 3 + 4 ) - 1", "-1 + ( 4 + 3 ) * 2"),
        ("-2 * 3", "2 * -3"),
    ],
)
def test_expressions_that_are_the_same_have_one_form(one: str, other: str) -> None:
    assert canonical.expression(one) == canonical.expression(other)


@pytest.mark.parametrize("one, other", [("4 - 1", "1 - 4"), ("2 * 3", "2 + 3"), ("12", "1 + 2"), ("6 / 3", "3 / 6")])
def test_expressions_that_are_not_have_two(one: str, other: str) -> None:
    assert canonical.expression(one) != canonical.expression(other)


def test_the_words_of_a_question_decide_where_nobody_wrote_a_form() -> None:
    one, other = (tasks.Problem("t", 0, question, "a") for question in ("Who  is\nit?", "who is it?"))
    assert one.canonical == other.canonical == "who is it?"

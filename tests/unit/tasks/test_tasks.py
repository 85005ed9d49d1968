"""Tasks: what they ask is theirs, what they explain is right, and what is held out stays held out."""

from __future__ import annotations

import re

import pytest

from sprat import tasks
from sprat.config import TaskConfig
from sprat.errors import DataError
from sprat.pipeline.recipe import load_recipe

ALL = [pytest.param(config, id=config.title) for config in load_recipe("quickstart").data.tasks]
FACT = re.compile(r"(-?\d+)([-+*/%])(-?\d+)=(-?\d+)")


def value(left: int, sign: str, right: int) -> int:
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    return left // right if sign == "/" else left % right


@pytest.mark.parametrize("config", ALL)
def test_every_step_of_an_explanation_is_a_true_fact_and_leads_to_the_answer(config: TaskConfig) -> None:
    task = tasks.load(config)
    for index in range(100):
        problem = task.problem("train", index)
        lines = task.chain_of_thought(problem).splitlines()
        for line in lines:
            fact = FACT.fullmatch(line)
            if fact:
                assert value(int(fact[1]), fact[2], int(fact[3])) == int(fact[4]), (problem.question, line)
        last = lines[-1]
        told = re.findall(r"-?\d+", last.replace("%", "="))
        assert problem.answer in told, (problem.question, last, problem.answer)


def test_problems_are_a_function_of_split_and_index() -> None:
    task = tasks.load(TaskConfig(name="sums"))
    again = tasks.load(TaskConfig(name="sums"))
    assert [task.problem("train", i) for i in range(20)] == [again.problem("train", i) for i in reversed(range(20))][
        ::-1
    ]


@pytest.mark.parametrize("split, other", [("test", "dev"), ("dev", "test")])
def test_drawn_keeps_its_problems_and_trains_on_others(split: tasks.Split, other: tasks.Split) -> None:
    task = tasks.load(TaskConfig(name="sums"))
    kept = tuple(tasks.held_out_problems(task, 5, split))
    drawn = tasks.HeldOutTask(task, kept, split)
    assert tasks.held_out_problems(drawn, 5, split) == list(kept) != tasks.held_out_problems(drawn, 5, other)
    assert drawn.problem("train", 1) == task.problem("train", 1)
    assert drawn.score(kept[0], kept[0].answer) == 1.0 and drawn.chain_of_thought(kept[0]) == task.chain_of_thought(
        kept[0]
    )


@pytest.mark.parametrize(
    "config, word",
    [
        (TaskConfig(name="no-such-task"), "no task"),
        (TaskConfig(name="sums", settings={"terms": 3}), "terms"),
        (TaskConfig(name="sums", settings={"min_terms": 5, "max_terms": 3}), "no sum"),
        (TaskConfig(name="reasoning-gym/no_such_family"), "no_such_family"),
        (TaskConfig(name="reasoning-gym/chain_sum", settings={"min_terms": -1}), "chain_sum"),
    ],
)
def test_a_wrong_task_is_one_clear_sentence(config: TaskConfig, word: str) -> None:
    with pytest.raises(DataError, match=word):
        tasks.load(config)


def test_a_task_without_a_question_in_a_split_says_so() -> None:
    task = tasks.load(TaskConfig(name="sums", settings={"min_terms": 1, "max_terms": 1, "max_value": 1}))
    empty: tasks.Split = "test" if tasks.split_of("sum 1") == "train" else "train"
    with pytest.raises(DataError, match="draws"):
        task.problem(empty, 0)


def test_a_family_without_a_chain_says_which_have_one() -> None:
    task = tasks.load(TaskConfig(name="reasoning-gym/count_bits"))
    with pytest.raises(DataError, match="chain_sum"):
        task.chain_of_thought(task.problem("train", 0))

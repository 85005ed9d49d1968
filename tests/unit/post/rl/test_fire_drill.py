"""A grader that pays for hacks does not start a run; a sound one is not held up."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.grading import graders
from sprat import tasks
from sprat.config import TaskConfig
from sprat.errors import TrainingError
from sprat.post.rl.fire_drill import fire_drill, run_drill
from sprat.post.rl.rewards import Response, Verifier, accuracy_reward
from sprat.tasks import Problem

TASK = tasks.load(TaskConfig(name="sums"))
PROBLEMS = [TASK.problem("train", index) for index in range(24)]


@pytest.mark.parametrize("name", graders.BAD)
def test_a_grader_that_pays_a_hack_is_refused_by_a_sentence_that_shows_it(name: str) -> None:
    with pytest.raises(TrainingError, match=r"(?s)pays .* for the wrong answer .* to 'What is .*fire drill") as raised:
        fire_drill(graders.BAD[name], PROBLEMS)
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize("name", graders.GOOD)
def test_a_sound_grader_passes(name: str) -> None:
    drill = fire_drill(graders.GOOD[name], PROBLEMS)
    assert drill.num_hacks > 300 and drill.right_paid == drill.num_problems and not drill.warning


def test_our_own_judges_pass() -> None:
    drill = fire_drill(accuracy_reward(TASK), PROBLEMS)
    assert drill.right_paid == drill.num_problems and not drill.chance


def test_choices_all_at_once_are_a_hack() -> None:
    def any_letter(problem: Problem, answer: Response) -> float:
        return float(problem.answer in answer.content.split("\n")[-1].replace(",", " ").split())

    problems = [
        Problem("choice", index, f"Which is {index}?\n\nA. one\nB. two\nC. three", "ABC"[index % 3])
        for index in range(9)
    ]
    drill = run_drill(any_letter, problems)
    assert "all choices" in drill.failure


def test_a_grader_that_pays_nothing_is_let_pass_with_a_warning() -> None:
    drill = fire_drill(lambda problem, answer: 0.0, PROBLEMS)
    assert "no right answer" in drill.warning


def test_one_hit_is_chance_and_two_are_not() -> None:
    def generous(problem: Problem, answer: Response) -> float:
        lucky = problem.question in {other.question for other in PROBLEMS[:count]}
        return float(answer.content.strip() == problem.answer or (lucky and answer.content == "NaN"))

    count = 1
    drill = fire_drill(generous, PROBLEMS)
    assert [hack.answer for hack in drill.chance] == ["NaN"]
    count = len(PROBLEMS)
    with pytest.raises(TrainingError, match="NaN"):
        fire_drill(generous, PROBLEMS)


def test_a_grader_that_pays_by_chance_is_said_to() -> None:
    chance = random.Random(3)
    with pytest.raises(TrainingError, match=r"judged \d+ of \d+ answers otherwise when it was asked again .*by chance"):
        fire_drill(lambda problem, answer: float(chance.random() < 0.5), PROBLEMS)


def test_a_grader_that_sees_the_whole_text_sees_what_a_model_would_write() -> None:
    seen = set[str]()

    def form(problem: Problem, answer: Response) -> float:
        seen.add(answer.text)
        return float(answer.content.strip() == problem.answer)

    fire_drill(form, PROBLEMS[:2], think_tags=None)
    assert PROBLEMS[0].answer in seen
    seen.clear()
    fire_drill(form, PROBLEMS[:2])
    assert all(re.fullmatch(r"(?s)<think>.+</think>.*", text) for text in seen)


def test_a_grader_that_only_fails_is_named() -> None:
    def broken(problem: Problem, answer: Response) -> float:
        raise KeyError("answer")

    with pytest.raises(TrainingError, match="KeyError"):
        fire_drill(Verifier(broken), PROBLEMS)


def test_a_grader_that_fails_on_some_answers_is_told_how() -> None:
    def fragile(problem: Problem, answer: Response) -> float:
        return float(int(answer.content) == int(problem.answer))  # raises on whatever is no number

    drill = fire_drill(Verifier(fragile), PROBLEMS)
    assert drill.faults > 100 and re.search(r"failed on \d+ answers.*ValueError: invalid literal", drill.warning)


def test_a_slow_grader_is_tried_with_less() -> None:
    def slow(problem: Problem, answer: Response) -> float:
        time.sleep(0.0005)
        return float(answer.content.strip() == problem.answer)

    quick = run_drill(slow, PROBLEMS, max_seconds=0.0)
    assert quick.num_hacks < run_drill(slow, PROBLEMS).num_hacks / 2 and not quick.failure


def test_abstaining_is_not_paying() -> None:
    drill = run_drill(lambda problem, answer: None, PROBLEMS)
    assert not drill.failure and drill.right_paid == 0


def test_the_example_of_the_page_runs() -> None:
    page = (Path(__file__).parents[4] / "docs" / "rl-graders.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

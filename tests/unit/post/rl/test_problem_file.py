"""A file of questions is read in the columns that people of TRL, verl and OpenRLHF have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sprat.config.rl import HeldOutConfig
from sprat.errors import DataError
from sprat.eval.tasks import problem_messages
from sprat.model import Transformer
from sprat.post.rl.problem_file import ProblemFile, read_problems
from sprat.post.rl.problem_mix import ProblemMix, split_task, split_tasks
from sprat.post.rl.run_preparation import fit_part
from sprat.tasks import Problem, Sums, read_task
from sprat.tokens import Message, Tokenizer, render

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]


def read(folder: Path, rows: list[dict[str, Any]], column_map: dict[str, str] | None = None) -> ProblemFile:
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_problems(path, column_map)


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"question": "2+2?", "answer": "4"}, "2+2?", "4"),
        ({"prompt": "2+2?", "solution": "4"}, "2+2?", "4"),
        ({"prompt": TURNS, "ground_truth": 4}, "Be brief.\n\n2+2?", 4),
        ({"problem": "2+2?", "solution": "4", "level": 1}, "2+2?", "4"),
        ({"messages": TURNS, "label": ["4", "four"]}, "Be brief.\n\n2+2?", ["4", "four"]),
        (
            {"prompt": TURNS[1:], "reward_model": {"style": "rule", "ground_truth": "4"}, "data_source": "x"},
            "2+2?",
            "4",
        ),
        ({"question": "2+2?"}, "2+2?", None),
        ({"question": "2+2?", "answer": {"tests": ["f(2) == 4"]}}, "2+2?", {"tests": ["f(2) == 4"]}),
    ],
)
def test_the_columns_of_other_trainers_are_read(
    row: dict[str, Any], question: str, answer: Any, tmp_path: Path
) -> None:
    (problem,) = read(tmp_path, [row]).problems
    assert problem.question == question and problem.meta["answer_data"] == answer and problem.meta["row"] == row
    turns = [(message.role, message.content) for message in problem_messages(problem)]
    assert turns == [(turn["role"], turn["content"]) for turn in (TURNS if "brief" in question else TURNS[1:])]


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    rows = [{"Frage": "2+2?", "Lösung": "4", "prompt": "not this"}]
    (problem,) = read(tmp_path, rows, {"question": "Frage", "answer": "Lösung"}).problems
    assert (problem.question, problem.answer) == ("2+2?", "4")
    with pytest.raises(DataError, match="no column 'frage'"):
        read(tmp_path, rows, {"prompt": "frage"})
    with pytest.raises(DataError, match="map question, answer"):
        read(tmp_path, rows, {"completion": "Frage"})


def test_what_is_no_question_or_was_asked_before_is_left_out_and_counted(tmp_path: Path) -> None:
    file = read(tmp_path, [{"question": "a?"}, {"answer": "4"}, {"question": " A? "}, {"question": "b?"}])
    assert [problem.question for problem in file.problems] == ["a?", "b?"]
    assert sum(each["count"] for each in file.skipped) == 2
    with pytest.raises(DataError, match="no question to train on.*--map question"):
        read(tmp_path, [{"x": "y"}])


def test_a_row_is_known_by_its_id_or_else_its_place_in_text_that_can_be_written(tmp_path: Path) -> None:
    ids: list[Any] = [None, "", 7, "half a smile \ud83d", "é"]
    rows = [{"question": f"{n}?", "id": each} for n, each in enumerate(ids)]
    file = read(tmp_path, [*rows, {"question": "none?"}])
    assert [each.meta["id"] for each in file.problems] == ["0", "1", "7", "half a smile ?", "é", "5"]


def test_rows_that_say_so_are_held_out(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "split": "test" if n < 3 else "train"} for n in range(10)]
    part = split_task(read(tmp_path, rows), HeldOutConfig())
    assert sorted(problem.question for problem in part.held_out) == ["0?", "1?", "2?"]
    assert part.problems is not None and len(part.problems) == 7
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row | {"answer": "x"}) + "\n" for row in rows))
    task = split_task(read_task(tmp_path / "task.jsonl"), HeldOutConfig())
    assert {problem.question for problem in task.held_out} == {"0?", "1?", "2?"}


def test_else_a_share_is_by_what_a_question_says_and_no_group_is_asked_one(tmp_path: Path) -> None:
    rows = [{"question": f"question {n}"} for n in range(50)]
    part = split_task(read(tmp_path, rows), HeldOutConfig(share=0.2))
    again = split_task(read(tmp_path, rows[::-1]), HeldOutConfig(share=0.2))
    held_out = {problem.question for problem in part.held_out}
    assert len(held_out) == 10 and held_out == {problem.question for problem in again.held_out}
    mix = ProblemMix([part], seed=5)
    asked = [mix.problem(group)[1].question for group in range(80)]
    assert not held_out & set(asked)
    assert sorted(asked[:40]) == sorted(asked[40:]) and len(set(asked[:40])) == 40, "each once, then each again"
    assert asked[:40] != asked[40:]
    other = ProblemMix([part], seed=5)
    assert [other.problem(group)[1].question for group in reversed(range(80))] == asked[::-1], (
        "a function of the number"
    )
    assert [ProblemMix([part], seed=6).problem(group)[1].question for group in range(40)] != asked[:40]
    few = split_task(read(tmp_path, rows), HeldOutConfig(share=0.5, problems=4))
    assert few.problems is not None and (len(few.held_out), len(few.problems)) == (4, 46)
    assert not split_task(read(tmp_path, rows), HeldOutConfig(share=0)).held_out


class Repeating:
    """A generator whose splits are the same questions."""

    name = "repeating"

    def __init__(self, count: int = 4) -> None:
        self.count = count

    def problem(self, split: str, index: int) -> Problem:
        return Problem(self.name, index, f"question {index % self.count}", "7")

    def score(self, problem: Problem, answer: str | None) -> float:
        return 1.0

    def chain_of_thought(self, problem: Problem) -> str:
        return ""


def test_a_generator_is_never_trained_on_what_is_held_out() -> None:
    part = split_task(Repeating(), HeldOutConfig(problems=2))  # type: ignore[arg-type]
    held_out = {problem.question for problem in part.held_out}
    mix = ProblemMix([part], 0)
    assert len(held_out) == 2 and not held_out & {mix.problem(group)[1].question for group in range(40)}
    with pytest.raises(DataError, match="held-out ones"):
        ProblemMix([split_task(Repeating(), HeldOutConfig(problems=4))], 0).problem(0)  # type: ignore[arg-type]
    sums = split_task(Sums("sums"), HeldOutConfig(problems=5))
    assert sums.problems is None and len(sums.held_out) == 5


class Wordy(Repeating):
    """Two of three questions are as long as ``words``."""

    words = 400

    def problem(self, split: str, index: int) -> Problem:
        question = super().problem(split, index).question + (" again" * self.words if index % 3 else "")
        return Problem(self.name, index, question, "7")


def test_a_generator_is_not_asked_for_what_leaves_no_room_for_an_answer(
    guesser: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    task, room = Wordy(90), guesser.config.context - 10
    part = fit_part(split_task(task, HeldOutConfig(problems=30)), tokenizer, guesser, 10)  # type: ignore[arg-type]
    mix = ProblemMix([part], 0)
    asked = [mix.problem(number)[1] for number in range(40)] + list(part.held_out)
    lengths = [len(render(tokenizer, [Message("user", problem.question)])) for problem in asked]
    assert len(part.held_out) == 10 and max(lengths) <= room
    with pytest.raises(DataError, match="leave no room for an answer"):
        ProblemMix([fit_part(part, tokenizer, guesser, room + 9)], 0).problem(0)


def test_what_one_file_holds_out_no_other_one_trains(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    rows = [[{"question": f"question {n}"} for n in numbers] for numbers in (range(30), range(15, 60))]
    for folder in folders:
        folder.mkdir()
    files = [read(folder, own) for folder, own in zip(folders, rows, strict=True)]
    for tasks in (files, files[::-1], [*files, Repeating(90)]):
        parts = split_tasks(tasks, HeldOutConfig(problems=20))  # type: ignore[arg-type]
        mix = ProblemMix(parts, 0)
        held_out = {problem.canonical for _, problem in mix.held_out}
        assert len(parts[0].held_out) > 3 and not held_out & {mix.problem(n)[1].canonical for n in range(300)}
    with pytest.raises(DataError, match="held out by another"):
        split_tasks([read(folders[0], rows[0][:1]), Repeating()], HeldOutConfig(problems=4))  # type: ignore[list-item]

"""A user's file of questions is a task, and what is wrong with it is one sentence with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sprat import tasks
from sprat.errors import DataError

QUESTION = {"question": "What is 2 + 3?", "answer": "5"}
CHOICE = {"question": "Capital?", "choices": ["Rome", "Paris"], "answer": "B"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_each_row_is_judged_as_it_says(tmp_path: Path) -> None:
    task = tasks.read_task(
        write(
            tmp_path / "mine.jsonl",
            {"judge": "numeric", "rel_tol": 0.01},
            {"id": "sum", "question": "100 + 100?", "answer": 200, "level": "easy"},
            {"question": "And in words?", "answer": ["two hundred", "200"], "judge": "exact", "ignore_case": True},
            CHOICE,
            {"question": "A date?", "answer": r"\d{4}-\d\d-\d\d", "judge": "regex"},
            {"question": "A list?", "answer": {"type": "array"}, "judge": "json_schema"},
        )
    )
    problems = task.problems["test"]
    assert task.name == "mine" and len(problems) == 5
    assert [problem.meta["id"] for problem in problems] == ["sum", "3", "4", "5", "6"]
    answers = ["It is 202.", "Two Hundred", "(B)", "2026-11-29", "[1, 2]"]
    assert [task.score(problem, answer) for problem, answer in zip(problems, answers, strict=True)] == [1.0] * 5
    wrong = ["203", "two", "A", "2026", "{}"]
    assert [task.score(problem, answer) for problem, answer in zip(problems, wrong, strict=True)] == [0.0] * 5
    assert task.score(problems[0], None) == 0.0
    assert problems[2].question.endswith("A. Rome\nB. Paris\n\nAnswer with the letter of the right choice.")


@pytest.mark.parametrize(("answer", "right"), [(1, "B"), ("B", "B"), ("b", "Paris"), ("Paris", "B. Paris"), (0, "A")])
def test_a_choice_is_given_by_place_letter_or_text(answer: Any, right: str, tmp_path: Path) -> None:
    task = tasks.read_task(write(tmp_path / "t.jsonl", {**CHOICE, "answer": answer}))
    assert task.score(task.problem("test", 0), right) == 1.0


def test_numbers_are_compared_by_value_where_nothing_is_said(tmp_path: Path) -> None:
    task = tasks.read_task(write(tmp_path / "t.jsonl", {"question": "half?", "answer": 0.5}, QUESTION))
    half, five = task.problems["test"]
    assert task.score(half, "1/2") == 1.0 and task.score(five, "5.0") == 0.0


def test_all_rows_are_test_unless_they_say_otherwise(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": "a", "split": split} for n, split in enumerate(["train", "dev", "test"])]
    task = tasks.read_task(write(tmp_path / "t.jsonl", *rows, QUESTION))
    by_split = {split: [problem.question for problem in task.problems[split]] for split in ("train", "dev", "test")}
    assert by_split == {"train": ["q0"], "dev": ["q1"], "test": ["q2", "What is 2 + 3?"]}
    assert [problem.question for problem in tasks.held_out_problems(task, 9)] == by_split["test"]
    alone = tasks.read_task(write(tmp_path / "t.jsonl", QUESTION))
    with pytest.raises(DataError, match="no train problem"):
        alone.problem("train", 0)


def test_a_conversation_is_asked_as_it_stands(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital?"}]
    path = write(tmp_path / "t.jsonl", {**CHOICE, "messages": messages, "question": None})
    with pytest.raises(DataError, match="both question and messages"):
        tasks.read_task(path)
    task = tasks.read_task(write(tmp_path / "t.jsonl", {"messages": messages, "answer": "Rome"}))
    assert task.problem("test", 0).meta["messages"] == messages


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n", "\r\n\r\n", ""])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_marks_and_line_ends_of_editors_say_nothing(mark: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    second = json.dumps({"question": "caf\u00e9\u2028?", "answer": "x"}, ensure_ascii=False)
    path.write_bytes((mark + json.dumps(QUESTION) + (ending or "\n") + second + ending).encode("utf-8"))
    questions = [problem.question for problem in tasks.read_task(path).problems["test"]]
    assert questions == ["What is 2 + 3?", "caf\u00e9\u2028?"]


FAULTS: list[tuple[Any, str]] = [
    ({"answer": "5"}, "no question"),
    ({"question": "q"}, "no answer"),
    ({"question": "q", "answer": None}, "no answer"),
    ({"question": "q", "answer": ""}, "no answer"),
    ({"question": "q", "answer": []}, "no answer"),
    ({"question": "q", "answer": " "}, "answer is no text"),
    ({"question": "q", "answer": True}, "answer is no text"),
    ({"question": "q", "answer": {"a": 1}}, "answer is no text"),
    ({"question": "q", "answer": ["a", None]}, "answer is no text"),
    ({"question": "", "answer": "a"}, "blank"),
    ({"question": 7, "answer": "a"}, "question is no text"),
    ({"question": "q", "answer": "a", "judge": "llm"}, "unknown judge 'llm'"),
    ({"question": "q", "answer": "a", "judge": ["exact"]}, "unknown judge"),
    ({"question": "q", "answer": "a", "judge": None}, "unknown judge"),
    ({"question": "q", "answer": "seven", "judge": "numeric"}, "not one number"),
    ({"question": "q", "answer": "7 or 8", "judge": "numeric"}, "not one number"),
    ({"question": "q", "answer": 7, "rel_tol": -1}, "rel_tol"),
    ({"question": "q", "answer": 7, "rel_tol": "1%"}, "rel_tol"),
    ({"question": "q", "answer": 7, "extract": "first"}, "unknown extract"),
    ({"question": "q", "answer": "a", "rel_tol": 0.1}, "says nothing to the judge 'exact'"),
    ({"question": "q", "answer": "a", "ignore_case": "yes"}, "ignore_case"),
    ({"question": "q", "answer": "(", "judge": "regex"}, "no regular expression"),
    ({"question": "q", "answer": ["a"], "judge": "regex"}, "no regular expression"),
    ({"question": "q", "answer": "{}", "judge": "json_schema"}, "no JSON schema"),
    ({"question": "q", "answer": {"type": 1}, "judge": "json_schema"}, "no JSON schema"),
    ({"question": "q", "answer": "a", "judge": "choice"}, "no choices"),
    ({**CHOICE, "choices": "AB"}, "no list of texts"),
    ({**CHOICE, "choices": ["Rome", 2]}, "no list of texts"),
    ({**CHOICE, "choices": ["Rome"]}, "1 choices"),
    ({**CHOICE, "choices": ["Rome", "Rome"]}, "same"),
    ({**CHOICE, "answer": "C"}, "none of the choices"),
    ({**CHOICE, "answer": 2}, "no choice of place 2"),
    ({**CHOICE, "answer": -1}, "no choice of place -1"),
    ({**CHOICE, "answer": 1.0}, "none of the choices"),
    ({"question": "q", "choices": ["1", "2"], "answer": 1}, "may be a place from 0 or a text"),
    ({**CHOICE, "judge": "exact"}, "choices says nothing"),
    ({"question": "q", "answer": "a", "split": "validation"}, "unknown split"),
    ({"question": "q", "answer": "a", "id": 1.5}, "id is no text"),
    ({"question": "q", "answer": "a", "id": ""}, "id is no text"),
    ({"question": "q", "anwser": "a"}, "unknown field 'anwser'"),
    ({"question": "q", "answer": "a", "Judge": "exact"}, "unknown field 'Judge'"),
    ({"messages": [], "answer": "a"}, "no list of turns"),
    ({"messages": "q", "answer": "a"}, "no list of turns"),
    ({"messages": [{"role": "tool", "content": "q"}], "answer": "a"}, "not a role"),
    ({"messages": [{"role": "user", "content": ""}], "answer": "a"}, "blank"),
    ({"messages": [{"role": "assistant", "content": "q"}], "answer": "a"}, "not the user's"),
    ({"question": "what is  2 + 3?", "answer": "6"}, "the question of line 1 again"),
    ({"id": "1", "question": "q", "answer": "a"}, "the id of line 1 again"),
    ({}, "no question"),
    ([1], "not a JSON object"),
    ("text", "not a JSON object"),
]


@pytest.mark.parametrize(("row", "word"), FAULTS)
def test_a_row_that_does_not_hold_is_named_with_its_line(row: Any, word: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", QUESTION, row)
    with pytest.raises(DataError) as caught:
        tasks.read_task(path)
    sentence = str(caught.value)
    assert word in sentence and f"{path}, line 2" in sentence and sentence.count("\n") == 0


@pytest.mark.parametrize(
    ("content", "word", "line"),
    [
        ('{"question": "café", "answer": "a"}'.encode("latin-1"), "not UTF-8", 2),
        (b'{"question": "q"', "no JSON", 2),
        (b'{"question": "q", "answer": NaN}', "NaN", 2),
        (b'{"question": "q", "answer": "a", "answer": "b"}', "twice", 2),
        (b'{"question": "q", "answer": "\\ud800"}', "surrogate", 2),
        (b"[" * 20000, "no JSON", 2),
        (b"question,answer\nq,a", "no JSON", 2),
        (b"\x00\x01", "no JSON", 2),
        (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "no JSON", 2),
    ],
)
def test_what_is_no_jsonl_is_named_with_its_line(content: bytes, word: str, line: int, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(json.dumps(QUESTION).encode() + b"\n" + content)
    with pytest.raises(DataError) as caught:
        tasks.read_task(path)
    assert word in str(caught.value) and f"line {line}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "no row"), (b"\n\n", "no row"), (b'{"judge": "exact"}\n', "no row"), ("{}".encode("utf-16"), "UTF-16")],
)
def test_a_file_without_rows_says_so(content: bytes, word: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=word):
        tasks.read_task(path)


def test_the_page_shows_files_that_hold(root: Path, tmp_path: Path) -> None:
    page = (root / "docs" / "evaluate.md").read_text(encoding="utf-8")
    (tmp_path / "t.jsonl").write_text("\n".join(line for line in page.splitlines() if line.startswith("    {")))
    problems = tasks.read_task(tmp_path / "t.jsonl").problems["test"]
    answers = ["about 4.8", "B", "Red", "5"]
    judged = [
        tasks.read_task(tmp_path / "t.jsonl").score(problem, answer)
        for problem, answer in zip(problems, answers, strict=True)
    ]
    assert judged == [1.0] * 4
    (tmp_path / "file.py").write_text(page.split("```python\n")[1].split("```")[0])
    task = tasks.load_class_task(f"{tmp_path}/file.py:Doubles")
    assert task.num_problems == 50 and task.score(task.problem("test", 4), "8") == 1.0


def test_no_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        tasks.load_user_task(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        tasks.read_task(tmp_path)


def test_questions_that_stand_in_training_text_are_named(tmp_path: Path) -> None:
    rows = [
        {"question": "Who wrote  Moby-Dick?", "answer": "Melville"},
        {"question": "What is 2 + 3?", "answer": "5"},
        CHOICE,
        {"question": "法国的首都是哪里？", "answer": "巴黎"},
        {"question": "Which of the seven seas is the one that sprats like best of all?", "answer": "North"},
    ]
    problems = tasks.read_task(write(tmp_path / "t.jsonl", *rows)).problems["test"]

    def found(*texts: str) -> list[int]:
        return [problem.index for problem in tasks.overlap(problems, texts)]

    assert found() == found("", "wrote moby", "What is 2 - 3?", "what is 2 + 35?", "somewho wrote moby dick") == []
    assert found("He asked: **WHO**\nwrote \u201cMoby Dick\u201d!") == [0]
    assert found("capital", "x what is 2+3 y") == [1, 2]
    assert found("问：法国的首都是哪里?答") == [3]
    assert found("Which of the seven seas is the one that sprats like best") == []
    assert found("which of the seven seas is the one that sprats like best of all") == [4]

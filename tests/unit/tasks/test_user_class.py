"""A user's own class is a task, and its faults end no evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from sprat import tasks
from sprat.errors import ConfigError, DataError
from sprat.tasks import user_class

GOOD = """
from sprat.tasks import Problem

class Doubles:
    name = "doubles"
    def __len__(self):
        return 7
    def problem(self, split, index):
        return Problem("doubles", index, f"Twice {index}?", str(2 * index))
    def score(self, problem, answer):
        return answer.strip() == problem.answer
"""


def load(path: Path, code: str, name: str = "Doubles") -> tasks.UserClassTask:
    path.write_text(code, encoding="utf-8")
    return tasks.load_class_task(f"{path}:{name}")


def test_a_class_asks_and_judges(tmp_path: Path) -> None:
    task = load(tmp_path / "mine.py", GOOD)
    problem = task.problem("test", 4)
    assert (task.name, task.num_problems, problem.question) == ("doubles", 7, "Twice 4?")
    assert [task.score(problem, answer) for answer in (" 8\n", "9", None)] == [1.0, 0.0, 0.0]
    assert isinstance(tasks.load_user_task(f"{tmp_path}/mine.py:Doubles"), tasks.UserClassTask)
    task.check_faults()


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("raise ValueError('ugly')", "ValueError: ugly"),
        ("raise SystemExit(1)", "SystemExit"),
        ("return 2", "not from 0 to 1"),
        ("return -0.5", "not from 0 to 1"),
        ("return 'yes'", "no number"),
        ("return None", "no number"),
        ("return float('nan')", "not finite"),
        ("\n        while True: pass", "took longer"),
    ],
)
def test_a_score_that_fails_is_a_wrong_answer_and_counted(
    body: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_class, "TIMEOUT_SECONDS", 0.1)
    task = load(tmp_path / "mine.py", GOOD.replace("return answer.strip() == problem.answer", body))
    assert task.score(task.problem("test", 1), "2") == 0.0
    assert task.faults == 1 and fault in task.last_fault
    with pytest.raises(DataError, match="failed on each of 1 answers"):
        task.check_faults()


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("raise KeyError('x')", "KeyError"),
        ("return 'What?'", "returned str"),
        ("return Problem('t', index, ' ', 'a')", "without a question"),
        ("return Problem('t', index, 'q', 7)", "no problem"),
    ],
)
def test_what_is_no_problem_is_one_sentence(body: str, word: str, tmp_path: Path) -> None:
    code = GOOD.replace('return Problem("doubles", index, f"Twice {index}?", str(2 * index))', body)
    with pytest.raises(DataError, match=word):
        load(tmp_path / "mine.py", code).problem("test", 0)


@pytest.mark.parametrize(
    ("code", "name", "word"),
    [
        (GOOD, "Triples", "no class 'Triples'"),
        ("Doubles = 7", "Doubles", "not a class"),
        ("class Doubles: pass", "Doubles", "no method problem"),
        (GOOD.replace("def score(self, problem, answer)", "def score(self)"), "Doubles", "no method score"),
        (GOOD + "    def __init__(self, x): pass", "Doubles", "making Doubles raised TypeError"),
        ("1 / 0", "Doubles", "ZeroDivisionError"),
        ("import no_such_package_at_all", "Doubles", "no module 'no_such_package_at_all'"),
        ("class (", "Doubles", "SyntaxError"),
    ],
)
def test_a_class_that_is_no_task_is_refused_before_anything_runs(
    code: str, name: str, word: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=word):
        load(tmp_path / "mine.py", code, name)


@pytest.mark.parametrize("source", ["mine.py:", ":Doubles", "none.py:Doubles", "no_module_of_this_name:Doubles"])
def test_a_name_that_leads_nowhere_is_one_sentence(source: str) -> None:
    with pytest.raises(ConfigError):
        tasks.load_user_task(source)

"""A model answers a user's own files, and every problem's result is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sprat.engine import Engine
from sprat.errors import DataError
from sprat.eval.comparison import compare
from sprat.eval.task_files import evaluate_task_files
from sprat.model import Transformer
from sprat.tokens import Tokenizer

CLASS = """
from sprat.tasks import Problem

class Length:
    def problem(self, split, index):
        return Problem("length", index, f"{split} {index % 5}", "even")
    def score(self, problem, answer):
        return float(len(answer) % 2 == 0)

class Twins(Length):
    def problem(self, split, index):
        return Problem("twins", index, f"{split} {index % 5}", "even", {"id": index % 2})

class Broken(Length):
    def score(self, problem, answer):
        raise RuntimeError("no")
"""


@pytest.fixture
def engine(model: Transformer, tokenizer: Tokenizer) -> Engine:
    """The tiny model, asked in batches."""
    return Engine(model, tokenizer, max_batch=32)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ANY = {"question": "1 2", "answer": "(?s).*", "judge": "regex", "id": "any"}
NONE = {"question": "2 1", "answer": "7" * 40, "id": "none"}
TURNS = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "7"}, {"role": "user", "content": "2"}]
TALK = {"messages": TURNS, "answer": "(?s).+", "judge": "regex", "id": "talk"}


def test_each_file_is_scored_by_its_rows(engine: Engine, tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", ANY, NONE), write(tmp_path / "b.jsonl", NONE, TALK)
    scores = evaluate_task_files(engine, [first, second], max_tokens=5, thinking=False)
    assert [score.task for score in scores] == ["a", "b"]
    assert [[problem.id for problem in score.problems] for score in scores] == [["any", "none"], ["none", "talk"]]
    by_id = {problem.id: problem for score in scores for problem in score.problems}
    assert by_id["none"].correct == 0 and by_id["any"].correct == bool(by_id["any"].answers[0].strip())
    assert all(1 <= problem.mean_tokens <= 5 for problem in by_id.values())
    assert json.loads(json.dumps([score.to_dict() for score in scores]))[0]["problems"][0]["id"] == "any"
    alone = evaluate_task_files(engine, [second], max_tokens=5, thinking=False)
    assert alone == scores[1:] and compare(alone[0], scores[1]).difference == 0.0


def test_samples_are_drawn_by_the_seed_and_give_pass_at_k(engine: Engine, tmp_path: Path) -> None:
    rows = [{"question": f"{n}", "answer": "[^7]*", "judge": "regex"} for n in range(6)]
    path = write(tmp_path / "a.jsonl", *rows)

    def run(seed: int) -> Any:
        return evaluate_task_files(engine, [path], samples=4, temperature=1.0, max_tokens=4, thinking=False, seed=seed)[
            0
        ]

    score = run(1)
    assert score.samples == 4 and score.count == 6 and run(1) == score != run(2)
    assert score.pass_at_k(1) == pytest.approx(score.accuracy) and score.pass_at_k(4) >= score.accuracy
    with pytest.raises(DataError, match="temperature"):
        evaluate_task_files(engine, [path], samples=4)


def test_a_class_is_asked_different_problems(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CLASS, encoding="utf-8")
    score = evaluate_task_files(engine, [f"{tmp_path}/mine.py:Length"], max_tokens=4, thinking=False)[0]
    assert (score.task, score.count, score.faults) == ("Length", 5, 0) and len(score.digest) == 64
    few = evaluate_task_files(engine, [f"{tmp_path}/mine.py:Length"], max_tokens=4, thinking=False, count=2)[0]
    assert few.problems == score.problems[:2]
    with pytest.raises(DataError, match="one id"):
        evaluate_task_files(engine, [f"{tmp_path}/mine.py:Twins"], max_tokens=4, thinking=False)
    with pytest.raises(DataError, match="failed on each"):
        evaluate_task_files(engine, [f"{tmp_path}/mine.py:Broken"], max_tokens=4, thinking=False)


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([{"question": "1 2 " * 80, "answer": "a", "id": "long"}], "problem long"),
        ([{**NONE, "split": "train"}], "no test problem"),
        ([NONE, {"question": "q"}], "no answer"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is(
    rows: list[dict[str, Any]], word: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(engine, "generate", lambda *args: asked.append(args))
    with pytest.raises(DataError, match=word):
        evaluate_task_files(engine, [write(tmp_path / "a.jsonl", ANY), write(tmp_path / "b.jsonl", *rows)])
    assert not asked


def test_two_tasks_of_one_name_and_none_are_refused(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    paths = [write(tmp_path / "a.jsonl", ANY), write(tmp_path / "x" / "a.jsonl", ANY)]
    with pytest.raises(DataError, match="one name"):
        evaluate_task_files(engine, paths)
    with pytest.raises(DataError, match="no task"):
        evaluate_task_files(engine, [])

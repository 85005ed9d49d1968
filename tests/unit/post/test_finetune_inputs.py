"""What a run was made of decides whether it is done: another map of columns, or other code, is another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sprat.config.finetune import FinetuneConfig
from sprat.config.teach import TracesConfig
from sprat.errors import ConfigError
from sprat.post.collect import collect_traces
from sprat.post.finetune import finetune
from sprat.post.teachers import Limits
from sprat.trust.verify import verify
from tests.unit.post.fake_teacher import completion, fake_teacher, reply

CONFIG = FinetuneConfig.model_validate({"steps": 1, "seq_len": 64, "eval": {"samples": 0, "max_tokens": 2}})
TASK = """
from judge import MARK
from sprat.tasks import Problem

class Doubles:
    name = "doubles"
    def __len__(self):
        return 2
    def problem(self, split, index):
        return Problem(self.name, index, f"Twice {index}?", str(2 * index))
    def score(self, problem, answer):
        return MARK

class Others(Doubles):
    def score(self, problem, answer):
        return 1.0 - MARK
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    rows = [{"prompt": str(number), "good": "7", "bad": "8"} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_another_column_learned_is_another_run(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "mine"
    first = finetune(base, data, out, CONFIG, column_map={"completion": "good"})
    assert finetune(base, data, out, CONFIG, column_map={"completion": "good"}).done and first.set_aside is None
    other = finetune(base, data, out, CONFIG, column_map={"completion": "bad"})
    assert other.set_aside is not None, "the run on the other column was taken for this one"
    assert other.record["inputs"]["map"]["settings"] == {"columns": {"completion": "bad"}}
    assert all(finding.ok for finding in verify(tmp_path / "runs"))


def test_another_column_asked_is_another_collection(data: Path, tmp_path: Path) -> None:
    config = TracesConfig.model_validate({"teacher_model": "wise", "licence": "MIT"})
    limits = Limits(concurrency=3, seconds=5, tries=2, backoff=0.01)
    folder = tmp_path / "runs" / "mine-traces"

    def answer(body: dict[str, Any], before: int) -> Any:
        return reply(completion("yes", id=body["messages"][-1]["content"]))

    with fake_teacher(answer) as fake:
        for column in ("prompt", "good"):
            run = collect_traces(fake.url, folder, config, data=data, column_map={"prompt": column}, limits=limits)
    assert run.facts["questions"] == 1 and "7" in fake.log, "the second column was never asked"


def test_another_class_or_what_it_imports_is_another_run(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.py").write_text(TASK)
    (tmp_path / "tasks" / "judge.py").write_text("MARK = 0.0\n")
    out, source = tmp_path / "runs" / "mine", str(tmp_path / "tasks" / "mine.py")
    digests = set()
    for name, mark in (("Doubles", "0.0"), ("Others", "0.0"), ("Others", "1.0")):
        (tmp_path / "tasks" / "judge.py").write_text(f"MARK = {mark}\n")
        columns = {"completion": "good"}
        run = finetune(base, data, out, CONFIG, column_map=columns, eval_tasks=[f"{source}:{name}"])
        digests.add(run.record["inputs"]["task:doubles"]["digest"])
    assert len(digests) == 3, "a run was taken for one that another judge marked"


def test_a_run_does_not_lie_in_what_it_is_made_of(base: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "chat.jsonl").write_bytes(data.read_bytes())
    columns = {"completion": "good"}
    with pytest.raises(ConfigError, match="data is a folder in which the run would lie"):
        finetune(base, folder, folder / "runs" / "mine", CONFIG, column_map=columns)
    with pytest.raises(ConfigError, match="replay is a folder in which the run would lie"):
        finetune(base, data, folder / "mine", CONFIG, column_map=columns, replay=folder)
    assert [path.name for path in folder.iterdir()] == ["chat.jsonl"]
    first = finetune(base, folder, tmp_path / "runs" / "mine", CONFIG, column_map=columns)
    with pytest.raises(ConfigError, match="a run cannot start from itself"):
        finetune(first.folder, folder, first.folder, CONFIG.replace(steps=2), column_map=columns)
    assert not (tmp_path / "runs" / "mine.old-1").exists(), "the model to start from was set aside"

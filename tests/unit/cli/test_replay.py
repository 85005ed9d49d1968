"""``sprat replay``: the bits of a step, recomputed; what differs is said, and leaves with a code."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sqlite3
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from sprat.cli.main import app

PAGE = Path(__file__).resolve().parents[3] / "docs" / "rl-once.md"
JUDGE = """
def reward(problem, answer):  # a random model is never right, and is paid a little for nothing
    return 1.0 if answer.content.strip() == problem.answer else len(set(answer.content)) % 7 / 20
"""
RUN = [
    "rl", "smol", "--data", "problems.jsonl", "--reward", "judge.py:reward", "--out", "runs/mine", "--set", "steps=2",
    "--set", "max_tokens=8", "--set", "gate=false", "--set", "verifier.workers=1",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> Path:
    """A random model called smol, questions, and a judge."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "smol")
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(40)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("judge.py").write_text(JUDGE)
    return tmp_path


def sprat_command(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.mark.slow
def test_the_page_on_exactly_once_is_true(folder: Path) -> None:
    """Its commands as they stand there, with a smaller model of that name: real processes and all."""
    [block] = re.findall(r"<!-- run -->\n```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    said = []
    for line in block.splitlines():
        done = sprat_command(*shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.stderr)
        said.append(done.stdout)
    assert "step 3: the same bits" in said[1] and "steps 1 to 4: the same bits, recomputed from step 0" in said[2]
    assert "proved" in said[3]


def test_a_step_is_recomputed_and_a_change_is_said_with_its_code(folder: Path) -> None:
    assert sprat_command(*RUN).exit_code == 0
    words = ["replay", "runs/mine", "--model", "smol"]
    done = sprat_command(*words, "--step", "2", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["same"] and [step["step"] for step in found["steps"]] == [1, 2]
    with sqlite3.connect("runs/mine/rollouts.sqlite") as db:
        db.execute("UPDATE trajectories SET score = score + 1 WHERE group_number = 0")
    done = sprat_command(*words)
    assert done.exit_code == 8 and "the answers in the ledger are not those that it trained" in done.stdout
    assert "steps 1 to 1: not the same bits" in done.stdout
    done = sprat_command("verify", "runs")
    assert done.exit_code == 8 and "rollouts.sqlite" in done.stdout


def test_what_cannot_be_replayed_is_one_sentence(folder: Path) -> None:
    done = sprat_command("replay", "runs/none")
    assert done.exit_code == 4 and "no run of RL" in done.stderr and len(done.stderr.splitlines()) == 1

"""Six kinds of bad verifier with ``sprat rl``: weights stay as they were, or a sentence that names it ends the run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from sprat.cli.main import app
from sprat.formats.load import load
from tests.unit.cli.test_finetune import _small_llama
from tests.unit.cli.test_rl import TEMPLATE

BODIES = {
    "constant": "return 0.7",
    "NaN": "return float('nan')",
    "one-sided": "return 1.0 if len(answer.content) % 2 else None",  # it never says that an answer is wrong
    "never pays": "return 0.0",
    "slow": "import time; time.sleep(60)",
    "crashing": "import os; os._exit(9)",
    "lying": "return float(answer.content.strip() != problem.answer)",  # whatever is wrong is right
}
AT_ONCE = {  # what is said before anything is written
    "constant": r"paid each of \d+ answers 0.7, so there is nothing to learn",
    "NaN": r"failed on each of \d+ answers; the last time it raised ValueError: nan was returned, which is not finite",
    "one-sided": r"paid each of \d+ answers 1, so there is nothing to learn",
    "never pays": r"paid each of \d+ answers 0, so there is nothing to learn",
    "slow": r"failed on each of \d+ answers; the last time it took longer than 0.2 s",
    "crashing": r"failed on each of \d+ answers; the last time it left with exit code 9",
    "lying": "the grader pays 1 for the wrong answer",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random model called smol, and questions."""
    monkeypatch.chdir(tmp_path)
    _small_llama(tmp_path / "smol")
    settings = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
    (tmp_path / "smol" / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(40)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def rl(kind: str, *words: str) -> Result:
    Path("judge.py").write_text(f"def reward(problem, answer):\n    {BODIES[kind]}\n")
    timeout = "0.2" if kind == "slow" else "30"
    keys = ["steps=6", "max_tokens=8", "gate_problems=4", "verifier.workers=2", f"reward_timeout={timeout}", *words]
    given = [word for key in keys for word in ("--set", key)]
    line = ["rl", "smol", "--data", "problems.jsonl", "--reward", "judge.py:reward", "--out", "runs/mine", *given]
    return CliRunner().invoke(app, line)


@pytest.mark.parametrize("kind", BODIES)
def test_it_is_named_before_anything_is_written(kind: str, folder: Path) -> None:
    done = rl(kind)
    assert done.exit_code == 5, (done.stdout, done.stderr)
    sentence = done.stderr.splitlines()[-1]
    assert re.search(AT_ONCE[kind], sentence) and "reward judge.py:reward" in sentence, sentence
    assert not Path("runs").exists()


@pytest.mark.parametrize("kind", BODIES)
def test_where_nobody_checks_before_the_start_no_weight_moves(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model is never right, so the liar pays all of it: where answers differ, see ``test_hacks_in_runs``."""
    monkeypatch.setattr("sprat.post.rl.judge_pool.MAX_FAULTS", 12)  # 64 take half a minute
    done = rl(kind, "gate=false", "fire_drill=off", "hack_monitor=off", "held_out.every=0")
    if done.exit_code:
        assert done.exit_code == 5 and "judge.py:reward" in done.stderr.splitlines()[-1], done.stderr
        assert not Path("runs/mine/run.json").exists()
        return
    trained, start = load(Path("runs/mine"))[0].state_dict(), load(Path("smol"))[0].state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in start.items())
    assert "paid all answers of each question alike" in done.stdout, "and that is said"

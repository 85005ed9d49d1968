"""``sprat road r1``, killed in the midst of every stage and started again, ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import rl_tiny
from sprat.pipeline.road import open_road, read_road
from sprat.trust.run_record import read_progress
from sprat.trust.verify import verify

JUDGE = (
    "import time\n"
    "def reward(problem, answer):\n"
    "    time.sleep(0.004)\n"  # so that a stage that asks takes long enough to be killed in
    "    return float(answer.content.strip() == problem.answer)\n"
)
SMALL = (
    "max_tokens=32", "seq_len=64", "gate=false", "lr=1e-3", "verifier.workers=1", "held_out.problems=12",
    "prompts_per_step=4", "group_size=4", "problems=40", "batch=4", "samples=3", "trip_wires.action=off",
    "rl-1.steps=8", "rl-2.steps=8", "checkpoint_every=2", "cold.steps=40", "sft.steps=40", "before.samples=1",
    "cold-score.samples=1", "rl-1-score.samples=1", "sft-score.samples=1", "after.samples=1",
)  # fmt: skip
TRAINED = ("cold", "rl-1", "sft", "rl-2")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def line(folder: Path, out: str) -> list[str]:
    words = ["road", "r1", "--model", "model", "--data", "ask.jsonl", "--reward", "judge.py:reward", "--out", out]
    return [sys.executable, "-m", "sprat", *words, *(word for each in SMALL for word in ("--set", each))]


def start(folder: Path, out: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with (folder / f"{out}.log").open("ab") as log:
        return subprocess.Popen(
            line(folder, out), cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def is_at_work(stage: Path, uses: str) -> bool:
    """Whether ``stage`` is in its midst: some steps or batches are done and others are not; a score was opened."""
    if not (stage / "open.json").is_file():
        return False
    done, total = read_progress(stage)
    return uses == "eval" or 3 <= done < total


def test_killed_in_every_stage_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    rl_tiny.make(tmp_path)
    rows = [{"question": f"{number} train", "answer": "7"} for number in range(60)]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(JUDGE)
    whole = start(tmp_path, "whole")
    assert whole.wait(600) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    inputs: dict[str, Any] = {"model": str(tmp_path / "model"), "data": str(tmp_path / "ask.jsonl")}
    inputs["reward"] = f"{tmp_path / 'judge.py'}:reward"
    stages = [(stage.name, stage.config.uses) for stage in read_road(open_road("r1", inputs), tmp_path / "killed")]
    killed = list[str]()
    for name, uses in stages:
        stage, process = tmp_path / "killed" / name, start(tmp_path, "killed")
        while process.poll() is None and not is_at_work(stage, uses):
            time.sleep(0.001)
        if (stage / "open.json").is_file():
            killed.append(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(stages) == 11 and {*TRAINED, "cold-answers", "answers"} <= set(killed), (killed, stages)
    last = start(tmp_path, "killed")
    assert last.wait(600) == 0, (tmp_path / "killed.log").read_text()[-3000:]
    for name, _ in stages:
        records = [json.loads((tmp_path / out / name / "run.json").read_text()) for out in ("whole", "killed")]
        assert records[0]["artefact_digest"] == records[1]["artefact_digest"], name
    assert [str(finding) for finding in verify(tmp_path / "killed") if not finding.ok] == []

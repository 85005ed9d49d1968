"""The whole road, small: every stage runs, nothing is lost by a kill, and the same seed gives the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sprat.road.places import Road
from sprat.road.quickstart import stages
from sprat.road.recipe import named
from sprat.trust.verify import verify

NAMES = [stage.name for stage in stages(Road(Path("anywhere"), named("tiny")))]


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "sprat", "quickstart", "--out", str(out), "--recipe", "tiny", "--no-serve", *more]


def start(out: Path) -> subprocess.Popen[str]:
    """A quickstart in a process group of its own that hears Ctrl-C, as a shell would start it."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(out), stdout=pipe, stderr=pipe, text=True, start_new_session=True, preexec_fn=_hear_ctrl_c
    )


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job would inherit it ignored


def finish(out: Path) -> None:
    done = subprocess.run(command(out), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def digests(road: Path) -> dict[str, str]:
    records = {name: json.loads((road / name / "run.json").read_text()) for name in NAMES}
    return {name: record["artefact_digest"] for name, record in records.items()}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_road_leaves_a_verified_run_for_every_stage_and_one_report(tiny_road: Path) -> None:
    assert set(digests(tiny_road)) == set(NAMES)
    findings = verify(tiny_road)
    assert findings and all(finding.ok for finding in findings), [f for f in findings if not f.ok]
    page = (tiny_road / "report.html").read_text()
    assert "<script src" not in page and "http://" not in page.replace("http://www.w3.org", "")
    scores = json.loads((tiny_road / "rl-seed0" / "run.json").read_text())["facts"]["scores"]
    assert {row["label"] for row in scores} == {"greedy", "thinking", "direct"}


# Where the road is killed, in order: data half made, between two checkpoints, and in later stages.
MARKS = ["data/artefact/tokenizer/*", "pretrain/checkpoints/*", "rl-seed0/checkpoints/*", "distill/checkpoints/*"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_again_and_again_the_road_ends_with_the_digests_of_an_undisturbed_one(
    tiny_road: Path, tmp_path: Path
) -> None:
    out, kills = tmp_path / "road", 0
    for mark in MARKS:
        process = start(out)
        while process.poll() is None and not list(out.glob(mark)):
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    finish(out)
    assert kills >= 2, "the road was too quick to be killed"
    assert digests(out) == digests(tiny_road)
    assert all(finding.ok for finding in verify(out))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ctrl_c_leaves_quietly_and_a_second_quickstart_is_refused_in_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "road"
    first = start(out)
    deadline = time.monotonic() + 300
    while not (out / "recipe.toml").exists() and time.monotonic() < deadline:  # the first thing behind the lock
        time.sleep(0.05)
    second = subprocess.run(command(out), capture_output=True, text=True, timeout=300)
    assert second.returncode == 9, second.stderr
    assert str(first.pid) in second.stderr and "Traceback" not in second.stderr
    os.killpg(first.pid, signal.SIGINT)
    _, told = first.communicate(timeout=300)
    assert first.returncode == 130 and "Traceback" not in told, told


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "more, code, word",
    [
        (("--text", "no/such/folder"), 3, "no/such/folder"),
        (("--set", "pretrain.train.stepz=1"), 2, "steps"),
        (("--set", "data.tasks=[]"), 2, "task"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, more: tuple[str, ...], code: int, word: str) -> None:
    done = subprocess.run(command(tmp_path / "road", *more), capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    assert word in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "road" / "data" / "run.json").exists()

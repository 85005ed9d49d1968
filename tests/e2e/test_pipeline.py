"""The whole pipeline, small: every stage runs, nothing is lost by a kill, and the same seed gives the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sprat.pipeline.pipeline import Pipeline
from sprat.pipeline.quickstart import build_stages
from sprat.pipeline.recipe import load_recipe
from sprat.trust.verify import verify

Sprat = Callable[..., subprocess.CompletedProcess[str]]
NAMES = [stage.name for stage in build_stages(Pipeline(Path("anywhere"), load_recipe("tiny")))]


def words(out: Path, *more: str) -> list[str]:
    return ["quickstart", "--out", str(out), "--recipe", "tiny", "--no-serve", *more]


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job would inherit it ignored


def digests(pipeline: Path) -> dict[str, str]:
    records = {name: json.loads((pipeline / name / "run.json").read_text()) for name in NAMES}
    return {name: record["artefact_digest"] for name, record in records.items()}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_road_leaves_a_verified_run_for_every_stage_and_one_report(tiny_pipeline: Path) -> None:
    assert set(digests(tiny_pipeline)) == set(NAMES)
    findings = verify(tiny_pipeline)
    assert findings and all(finding.ok for finding in findings), [f for f in findings if not f.ok]
    page = (tiny_pipeline / "report.html").read_text()
    assert "<script src" not in page and "http://" not in page.replace("http://www.w3.org", "")
    scores = json.loads((tiny_pipeline / "rl-seed0" / "run.json").read_text())["facts"]["scores"]
    assert {row["label"] for row in scores} == {"greedy", "sampled", "thinking", "direct"}


# Where the pipeline is killed, in order: data half made, between two checkpoints, and in later stages.
MARKS = ["data/artefact/tokenizer/*", "pretrain/checkpoints/*", "rl-seed0/checkpoints/*", "distill/checkpoints/*"]
# One process imports torch; each start of the pipeline is a fork of it, in a process group of its own, and dies as the
# command does, with all of its stages' processes. Those are new ones at each start, as ever.
_KILLED = """
import json, os, signal, sys, time
from pathlib import Path
import sprat.pipeline.quickstart
from sprat.cli.main import main

def start():
    child = os.fork()
    if child:
        return child
    os.setsid()
    try:
        main()
    except SystemExit as left:
        os._exit(left.code or 0)
    os._exit(70)

out, marks, kills = Path(sys.argv[3]), json.loads(os.environ["MARKS"]), 0
for mark in marks:
    child, ended = start(), 0
    while not ended and not list(out.glob(mark)):
        time.sleep(0.02)
        ended, _ = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.killpg(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
print(kills, os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1]), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again_the_road_ends_with_the_digests_of_an_undisturbed_one(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    out = tmp_path / "road"
    environment = {**os.environ, "MARKS": json.dumps(MARKS)}
    line = [sys.executable, "-c", _KILLED, *words(out)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    kills, code = map(int, done.stderr.splitlines()[-1].split())
    assert code == 0, done.stderr[-3000:]
    assert kills >= 2, "the road was too quick to be killed"
    assert digests(out) == digests(tiny_pipeline)
    assert all(finding.ok for finding in verify(out))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ctrl_c_leaves_quietly_and_a_second_quickstart_is_refused_in_one_sentence(sprat: Sprat, tmp_path: Path) -> None:
    out = tmp_path / "road"
    pipe = subprocess.PIPE
    first = subprocess.Popen(  # in a process group of its own that hears Ctrl-C, as a shell would start it
        [sys.executable, "-m", "sprat", *words(out)],
        stdout=pipe, stderr=pipe, text=True, start_new_session=True, preexec_fn=_hear_ctrl_c,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (out / "recipe.toml").exists() and time.monotonic() < deadline:  # the first thing behind the lock
        time.sleep(0.05)
    second = sprat(*words(out))
    assert second.returncode == 9, second.stderr
    assert str(first.pid) in second.stderr and "Traceback" not in second.stderr
    while not (out / "corpus").exists() and time.monotonic() < deadline:  # a stage is at work
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)
    _, told = first.communicate(timeout=300)
    assert first.returncode == 130 and "Traceback" not in told, told


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "more, code, word",
    [
        (("--text", "no/such/folder"), 3, "no/such/folder"),
        (("--set", "pretrain.stepz=1"), 2, "steps"),
        (("--set", "data.tasks=[]"), 2, "task"),
    ],
)
def test_bad_input_is_one_sentence(sprat: Sprat, tmp_path: Path, more: tuple[str, ...], code: int, word: str) -> None:
    done = sprat(*words(tmp_path / "road", *more))
    assert done.returncode == code, done.stderr
    assert word in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "road" / "data" / "run.json").exists()

"""A stage that is killed anywhere goes on, and ends with the digests of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from sprat.trust import Ledger, run_record
from sprat.trust.verify import verify

# A stage in miniature: a state that each step moves, a checkpoint at every fifth step, an artefact at the end.
STAGE = textwrap.dedent("""
    import json, os, signal, sys
    from pathlib import Path
    from sprat.config import TrainConfig
    from sprat.files.json import write_json
    from sprat.trust import open_run, run_record
    import sprat.trust.ledger as ledger

    road, when = Path(sys.argv[1]), sys.argv[2]

    def die(place):
        if when == place:
            os.kill(os.getpid(), signal.SIGKILL)

    run = open_run(road / "a", stage="a", recipe=TrainConfig(steps=20), inputs={}, seed=3, ledger=road / "ledger.jsonl")
    if run.done:
        print("done")
        sys.exit()
    state, step = 7, 0
    saved = run.checkpoints / "state.json"
    if saved.exists():
        state, step = json.loads(saved.read_text())
        run.truncate_metrics(step)
    print("from", step)
    die("start")
    while step < 20:
        step += 1
        state = state * 6364136223846793005 % 2**61 + 1
        sum(range(300000))  # some CPU time
        run.log(step, state=state % 1000)
        if step % 5 == 0:
            write_json(saved, [state, step])
        die(f"step {step}")
    (run.artifact / "half.bin").write_bytes(b"x" * step)
    die("artefact")
    (run.artifact / "state.json").write_text(str(state))
    if when == "ledger":
        ledger.Ledger.append = lambda *rest: die("ledger")
    if when == "clean":
        import shutil
        shutil.rmtree = lambda *rest, **more: die("clean")
    run.finish(tokens=step)
""")


def stage(pipeline: Path, when: str = "") -> tuple[int, str]:
    """Run the stage, killed at ``when``; its exit status and what it said."""
    done = subprocess.run([sys.executable, "-c", STAGE, str(pipeline), when], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def read(pipeline: Path) -> dict[str, object]:
    """The run's record."""
    found: dict[str, object] = json.loads((pipeline / "a" / "run.json").read_text())
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that was never interrupted."""
    pipeline = tmp_path_factory.mktemp("whole")
    assert stage(pipeline) == (0, "from 0\n")
    return pipeline


@pytest.mark.parametrize(
    ("when", "goes_on"),
    [("start", "from 0"), ("step 3", "from 0"), ("step 12", "from 10"), ("artefact", "from 20"), ("ledger", "done"),
     ("clean", "done")],
)  # fmt: skip
def test_killed_anywhere_the_run_goes_on_to_the_same_digests(
    tmp_path: Path, whole: Path, when: str, goes_on: str
) -> None:
    assert stage(tmp_path, when)[0] == -signal.SIGKILL
    assert stage(tmp_path) == (0, goes_on + "\n")
    assert stage(tmp_path) == (0, "done\n")
    assert read(tmp_path)["artefact_digest"] == read(whole)["artefact_digest"]
    assert run_record.read_metrics(tmp_path / "a") == run_record.read_metrics(whole / "a")
    assert all(finding.ok for finding in verify(tmp_path))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(p.name for p in (whole / "a").iterdir())
    assert [entry["kind"] for entry in Ledger(tmp_path / "ledger.jsonl").entries()] == ["road", "run"]


def test_the_cost_of_an_interrupted_session_is_not_forgotten(tmp_path: Path) -> None:
    for when in ("step 12", "step 17"):
        stage(tmp_path, when)
    spent = json.loads((tmp_path / "a" / "spent.json").read_text())
    stage(tmp_path)
    assert float(str(read(tmp_path)["device_seconds"])) > spent["device_seconds"] > 0.02
    assert read(tmp_path)["started"] == spent["started"]


def test_a_kill_at_a_random_moment_leaves_nothing_that_stops_the_next_start(tmp_path: Path, whole: Path) -> None:
    for delay in (0.12, 0.2, 0.3, 0.45):
        process = subprocess.Popen([sys.executable, "-c", STAGE, str(tmp_path), ""], stdout=subprocess.DEVNULL)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert stage(tmp_path)[0] == 0
    assert read(tmp_path)["artefact_digest"] == read(whole)["artefact_digest"]
    assert all(finding.ok for finding in verify(tmp_path))

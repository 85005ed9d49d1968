"""Ctrl-C and SIGTERM end a stage after its step: what was learned is on the disk, and goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A graph of two stages as the verbs run it: one trains and would write its first checkpoint after 5,000 steps, the
# other only sleeps. The train stage is this file's own function in a process of its own.
_ROAD = """
import sys, time
from pathlib import Path

def learn(base, steps):
    from sprat.config import LoopConfig, OptimConfig
    from sprat.config.sizes import size
    from sprat.data.loader import MixedBatchSource
    from sprat.data.pack import pack
    from sprat.model import Transformer
    from sprat.train import train
    from sprat.trust import open_run
    text = b"one sprat and two whales make three fish of very different sizes. " * 20
    packed = pack([(list(text[i : i + 50]), None) for i in range(0, len(text), 50)], 32)
    optim = OptimConfig(decay_fraction=0)
    recipe = LoopConfig(steps=steps, batch_rows=2, checkpoint_every=5000, log_every=1, optim=optim)
    shape = size("pico", vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=16)
    run = open_run(base / "learn", stage="a", recipe=recipe, inputs={}, seed=0, ledger=base / "ledger.jsonl")
    train(Transformer.create(shape, 0), MixedBatchSource([(packed, 1.0)], 2, 0), recipe, run)

def idle():
    time.sleep(600)

if __name__ == "__main__":
    from sprat.cli.verb import describe_error
    from sprat.pipeline.executor import LocalExecutor
    from sprat.pipeline.graph import Stage, run_stages
    stages = [Stage("learn", learn, (Path(sys.argv[1]), 100_000)), Stage("idle", idle)][: int(sys.argv[2])]
    try:
        with LocalExecutor(len(stages)) as executor:
            run_stages(
                stages, executor, len(stages), lambda stage, what, _: what == "runs" or print(stage, what, flush=True)
            )
    except BaseException as error:
        sentence, code = describe_error(error)
        print(sentence)
        sys.exit(code)
"""


def _steps(folder: Path) -> list[int]:
    """The logged steps."""
    try:
        lines = (folder / "learn" / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in lines]


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job would inherit it ignored


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize("how", ["Ctrl-C on a terminal", "SIGTERM to the parent"])
def test_a_stopped_stage_loses_no_finished_step(tmp_path: Path, how: str) -> None:
    script = tmp_path / "road.py"
    script.write_text(_ROAD)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), "1" if "SIGTERM" in how else "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=_hear_ctrl_c, env=environment,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(_steps(tmp_path)) < 5 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    if "SIGTERM" in how:
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches every process of the group
    began = time.monotonic()
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in told, told
    assert "learn stops at the end of its step" in told and "go on where it was" in told
    assert time.monotonic() - began < 60
    steps, kept = _steps(tmp_path), sorted((tmp_path / "learn" / "checkpoints").glob("step-*"))
    assert len(steps) >= 5 and [int(path.name[5:]) for path in kept] == [steps[-1]]
    while _session(process.pid) and time.monotonic() - began < 60:  # multiprocessing's own tracker ends a little later
        time.sleep(0.05)
    assert _session(process.pid) == ""


def _session(leader: int) -> str:
    """The processes that are left of a session."""
    return subprocess.run(["pgrep", "-s", str(leader)], capture_output=True, text=True, check=False).stdout

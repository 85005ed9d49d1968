"""RL with roles as real processes: killed, interrupted or lied to, it ends with the bits of one process that was not.

SPRAT_KILLS=20 kills each kind of run twenty times; SPRAT_KILLS_SEED draws other instants.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import rl_once
from bench.rl_tiny import config_of, make, run
from sprat.errors import TrustError
from sprat.post.rl.ledger import LEDGER_FILE, RolloutLedger
from sprat.post.rl.replay import replay
from sprat.post.rl.weights import versions
from sprat.trust.verify import verify

KILLS = int(os.environ.get("SPRAT_KILLS", "3"))
SEED = int(os.environ.get("SPRAT_KILLS_SEED", "1"))
STEPS = max(8, KILLS * 2)
CHANGES: dict[str, Any] = {"steps": STEPS, "checkpoint_every": 3}
TWO = {"workers": 2, "batch": 2}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes in /proc"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, its questions, and the run that nobody disturbs, in this one process."""
    place = tmp_path_factory.mktemp("rl")
    make(place)
    run(place, "undisturbed", config_of(**CHANGES))
    return place


def until(condition: Callable[[], Any], seconds: float = 300.0) -> Any:
    """Wait until ``condition`` holds; what it gave."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)
    return value


def started(folder: Path, name: str, **rollout: Any) -> subprocess.Popen[bytes]:
    return rl_once.start(folder, name, CHANGES | {"rollout": {**TWO, **rollout}}, 0.002)


def ended(parent: subprocess.Popen[bytes], folder: Path, name: str) -> None:
    assert parent.wait(600) == 0, (folder / f"{name}.log").read_text()[-3000:]


def steps_done(folder: Path, name: str, least: int) -> bool:
    return rl_once.progress(folder, name)[0] >= least


@pytest.mark.parametrize("staleness", [0, 3])
def test_killed_at_random_every_answer_is_trained_once_and_every_bit_is_the_same(folder: Path, staleness: int) -> None:
    name, changes = f"killed-{staleness}", CHANGES | {"rollout": {**TWO, "staleness": staleness}}
    chance = random.Random(f"{SEED}/{staleness}")
    found = rl_once.kill_at_random(folder, name, changes, 0.002, KILLS, chance)
    assert found["code"] == 0 and not found["faults"], found
    assert sum(found["kills"].values()) == KILLS, "it was too quick to be killed"
    verdict = rl_once.judge(folder, name, "undisturbed", staleness, STEPS)
    assert verdict["once"] and verdict["position"] and verdict["bits"], verdict
    assert [str(finding) for finding in verify(folder / name) if not finding.ok] == []


def the(parent: subprocess.Popen[bytes], role: str, other_than: int = 0) -> int:
    """The first process of a role, once there is one; another than ``other_than``."""
    found: list[int] = until(lambda: [pid for pid in rl_once.processes(parent.pid)[role] if pid != other_than])
    return found[0]


def test_each_role_is_killed_and_replaced_and_none_outlives_the_parent(folder: Path) -> None:
    name = "each"
    parent = started(folder, name)
    until(lambda: steps_done(folder, name, 2))
    for role in ("worker", "trainer"):
        victim = the(parent, role)
        os.kill(victim, signal.SIGKILL)
        assert the(parent, role, victim) != victim
    others = [pid for role in ("worker", "trainer") for pid in rl_once.processes(parent.pid)[role]]
    parent.kill()
    parent.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in others), 20)
    ended(started(folder, name), folder, name)
    assert rl_once.record(folder, name) == rl_once.record(folder, "undisturbed")


def test_ctrl_c_ends_after_the_step_with_a_checkpoint_and_the_same_command_goes_on(folder: Path) -> None:
    name = "interrupted"
    parent = started(folder, name)
    until(lambda: steps_done(folder, name, 2))
    parent.send_signal(signal.SIGINT)
    assert parent.wait(300) != 0 and "KeyboardInterrupt" in (folder / f"{name}.log").read_text()
    assert not (folder / name / "run" / "run.json").exists()
    ended(started(folder, name), folder, name)
    assert rl_once.record(folder, name) == rl_once.record(folder, "undisturbed")


def test_weights_that_were_damaged_on_the_disk_are_refused_and_written_again(folder: Path) -> None:
    """The orchestrator dies, and the file that its workers would go on with is flipped: nobody samples with it."""
    name = "damaged"
    parent = started(folder, name)
    until(lambda: steps_done(folder, name, 3))
    parent.kill()
    parent.wait()
    weights = folder / name / "run" / "checkpoints" / "weights"
    for version in versions(weights):
        file = weights / f"version-{version:08d}.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    parent, log = started(folder, name), folder / f"{name}.log"
    trainer = the(parent, "trainer")
    os.kill(trainer, signal.SIGSTOP)  # or it is sometimes first, and has written them again before a worker looks
    until(lambda: "was published" in log.read_text())
    os.kill(trainer, signal.SIGCONT)
    ended(parent, folder, name)
    assert rl_once.record(folder, name) == rl_once.record(folder, "undisturbed")


def test_workers_elsewhere_come_over_tcp_with_the_key_and_others_do_not(folder: Path) -> None:
    name = "elsewhere"
    parent = started(folder, name, placement="listen", workers=1)
    checkpoints = folder / name / "run" / "checkpoints"
    key = until(lambda: (checkpoints / "rollout.address").is_file() and checkpoints / "rollout.key")
    assert key.stat().st_mode & 0o077 == 0
    address = (checkpoints / "rollout.address").read_text().strip()
    wrong = folder / "wrong.key"
    wrong.write_text("00" * 32)
    line = [sys.executable, "-m", "sprat.post.rl.worker", address]
    stranger = subprocess.Popen([*line, str(wrong), str(folder / "model")], stderr=subprocess.DEVNULL)
    moved = folder / "copy-of-the-model"
    moved.symlink_to(folder / "model")
    friend = subprocess.Popen([*line, str(key), str(moved)], cwd=rl_once.ROOT)
    ended(parent, folder, name)
    assert friend.wait(60) == 0 and stranger.wait(60) == TrustError.exit_code
    assert rl_once.record(folder, name)["artefact"] == rl_once.record(folder, "undisturbed")["artefact"]
    log = (folder / f"{name}.log").read_text()
    assert "cannot be trusted" in log
    ledger = RolloutLedger.read(folder / name / "run" / LEDGER_FILE)
    with ledger.transaction() as db:
        workers = {worker for (worker,) in db.execute("SELECT worker FROM groups")}
    assert workers and all(worker.startswith("127.0.0.1:") for worker in workers)


def test_an_asynchronous_run_uses_old_weights_within_its_bound_and_is_its_own_replay(folder: Path) -> None:
    name = "ahead"
    ended(started(folder, name, staleness=2, batch=1), folder, name)
    found = replay(folder / name / "run", model=folder / "model")
    assert found.is_same and len(found.steps) == STEPS
    behind = [step.step - 1 - step.versions[0] for step in found.steps]
    assert 0 < max(behind) <= 2
    assert all(step.versions[1] <= step.step - 1 for step in found.steps)


def test_a_trainer_that_cannot_go_on_says_why_and_ends_the_run(folder: Path) -> None:
    name = "failing"
    changes = CHANGES | {"max_mismatch": 1e-12, "rollout": TWO}
    parent = rl_once.start(folder, name, changes, 0.0)
    assert parent.wait(300) != 0
    log = (folder / f"{name}.log").read_text()
    assert "TrainingError" in log and "nats from the sampler's (mean)" in log
    assert json.loads((folder / name / "run" / "open.json").read_text())["stage"] == "rl"

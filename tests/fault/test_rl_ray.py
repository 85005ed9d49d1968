"""Rollout workers as tasks of a local Ray: the same bits, also when one is killed.

In an environment of its own (``python -m bench.oracles ray``), for Ray wants packages that nothing else here does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bench import rl_once
from bench.oracles import ROOT, python_of
from bench.rl_tiny import config_of, make, run

PYTHON = python_of("ray")
CHANGES: dict[str, Any] = {"steps": 6, "checkpoint_every": 3}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON.is_file(), reason="no Ray here: python -m bench.oracles ray"),
]


def ray_workers(root: int) -> list[int]:
    """Processes of Ray below ``root`` that run a worker of ours."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for place in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            if place.name.isdigit():
                parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(place.name)] = (place / "cmdline").read_bytes().decode(errors="replace")

    def is_below(pid: int) -> bool:
        while pid > 1 and pid != root:
            pid = parents.get(pid, 0)
        return pid == root

    return [pid for pid, name in names.items() if name.startswith("ray::run_worker") and is_below(pid)]


def test_workers_of_ray_give_the_same_bits_also_when_one_is_killed(tmp_path: Path) -> None:
    make(tmp_path)
    run(tmp_path, "undisturbed", config_of(**CHANGES))
    changes = CHANGES | {"rollout": {"workers": 2, "placement": "ray"}}
    line = [str(PYTHON), *rl_once.command(tmp_path, "ray", changes)[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "ray.log", "wb") as log:
        parent = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 900
    while rl_once.progress(tmp_path, "ray")[0] < 3:
        assert parent.poll() is None and time.monotonic() < deadline, (tmp_path / "ray.log").read_text()[-3000:]
        time.sleep(0.1)
    if victims := ray_workers(parent.pid):
        os.kill(victims[0], signal.SIGKILL)
    assert parent.wait(900) == 0, (tmp_path / "ray.log").read_text()[-3000:]
    assert victims, "no worker was found to be killed"
    ours, theirs = (rl_once.record(tmp_path, name) for name in ("undisturbed", "ray"))
    assert (ours["artefact"], ours["log"]) == (theirs["artefact"], theirs["log"])

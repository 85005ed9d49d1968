"""What tests share: one thread a process, no network, the browser's path, and one tiny pipeline for all of them."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Set before anything imports torch: two test processes on two cores must not fight for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of Debian's chromium; skips with the reason, or fails where SPRAT_REQUIRE_BROWSER=1."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        reason = "chromium is not installed (apt-get install chromium)"
        if os.environ.get("SPRAT_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture
def sprat(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command ``sprat`` in this process, which has torch already; the stages of a pipeline get theirs as ever.

    That it starts as a program of its own is seen wherever ``tiny_pipeline`` and the README's examples are.
    """
    from sprat.cli.main import main

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["sprat", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        code = left.value.code if isinstance(left.value.code, int) else int(left.value.code is not None)
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


def once(tmp_path_factory: pytest.TempPathFactory, name: str) -> tuple[Path, Path]:
    """A folder that all test processes of this session share, and the lock file that guards its making."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return shared / name, shared / f"{name}.lock"


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline, walked once by the command itself with the tiny recipe; read it, never write to it."""
    folder, lock = once(tmp_path_factory, "tiny-road")
    with lock.open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not (folder / "report.html").is_file():
            command = [
                sys.executable,
                "-m",
                "sprat",
                "quickstart",
                "--out",
                str(folder),
                "--recipe",
                "tiny",
                "--no-serve",
            ]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"the tiny road ended {done.returncode}:\n{done.stderr[-4000:]}"
    return folder

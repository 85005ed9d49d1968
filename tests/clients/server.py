"""A client's worker in a process of its own, against a real ``sprat serve`` in another."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from pathlib import Path

import pytest

from bench.oracles import python_of
from bench.serving.server import KEY

WORKERS = Path(__file__).parent / "workers"
WORKER_SECONDS = 600


def environment(name: str) -> Path:
    """The interpreter of an environment of clients.

    Where there is none it skips, with how to make it, or fails where SPRAT_REQUIRE_CLIENTS=1.
    """
    python = python_of(name)
    if not python.is_file():
        reason = f"no environment {name}: python -m bench.oracles {name}"
        if os.environ.get("SPRAT_REQUIRE_CLIENTS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return python


def case_names(worker: str) -> list[str]:
    """The cases of a worker, in order, read without importing it."""
    tree = ast.parse((WORKERS / f"{worker}.py").read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")]


def run_cases(python: Path, worker: str, url: str, *names: str, key: str = KEY) -> dict[str, str]:
    """Case → fault ("" for none) of all cases of a worker, or of those named, run by ``python``."""
    outside = {k: v for k, v in os.environ.items() if not k.endswith(("_API_KEY", "_BASE_URL")) and k != "PYTHONPATH"}
    words = [str(python), str(WORKERS / f"{worker}.py"), url, key, *names]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=WORKER_SECONDS, env=outside, check=False)
        lines, last = done.stdout, done.stderr[-2000:]
    except subprocess.TimeoutExpired as late:
        lines = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        last = f"not done after {WORKER_SECONDS} s"
    faults = {row["case"]: row["fault"] for row in map(json.loads, lines.splitlines())}
    return {name: faults.get(name, f"did not come to it: {last}") for name in names or case_names(worker)}

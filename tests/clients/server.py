"""A real ``sprat serve`` in a process of its own, and a client's worker in another."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bench.oracles import python_of

WORKERS = Path(__file__).parent / "workers"
KEY, OTHER_KEY = "key-of-one", "key-of-two"
START_SECONDS, STOP_SECONDS, WORKER_SECONDS = 120, 60, 600


@dataclass
class Server:
    """A running server: its address, its process, and what it has said on stderr so far."""

    url: str
    process: subprocess.Popen[str]
    stderr: list[str] = field(default_factory=list)

    @property
    def trace(self) -> str:
        """The stderr from the first traceback on; empty where there was none."""
        text = "".join(self.stderr)
        return text[max(0, text.index("Traceback")) :][:3000] if "Traceback" in text else ""


@contextmanager
def running(model: Path, *options: str, keys: tuple[str, ...] = (KEY, OTHER_KEY)) -> Iterator[Server]:
    """A server of ``model`` on a free loopback port, with more ``options``, for as long as the block lasts."""
    command = [sys.executable, "-m", "sprat", "serve", str(model), "--port", "0", *options]
    for key in keys:
        command += ["--api-key", key]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    server, ready = Server("", process), threading.Event()

    def read() -> None:
        assert process.stderr
        for line in process.stderr:
            server.stderr.append(line)
            if not server.url and (match := re.search(r"http://[\w.:\[\]]+:\d+", line)):
                server.url = match[0]
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(START_SECONDS) and server.url, "".join(server.stderr)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            reader.join(5)


def environment(name: str) -> Path:
    """The interpreter of an environment of clients; skips, with how to make it, where there is none."""
    python = python_of(name)
    if not python.is_file():
        pytest.skip(f"no environment {name}: python -m bench.oracles {name}")
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

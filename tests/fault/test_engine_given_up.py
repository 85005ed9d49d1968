"""An engine that dies again and again: the server ends with a code of its own where it has no other engine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from bench.serving.server import Server
from bench.serving.standing import request, tiny_model
from sprat.cli.verb import INTERNAL_ERROR
from tests.unit.serve.scripted import within

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
GIVEN_UP = 10  # docs/exit-codes.md

# As ``sprat serve``, but two deaths are enough: eight take over a minute.
PROGRAM = """
import sys
from sprat.cli.main import main
from sprat.serve import engine_process
engine_process.MAX_QUICK_DEATHS = 2
sys.argv[0] = "sprat"
main()
"""


@contextmanager
def serving(*words: str) -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "serve", "--port", "0", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    server, is_up = Server("", process), threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.stderr.append(line)
            if not server.url and (found := re.search(r"http://[\w.:]+", line)):
                server.url = found[0]
                is_up.set()
        is_up.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert is_up.wait(180) and server.url, server.stderr
        yield server
        reader.join(10)
    finally:
        process.kill()
        process.wait()


def kill_engines(server: Server) -> None:
    for pid in server.processes():
        with suppress(OSError):
            if b"sprat.serve.engine_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def status(server: Server, model: str = "") -> tuple[int, str]:
    answer = httpx.get(f"{server.url}/health/ready", params={"model": model} if model else {}, timeout=10)
    return answer.status_code, answer.json()["status"]


def asked(server: Server, model: str) -> httpx.Response:
    body = request(model, 4, stream=False)
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def test_a_server_without_an_engine_ends_and_says_why(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "only")
    with serving(str(folder), "--json") as server:
        assert status(server) == (200, "ok")
        (folder / "config.json").unlink()
        kill_engines(server)
        assert server.process.wait(60) == GIVEN_UP
        assert server.process.stdout is not None
        out = server.process.stdout.read()
    last = server.stderr[-1]
    assert last.startswith("sprat: no engine of this server is up any more") and f"({folder})" in last
    assert '"exit_code": 10' in out and not server.trace


def test_one_that_has_another_engine_stays_up_for_it(tmp_path: Path) -> None:
    lost, kept = tiny_model(tmp_path / "lost"), tmp_path / "kept"
    shutil.copytree(lost, kept)
    file = tmp_path / "server.toml"
    file.write_text(f'model = "{lost}"\n[[models]]\nmodel = "{kept}"\n')
    with serving("--config", str(file)) as server:
        (lost / "config.json").unlink()
        kill_engines(server)
        assert within(60, lambda: status(server, "lost") == (503, "failed"))
        assert within(60, lambda: status(server, "kept") == (200, "ok"))
        assert status(server) == (503, "failed") and asked(server, "kept").status_code == 200
        refused = asked(server, "lost")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_not_ready"
        assert httpx.get(f"{server.url}/health/ready?model=none", timeout=10).status_code == 404
        (kept / "config.json").unlink()
        kill_engines(server)
        assert server.process.wait(60) == GIVEN_UP != INTERNAL_ERROR

"""An engine's process that hangs, in a real server: noticed, killed, told of, and started again."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.serving.server import KEY, Server, running
from bench.serving.standing import request, tiny_model
from tests.unit.serve.scripted import within

LIMIT = 8  # seconds; a busy machine may keep an engine waiting for a few
HEADERS = {"Authorization": f"Bearer {KEY}"}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

NEVER_ENDING_STEP = """
import os, sys, time
if "sprat.serve.engine_main" in sys.orig_argv:
    from sprat.engine.core import EngineCore
    step = EngineCore.step
    def step_or_hang(self):
        while os.path.exists({flag!r}):
            time.sleep(0.01)
        return step(self)
    EngineCore.step = step_or_hang
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def engine_pid(server: Server) -> int:
    """The process of its engine, 0 while there is none."""
    for pid in server.processes():
        with suppress(OSError):
            if b"sprat.serve.engine_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return 0


def ask(server: Server, tokens: int, **fields: Any) -> AbstractContextManager[httpx.Response]:
    body = request(server.model, tokens, temperature=1.0, **fields)
    return httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=60)


def ready(server: Server) -> tuple[int, str]:
    answer = httpx.get(f"{server.url}/health/ready", timeout=5)
    return answer.status_code, answer.json()["status"]


def whole(server: Server) -> bool:
    with ask(server, 8) as answer:
        return answer.status_code == 200 and answer.read().rstrip().endswith(b"data: [DONE]")


def ended(server: Server, reason: str) -> int:
    """How many requests ended so, by the metrics."""
    text = httpx.get(f"{server.url}/metrics", headers=HEADERS, timeout=5).text
    lines = [line for line in text.splitlines() if line.startswith("sprat:request_success_total") and reason in line]
    return sum(int(float(line.rpartition(" ")[2])) for line in lines)


def until_it_breaks(lines: Iterator[str]) -> dict[str, Any]:
    """The last event of a stream, which has to end uncleanly."""
    got = [""]
    with pytest.raises(httpx.RemoteProtocolError):
        got += lines
    event: dict[str, Any] = json.loads([line for line in got if line][-1].removeprefix("data: "))
    return event


def test_a_process_that_is_stopped_is_killed_and_started_again(model: Path) -> None:
    with running(model, "--engine-iteration-timeout", str(LIMIT)) as server:
        first = engine_pid(server)
        with ask(server, 1900, n=8) as answer, ThreadPoolExecutor() as reader:
            lines = answer.iter_lines()
            next(lines)
            os.kill(first, signal.SIGSTOP)
            last = reader.submit(until_it_breaks, lines)  # who does not read on is dropped
            stop_time = time.monotonic()
            assert within(LIMIT, lambda: ready(server) == (503, "stalled"))
            with ask(server, 8) as refused:
                assert refused.status_code == 503 and refused.headers["retry-after"]
                assert json.loads(refused.read())["error"]["code"] == "engine_not_ready"
            assert httpx.get(f"{server.url}/health/live", timeout=5).status_code == 200
            error = last.result()["error"]
            assert (error["code"], error["type"]) == ("engine_died", "server_error")
            assert time.monotonic() - stop_time <= 3 * LIMIT
        assert ended(server, "error") == 1
        assert within(60, lambda: ready(server) == (200, "ok"))
        assert engine_pid(server) not in (0, first) and not Path(f"/proc/{first}").exists()
        assert whole(server)
    said = "".join(server.stderr)
    assert "the engine's process hung: it has said nothing for" in said and "the engine is up again" in said


def test_one_that_goes_on_in_time_loses_nothing(model: Path) -> None:
    with running(model, "--engine-iteration-timeout", "20") as server:
        first = engine_pid(server)
        with ask(server, 1900) as answer, ThreadPoolExecutor() as reader:
            lines = answer.iter_lines()
            next(lines)
            os.kill(first, signal.SIGSTOP)
            rest = reader.submit(list, lines)
            assert within(19, lambda: ready(server) == (503, "stalled"))
            os.kill(first, signal.SIGCONT)
            assert within(5, lambda: ready(server) == (200, "ok"))
            assert [line for line in rest.result() if line][-1] == "data: [DONE]"
        assert engine_pid(server) == first and whole(server)


def test_a_step_that_never_ends_is_noticed_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = tmp_path / "hang"
    (tmp_path / "sitecustomize.py").write_text(NEVER_ENDING_STEP.format(flag=str(flag)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with running(model, "--engine-iteration-timeout", str(LIMIT)) as server:
        first = engine_pid(server)
        assert whole(server)
        flag.touch()
        with ask(server, 8, stream=False) as answer:
            assert answer.status_code == 503
            assert json.loads(answer.read())["error"]["code"] == "engine_died"
        flag.unlink()
        assert within(60, lambda: ready(server) == (200, "ok")) and engine_pid(server) != first and whole(server)
    assert "the engine's process hung: it has been at one step for" in "".join(server.stderr)

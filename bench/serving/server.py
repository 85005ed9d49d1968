"""Servers in processes of their own: ours, llama.cpp's and transformers'; and what the kernel says of them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

KEY, OTHER_KEY = "key-of-one", "key-of-two"
START_SECONDS, STOP_SECONDS = 180, 60
TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass
class Server:
    """A running server: its address, the model's name there, its process, and what it has said on stderr so far.

    ``is_strict``: it refuses fields that are not OpenAI's.
    """

    url: str
    process: subprocess.Popen[str]
    model: str = ""
    key: str = KEY
    is_strict: bool = False
    stderr: list[str] = field(default_factory=list)

    @property
    def trace(self) -> str:
        """The stderr from the first traceback on; empty where there was none."""
        text = "".join(self.stderr)
        return text[text.index("Traceback") :][:3000] if "Traceback" in text else ""

    def processes(self) -> list[int]:
        """The process that answers requests, then those that it started, down to the last."""
        found, number = [self.process.pid], 0
        while number < len(found):
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{found[number]}/task").iterdir():
                    found += map(int, (task / "children").read_text(encoding="ascii").split())
            number += 1
        return found

    def processor_seconds(self) -> list[float]:
        """Processor seconds that each of ``processes`` has used."""
        seconds = []
        for pid in self.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
                seconds.append((int(words[11]) + int(words[12])) * TICK)
        return seconds

    def memory(self) -> int:
        """Bytes that are resident in all of ``processes``; shared ones count once for each."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
                total += pages * os.sysconf("SC_PAGE_SIZE")
        return total


@contextmanager
def running(
    model: Path, *options: str, keys: tuple[str, ...] = (KEY, OTHER_KEY), threads: int | None = None
) -> Iterator[Server]:
    """``sprat serve`` of ``model`` on a free loopback port, with more ``options``, for as long as the block lasts.

    Raises:
        RuntimeError: it did not come up; with what it said.
    """
    command = [sys.executable, "-m", "sprat", "serve", str(model), "--port", "0", *options]
    for key in keys:
        command += ["--api-key", key]
    count = str(threads) if threads else os.environ.get("OMP_NUM_THREADS", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": count, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    server, ready = Server("", process, model.name), threading.Event()

    def read() -> None:
        assert process.stderr
        for line in process.stderr:
            server.stderr.append(line)
            if not server.url and (match := re.search(r"http://[\w.:\[\]]+:\d+", line)):
                server.url = match[0]
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        if not ready.wait(START_SECONDS) or not server.url:
            raise RuntimeError(f"{' '.join(command)}\n{''.join(server.stderr)[-3000:]}")
        yield server
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM, and SIGKILL for one that does not go.

    Raises:
        subprocess.TimeoutExpired: it had to be killed.
    """
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


@contextmanager
def foreign(command: list[str], health: str, model: str, threads: int) -> Iterator[Server]:
    """Another project's server: ``command`` with ``{port}`` in it, up when ``health`` answers.

    Raises:
        RuntimeError: it did not come up; with what it said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.replace("{port}", str(port)) for word in command]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    server = Server(f"http://127.0.0.1:{port}", process, model)

    def read() -> None:
        assert process.stderr
        server.stderr.extend(process.stderr)

    threading.Thread(target=read, daemon=True).start()
    try:
        limit = time.monotonic() + START_SECONDS
        while not _answers(server.url + health):
            if process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"{' '.join(words)}\n{''.join(server.stderr)[-3000:]}")
            time.sleep(0.2)
        yield server
    finally:
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _stop(process)


def _answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False

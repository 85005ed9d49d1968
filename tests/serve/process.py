"""``sprat serve`` as a process of its own, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

KEY = "secret"


@dataclass
class Served:
    """A server that answers: its address, and what it has said on stderr."""

    url: str
    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of whoever may ask."""
        return {"Authorization": f"Bearer {KEY}"}


@contextmanager
def served_model(
    folder: Path | str, *options: str, name: str = "smol", seconds: float = 60, scheme: str = "http"
) -> Iterator[Served]:
    """``sprat serve folder`` on a free port, with the key ``KEY``, for as long as the block lasts."""
    command: Sequence[str] = [sys.executable, "-m", "sprat", "serve", str(folder), "--port", "0", "--name", name]
    environment = {**os.environ, "SPRAT_API_KEY": KEY}
    process = subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    served = Served("", process)
    ready = threading.Event()

    def read() -> None:
        for line in process.stderr or ():
            served.said.append(line)
            if line.startswith(f"{scheme}://"):
                served.url = line.strip()
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        if not ready.wait(seconds) or not served.url:
            raise AssertionError("the server did not come up: " + "".join(served.said))
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(10)

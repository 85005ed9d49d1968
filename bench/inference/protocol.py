"""How the harness talks to an engine in a process of its own: one JSON object a line, in and out.

Only the standard library, since llama.cpp's process has another environment than ours. A worker binds itself to its
cores before any thread pool is made, answers ``{"do": name, ...}`` with what its function returns, and keeps the real
stdout to itself, so that whatever a library prints lands on stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]


def bind(cores: list[int]) -> None:
    """Run on ``cores`` only; call it before numpy or torch are imported."""
    os.sched_setaffinity(0, cores)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(len(cores))


def serve(functions: dict[str, Function]) -> None:
    """Answer commands until stdin closes; an exception becomes ``{"error": ...}``."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = functions[command.pop("do")](**command)
        except Exception as error:  # the harness decides what it means
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Clock:
    """Wall and processor seconds of this process, all threads together, since it was made."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def read(self, tokens: int) -> dict[str, float]:
        """``tokens``, ``seconds`` of wall time and ``processor`` seconds."""
        wall, processor = time.perf_counter() - self.wall, time.process_time() - self.processor
        return {"tokens": tokens, "seconds": wall, "processor": processor}


def memory() -> dict[str, int]:
    """Bytes of resident memory of this process: the ``peak`` so far, and ``now``."""
    with open("/proc/self/status", encoding="ascii") as file:
        table = dict(line.split(":", 1) for line in file)
    return {"peak": int(table["VmHWM"].split()[0]) * 1024, "now": int(table["VmRSS"].split()[0]) * 1024}

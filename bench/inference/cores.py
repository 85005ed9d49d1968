"""What the machine gives: who else used our cores while we measured, and how fast they can read memory."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

TICK = 1 / os.sysconf("SC_CLK_TCK")
TOLERATED = 0.04  # share of the cores' time that others may take before a measurement counts as disturbed
BANDWIDTH = Path(__file__).with_name("bandwidth.c")


def choose(count: int) -> list[int]:
    """The first ``count`` cores that this process may use; fewer if there are fewer."""
    return sorted(os.sched_getaffinity(0))[:count]


class Watch:
    """Counts the time that others took from ``cores`` since it was made: other processes, and the host (steal)."""

    def __init__(self, cores: list[int]) -> None:
        self.cores, self._start, self._before = cores, time.perf_counter(), _ticks(cores)

    def read(self, processor: float) -> dict[str, float]:
        """``stolen`` and ``others``: shares of the cores' time, given the ``processor`` seconds of our own worker."""
        total = (time.perf_counter() - self._start) * len(self.cores)
        busy, steal = (after - before for after, before in zip(_ticks(self.cores), self._before, strict=True))
        # a tick is charged whole to whoever runs when it comes, so less than two ticks a core says nothing
        slack = 2 * TICK * len(self.cores)
        return {"stolen": steal / total, "others": max(0.0, busy - processor - slack) / total}


def disturbed(share: dict[str, float]) -> bool:
    """Whether a reading of ``Watch`` makes a measurement worthless for absolute figures."""
    return share["stolen"] + share["others"] > TOLERATED


def _ticks(cores: list[int]) -> tuple[float, float]:
    """(busy seconds, stolen seconds) of ``cores`` since the machine started."""
    busy = stolen = 0.0
    names = {f"cpu{core}" for core in cores}
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if name in names:
            user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in fields[:8])
            busy, stolen = busy + user + nice + system + irq + softirq, stolen + steal
    return busy * TICK, stolen * TICK


@cache
def read_bandwidth(cores: tuple[int, ...], size: int, seconds: float = 2.0) -> float:
    """Bytes/s at which ``cores`` read a buffer of ``size`` bytes over and over: the best pass of ``seconds``.

    A buffer as large as what one token reads gives the limit that this very model has, last-level cache included.

    Raises:
        subprocess.CalledProcessError: there is no C compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "bandwidth")
        flags = ["-O3", "-march=native", "-pthread", str(BANDWIDTH), "-o", program]
        subprocess.run(["cc", *flags], check=True)
        os_cores = ",".join(map(str, cores))
        command = ["taskset", "-c", os_cores, program, str(len(cores)), str(size), str(seconds)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def machine() -> dict[str, Any]:
    """Name of the processor, cores, and kernel."""
    name = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if f" {flag}" in flags]
    return {"processor": name, "cores": os.cpu_count(), "vectors": vectors, "kernel": platform.release()}

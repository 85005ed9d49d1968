"""This machine: its processor's name, its memory within every bound of the control groups above this process, and a
process that ends with the one that started it."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# of control groups, versions 2 and 1: folder below /sys/fs/cgroup, bound, in use, what of that can be dropped
_CGROUP_FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def processor_name(root: Path = Path("/")) -> str:
    """What the processor calls itself, else its architecture; ``root`` as for ``available_bytes``."""
    with suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take: the least of the kernel's estimate and of every control group above it.

    Args:
        root: the folder that holds ``proc`` and ``sys``.

    Returns:
        None where nothing tells.
    """
    candidates = [*_meminfo(root, "MemAvailable"), *(available for _, available in _cgroups(root))]
    return max(0, min(candidates)) if candidates else None


def total_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process could ever have: the least of the machine's memory and of every control group's limit.

    Args:
        root: see ``available_bytes``.

    Returns:
        None where nothing tells.
    """
    candidates = [*_meminfo(root, "MemTotal"), *(limit for limit, _ in _cgroups(root))]
    if not candidates and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(candidates) if candidates else None


def end_with_parent(parent: int) -> None:
    """End this process when the *thread* of the process ``parent`` that started it ends (Linux), however that is.

    Elsewhere, and where the parent was gone before, the end of a pipe or socket to it has to tell.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _meminfo(root: Path, name: str) -> Iterator[int]:
    """The line ``name`` of /proc/meminfo, in bytes."""
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                yield int(line.split()[1]) << 10


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """Of each group with a limit: the limit, and what is available; pages that can be dropped count as free."""
    own_cgroups = ["/"]
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines():
            hierarchy_id, controllers, cgroup_path = line.split(":", 2)
            if hierarchy_id == "0" or "memory" in controllers.split(","):
                own_cgroups.append(cgroup_path)
    cgroup_paths = {path for cgroup in own_cgroups for path in (Path(cgroup), *Path(cgroup).parents)}
    for folder, limit_file, usage_file, cache_key in _CGROUP_FILES:
        for path in cgroup_paths:
            cgroup_folder = root / "sys/fs/cgroup" / folder / path.relative_to("/")
            with suppress(OSError, ValueError):  # no such group, or "max"
                limit = int((cgroup_folder / limit_file).read_text(encoding="ascii"))
                available = limit - int((cgroup_folder / usage_file).read_text(encoding="ascii"))
                lines = (cgroup_folder / "memory.stat").read_text(encoding="ascii").splitlines()
                stat = dict(line.split() for line in lines)
                yield limit, available + int(stat.get(cache_key, 0))

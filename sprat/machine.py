"""What is under us: memory, within the bounds of every control group (a container's, a job's) above this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# of control groups, versions 2 and 1: folder below /sys/fs/cgroup, bound, in use, what of that can be dropped
_GROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take: the least of the kernel's estimate and of every control group above it.

    Args:
        root: the folder that holds ``proc`` and ``sys``.

    Returns:
        None where nothing tells.
    """
    found = [*_meminfo(root, "MemAvailable"), *(left for _, left in _groups(root))]
    return max(0, min(found)) if found else None


def total_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process could ever have: the least of the machine's memory and of every control group's bound.

    Args:
        root: see ``available_bytes``.

    Returns:
        None where nothing tells.
    """
    found = [*_meminfo(root, "MemTotal"), *(bound for bound, _ in _groups(root))]
    if not found and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(found) if found else None


def _meminfo(root: Path, name: str) -> Iterator[int]:
    """The line ``name`` of /proc/meminfo, in bytes."""
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                yield int(line.split()[1]) << 10


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Of each group with a bound: the bound, and what it has left; pages of files that can be dropped count as free."""
    own = ["/"]
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines():
            number, kinds, place = line.split(":", 2)
            if number == "0" or "memory" in kinds.split(","):
                own.append(place)
    parts = {Path(place) for name in own for place in (Path(name), *Path(name).parents)}
    for folder, bound, used, cached in _GROUPS:
        for part in parts:
            group = root / "sys/fs/cgroup" / folder / part.relative_to("/")
            with suppress(OSError, ValueError):  # no such group, or "max"
                most = int((group / bound).read_text(encoding="ascii"))
                left = most - int((group / used).read_text(encoding="ascii"))
                stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
                yield most, left + int(stat.get(cached, 0))

"""Is there room for a model? Asked before the first weight is read, so that nothing is half-loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sprat.errors import CheckpointError

_SLACK = 64 << 20  # bytes that the rest of the program is left with


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
    found = [*_machine(root), *_groups(root)]
    return max(0, min(found)) if found else None


def _machine(root: Path) -> Iterator[int]:
    """What could be had without swapping."""
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) << 10


def _groups(root: Path) -> Iterator[int]:
    """What each group with a bound has left; pages of files that can be dropped count as free."""
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
                left = int((group / bound).read_text(encoding="ascii")) - int(
                    (group / used).read_text(encoding="ascii")
                )
                stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
                yield left + int(stat.get(cached, 0))


def check_room(wanted: int, where: str | Path) -> None:
    """Refuse a model of ``wanted`` bytes (read from ``where``) that this machine has no memory for.

    Raises:
        CheckpointError: there is less memory than that.
    """
    free = available_bytes()
    if free is not None and wanted + _SLACK > free:
        raise CheckpointError(
            f"the weights need {wanted / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free",
            where=str(where),
            todo="close other programs, or use a smaller or a quantised model",
        )


@contextmanager
def told_if_full(name: str, where: str | Path) -> Iterator[None]:
    """Turn a failed allocation for tensor ``name`` into one sentence.

    Raises:
        CheckpointError: the block ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        todo = "close other programs, or use a smaller or a quantised model"
        raise CheckpointError(f"no memory left for tensor {name!r}", where=str(where), todo=todo) from None

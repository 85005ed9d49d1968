"""Is there room for a model? Asked before the first weight is read, so that nothing is half-loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sprat.errors import CheckpointError

_SLACK = 64 << 20  # bytes that the rest of the program is left with


def available_bytes() -> int | None:
    """Bytes that this process may still take, by the kernel's estimate and the control group's bound; None: unknown."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) << 10)
        group = Path("/sys/fs/cgroup")
        bound, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        if bound != "max":
            found.append(int(bound) - int(used))
    except (OSError, ValueError, IndexError):
        pass
    return max(0, min(found)) if found else None


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

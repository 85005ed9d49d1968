"""Is there room for a model? Asked before the first weight is read, so that nothing is half-loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sprat.errors import CheckpointError
from sprat.machine import available_bytes

_HEADROOM_BYTES = 64 << 20  # bytes that the rest of the program is left with


def check_available_memory(needed_bytes: int, where: str | Path) -> None:
    """Refuse a model of ``needed_bytes`` bytes (read from ``where``) that this machine has no memory for.

    Raises:
        CheckpointError: there is less memory than that.
    """
    free = available_bytes()
    if free is not None and needed_bytes + _HEADROOM_BYTES > free:
        raise CheckpointError(
            f"the weights need {needed_bytes / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free",
            where=str(where),
            todo="close other programs, or use a smaller or a quantised model",
        )


@contextmanager
def explain_out_of_memory(name: str, where: str | Path) -> Iterator[None]:
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

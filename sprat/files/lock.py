"""One process at a time may work in a pipeline folder.

``flock`` on ``.lock`` inside the folder: the kernel frees it when the process ends, however it ends, so
a stale lock cannot exist. Forked children drop their copy, lest an orphan hold the folder. A file that many may use at
once, as a model in the cache, is held in the same way by a shared lock on itself (``hold_file``).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sprat.errors import MachineError
from sprat.files import atomic

LOCK_NAME = ".lock"
_MAX_BYTES = 32  # bytes
_POLL_SECONDS = 0.02
_open_handles: set[int] = set()


def is_lock(path: Path) -> bool:
    """Whether ``path`` is what ``lock_folder`` leaves behind, a file with a process number, and hides nothing else."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return False
    content = path.read_bytes().strip()
    return not content or content.isdigit()


def _close_handles() -> None:
    for handle in _open_handles:
        os.close(handle)
    _open_handles.clear()


os.register_at_fork(after_in_child=_close_handles)


@contextmanager
def lock_folder(folder: str | Path, *, wait_seconds: float = 0.0) -> Iterator[int]:
    """Hold ``folder`` (made if missing) for this process while the block runs.

    Yields the lock's descriptor: a program that is started with it (``pass_fds``) holds the folder as well.

    Args:
        wait_seconds: for another process that may be about to end.

    Raises:
        MachineError: another process holds it (its pid is named), or the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise MachineError("the folder is a file", where=str(folder), todo="give another folder") from None
    except OSError as error:
        raise (atomic.as_machine_error(error, folder) or error) from None
    deadline = time.monotonic() + wait_seconds
    while not (held := _try_lock(handle)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    if not held:
        pid = os.read(handle, _MAX_BYTES).decode("ascii", "replace").strip() or "unknown"
        os.close(handle)
        what = f"another sprat is at work in this folder (pid {pid})"
        todo = "wait until it ends, or give another folder"
        raise MachineError(what, where=str(folder), todo=todo) from None
    _open_handles.add(handle)
    try:
        os.pwrite(handle, f"{os.getpid():<{_MAX_BYTES - 1}}\n".encode(), 0)
        yield handle
    finally:
        if handle in _open_handles:
            _open_handles.discard(handle)
            os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def hold_file(path: Path) -> None:
    """Say for as long as this process lives that it uses the file ``path``, which is only read; see ``is_held``."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # then it will not be read either
        return
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    _open_handles.add(handle)


def is_held(path: Path) -> bool:
    """Whether a process uses the file ``path`` (``hold_file``), this one included."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)

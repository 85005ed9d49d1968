"""Writes that happen wholly or not at all: a temporary file beside the target, fsync, then rename.

After a power cut or a kill the target holds either its old or its new content. A full disk becomes
one sentence, and the temporary file is removed.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sprat.errors import MachineError

# How libraries say it that give no number: safetensors, tokenizers and shutil; a limit on sizes; NumPy.
_DISK_FULL_MESSAGE = re.compile(r"No space left on device|File too large|\d+ requested and \d+ written")
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEMPORARY_NAME = re.compile(r"\..+\.tmp-\d+")


def as_machine_error(error: BaseException, path: str | Path) -> MachineError | None:
    """``error`` as a sentence about this machine where it means a full or closed disk, else None."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _DISK_FULL_ERRNOS or _DISK_FULL_MESSAGE.search(str(error)):
        return MachineError("the disk is full", where=str(path), todo="free some space and start again")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return MachineError("cannot write here", where=str(path), todo="choose a folder that you may write to")
    return None


@contextmanager
def replace_file(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the same folder; when the block ends well it takes the place of ``path``.

    For writers that want a path of their own (safetensors). Missing folders are made.

    Args:
        durable: fsync the file and its folder, so that it also outlives a power cut.

    Raises:
        MachineError: the disk is full or closed to us; nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            fsync(temporary)
        os.replace(temporary, path)
        if durable:
            fsync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        machine_error = as_machine_error(error, path)
        if machine_error is not None:
            raise machine_error from None
        raise


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a write that was cut off (see ``replace_file``)."""
    return _TEMPORARY_NAME.fullmatch(name) is not None


def fsync(path: Path) -> None:
    """fsync the file or folder at ``path``."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: str | Path, content: bytes, *, durable: bool = True) -> None:
    """Write ``content`` to ``path`` wholly or not at all.

    Raises:
        MachineError: see ``replace_file``.
    """
    with replace_file(path, durable=durable) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, content: str, *, durable: bool = True) -> None:
    """Write ``content`` as UTF-8, newlines kept; see ``write_bytes``."""
    write_bytes(path, content.encode("utf-8"), durable=durable)


def append_line(path: str | Path, line: str, *, durable: bool = True) -> None:
    """Append ``line`` and a newline; on any failure the file is cut back to what it was.

    Raises:
        MachineError: the disk is full or closed to us.
    """
    path = Path(path)
    try:
        with open(path, "ab", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            content = (line + "\n").encode("utf-8")
            try:
                if stream.write(content) != len(content):
                    raise OSError(errno.ENOSPC, "short write")
                if durable:
                    os.fsync(stream.fileno())
            except OSError:
                os.ftruncate(stream.fileno(), size)
                raise
    except OSError as error:
        machine_error = as_machine_error(error, path)
        if machine_error is not None:
            raise machine_error from None
        raise

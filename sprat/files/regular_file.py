"""Reading what may be anything: a pipe or a device in a file's place is refused, not waited for."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from sprat.errors import TrustError


def open_regular_file(path: str | Path) -> io.BufferedReader:
    """The file at ``path``, opened for reading.

    Raises:
        FileNotFoundError, IsADirectoryError, NotADirectoryError: there is no such file.
        TrustError: it is a pipe, a device or a socket.
    """
    if stat.S_ISDIR(os.stat(path).st_mode):
        raise IsADirectoryError(str(path))
    if stat.S_ISREG(os.stat(path).st_mode):
        # Should a pipe take its place just now, O_NONBLOCK keeps us from waiting for its writer.
        raw = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        stream: io.BufferedReader = io.BufferedReader(raw)
        if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            return stream
        stream.close()
    raise TrustError("not a plain file but a pipe or a device", where=str(path), todo="put a file in its place")


def read_bytes(path: str | Path) -> bytes:
    """All of the file at ``path``; empty where there is none.

    Raises:
        IsADirectoryError, NotADirectoryError, TrustError: see ``open_regular_file``.
    """
    try:
        with open_regular_file(path) as stream:
            return stream.read()
    except FileNotFoundError:
        return b""

"""Reading files that are compressed: .gz and .zst as if they were not; whatever else stands as it is.

A stream that ends too early, or holds other bytes than its name says, is a torn file and one sentence. Memory is a
buffer, whatever the file unpacks to.
"""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sprat.errors import DataError, MachineError
from sprat.files.regular_file import open_regular_file

COMPRESSED_SUFFIXES = (".gz", ".zst")


@contextmanager
def open_decompressed(path: Path) -> Iterator[BinaryIO]:
    """The bytes of the file at ``path``, unpacked where its name ends in .gz (RFC 1952) or .zst (RFC 8878).

    Raises:
        DataError: it cannot be read, or it is torn, which may be seen only while it is read.
        MachineError: a .zst file, and neither Python's own zstd (3.14) nor pyarrow is there.
        TrustError: it is a pipe, a device or a socket.
    """
    suffix = path.suffix.lower()
    try:
        with ExitStack() as stack:
            stream: Any = stack.enter_context(open_regular_file(path))
            if suffix == ".gz":
                stream = stack.enter_context(gzip.GzipFile(fileobj=stream, mode="rb"))
            elif suffix == ".zst":
                stream = stack.enter_context(_open_zstd(stream, path))
            yield stream
    except _torn_errors() as error:
        raise _torn(path, error) from None
    except OSError as error:
        is_folder = isinstance(error, IsADirectoryError)
        if error.errno is None and not is_folder:
            raise _torn(path, error) from None
        todo = "check its name and its permissions"
        reason = "it is a folder" if is_folder else error.strerror
        raise DataError(f"cannot read the file: {reason}", where=str(path), todo=todo) from None


def _torn_errors() -> tuple[type[Exception], ...]:
    """What the readers raise; pyarrow raises an OSError without a number."""
    zstd = sys.modules.get("compression.zstd")
    return (EOFError, zlib.error, gzip.BadGzipFile, *([zstd.ZstdError] if zstd else []))


def _torn(path: Path, error: Exception) -> DataError:
    kind = {".gz": "gzip", ".zst": "Zstandard"}.get(path.suffix.lower(), "whole")
    reason = (str(error) or "it ends too early").splitlines()[0]
    return DataError(f"not a {kind} file, or torn: {reason}", where=str(path), todo="copy the file again")


def _open_zstd(stream: BinaryIO, path: Path) -> BinaryIO:
    """``stream`` unpacked by Python's own module, or by pyarrow before 3.14."""
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        try:
            import pyarrow as arrow
        except ImportError:
            todo = "pip install 'sprat[parquet]', or unpack it with zstd -d"
            raise MachineError("a .zst file needs pyarrow or Python 3.14", where=str(path), todo=todo) from None
        unpacked: Any = arrow.CompressedInputStream(arrow.PythonFile(stream, "r"), "zstd")
        return io.BufferedReader(unpacked)
    return zstd.ZstdFile(stream)  # type: ignore[no-any-return,unused-ignore]

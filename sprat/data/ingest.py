"""Read the user's own text: a folder or file of plain text, JSONL or Parquet.

Files are read in the order of their names, so that the same folder always gives the same documents.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sprat.data.document import Document
from sprat.errors import DataError, MachineError

__all__ = ["Document", "read"]

TEXT = (".txt", ".md", ".rst", ".py")
TABLES = (".jsonl", ".parquet")
UNSPECIFIED = "unspecified"


def read(path: str | Path) -> Iterator[Document]:
    """The documents under ``path``, in the order of their file names.

    Plain text files (.txt, .md, .rst, .py) are one document each; a JSONL line or Parquet row is one
    document with a ``text`` field and, if it has them, ``id``, ``source``, ``licence`` and ``domain``.
    Hidden files and folders are passed over, blank documents are left out.

    Raises:
        DataError: nothing there, no file of a known kind, a file that is no UTF-8 text, a row without
            text, or no text at all.
        MachineError: a Parquet file, and pyarrow is not installed.
    """
    path = Path(path)
    root = path if path.is_dir() else path.parent
    known = ", ".join((*TEXT, *TABLES))
    if not path.exists():
        raise DataError("no such folder or file", where=str(path), todo="give a folder with text in it")
    files = list(_files(path)) if path.is_dir() else [path]
    if not files:
        raise DataError("no text files in the folder", where=str(path), todo=f"put {known} files there")
    found = False
    for file in files:
        name = file.relative_to(root).as_posix()
        for document in _read_file(file, name):
            if document.text.strip():
                found = True
                yield document
    if not found:
        raise DataError("the text is empty", where=str(path), todo="give files with text in them")


def _files(folder: Path) -> Iterator[Path]:
    """Files of a known kind below ``folder``, sorted; links to folders are not followed."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in TEXT + TABLES:
                yield Path(place, name)


def _read_file(file: Path, name: str) -> Iterator[Document]:
    """The documents of one file; ``name`` is its path below the folder that was given."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        yield from (_row(row, name, number) for number, row in enumerate(_parquet(file)))
    elif kind == ".jsonl":
        for number, line in enumerate(_text(file).split("\n")):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    where = f"{file}, line {number + 1}"
                    raise DataError(f"not JSON: {error}", where=where, todo="write one object a line") from None
                yield _row(row, name, number)
    else:
        domain = "code" if kind == ".py" else "prose"
        yield Document(name, _text(file), name, UNSPECIFIED, domain)


def _text(file: Path) -> str:
    """The text of ``file``, with line ends as \\n."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", where=str(file), todo="check it") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\x00"
    if "\x00" in text:
        raise DataError("binary data, not UTF-8 text", where=str(file), todo="remove the file or save it as UTF-8")
    return text.replace("\r\n", "\n")


def _row(row: Any, name: str, number: int) -> Document:
    """One JSONL or Parquet row as a document."""
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError("a row without a text", where=f"{name}, row {number + 1}", todo='give each a string "text"')
    identity = f"{name}:{number + 1}"
    return Document(
        id=f"{identity}:{row['id']}" if row.get("id") is not None else identity,
        text=text,
        source=str(row.get("source") or identity),
        licence=str(row.get("licence") or row.get("license") or UNSPECIFIED),
        domain=str(row.get("domain") or "prose"),
    )


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, a batch at a time."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        todo = "pip install 'sprat[parquet]', or give JSONL"
        raise MachineError("Parquet needs the package pyarrow", where=str(file), todo=todo) from None
    try:
        with parquet.ParquetFile(file) as table:
            known = {"text", "id", "source", "licence", "license", "domain"}
            columns = [name for name in table.schema_arrow.names if name in known]
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        what = f"not a Parquet file: {str(error).splitlines()[0]}"
        raise DataError(what, where=str(file), todo="copy the file again") from None

"""Read the user's own text: a folder or file of plain text, JSONL or Parquet.

Files are read in the order of their names, so that the same folder always gives the same documents. What is
not read is counted, with the reason, never passed over in silence:

- In a folder, files of a known kind are read: .txt, .md, .rst and .py as they stand, .jsonl and .parquet row by row.
  Other kinds (.html, .csv, .json, pictures) are left out, since their markup would be learned as text; so are hidden
  files and folders, links that lead to no file, and pipes and devices. A link to a file is read as that file.
- A file that is named by itself must be of a known kind; to learn another as it stands, name it .txt.
- Text is UTF-8, with or without its mark. A file that is not is left out of a folder, and refused by itself; no other
  encoding is guessed, because a wrong guess is learned as readily as a right one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sprat.data.document import Document, printable_label
from sprat.errors import DataError, MachineError
from sprat.files.regular_file import open_regular_file
from sprat.trust.stage_facts import ExcludedText

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")
KNOWN_SUFFIXES = ", ".join((*TEXT_SUFFIXES, *TABLE_SUFFIXES))
UNSPECIFIED = "unspecified"
NOT_TEXT = "binary data, not UTF-8 text"
_NAMES_PER_REASON = 3  # names that a tally keeps of each reason


class ExclusionTally:
    """Counts what is left out, by reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}
        self._sizes: dict[str, int] = {}

    def add(self, why: str, name: str, size: int = 0) -> None:
        """``size`` bytes of ``name`` are left out because of ``why``, which reads well after a number."""
        self._counts[why] = self._counts.get(why, 0) + 1
        self._sizes[why] = self._sizes.get(why, 0) + size
        if self._counts[why] <= _NAMES_PER_REASON:
            self._names.setdefault(why, []).append(name)

    def excluded(self) -> tuple[ExcludedText, ...]:
        """One entry for each reason, in the order in which they came up."""
        counts = self._counts.items()
        return tuple(ExcludedText(why, count, self._sizes[why], tuple(self._names[why])) for why, count in counts)

    def __str__(self) -> str:
        return "; ".join(map(str, self.excluded()))


def read_texts(path: str | Path, tally: ExclusionTally | None = None) -> Iterator[Document]:
    """The documents under ``path``, in the order of their file names; see the module's text for what is read.

    A plain text file is one document; a JSONL line or Parquet row is one document with a ``text`` field and, if it
    has them, ``id``, ``source``, ``licence`` and ``domain``. Blank documents are left out.

    Args:
        tally: is told of whatever is left out.

    Raises:
        DataError: nothing there, no file of a known kind, a single file that is no UTF-8 text, a row without
            text, or no text at all.
        MachineError: a Parquet file, and pyarrow is not installed.
    """
    path = Path(path)
    tally = tally or ExclusionTally()
    if not path.exists():
        raise DataError("no such folder or file", where=str(path), todo="give a folder with text in it")
    if path.is_dir():
        root, files = path, list(_files(path, tally))
        if not files:
            what = "no text files in the folder" + (f": {tally}" if tally.excluded() else "")
            raise DataError(what, where=str(path), todo=f"put {KNOWN_SUFFIXES} files there")
    else:
        root, files = path.parent, [path]
        if not path.is_file():
            raise DataError("a pipe or a device, no file", where=str(path), todo="save its text in a file")
        if path.suffix.lower() not in TEXT_SUFFIXES + TABLE_SUFFIXES:
            todo = f"give {KNOWN_SUFFIXES}; .txt is learned as it is"
            raise DataError("no text file by its name", where=str(path), todo=todo)
    has_text = False
    for file in files:
        name = file.relative_to(root).as_posix()
        for document in _read_file(file, name, tally if path.is_dir() else None):
            if document.text.strip():
                has_text = True
                yield document
            else:
                tally.add("blank documents", document.id)
    if not has_text:
        what = "the text is empty" + (f": {tally}" if tally.excluded() else "")
        raise DataError(what, where=str(path), todo="give files with text in them")


def _files(folder: Path, tally: ExclusionTally) -> Iterator[Path]:
    """Files of a known kind below ``folder``, sorted; links to folders are not followed."""
    for parent, folders, names in os.walk(folder):
        for name in sorted(folders + names):
            path = Path(parent, name)
            relative_name = path.relative_to(folder).as_posix()
            if name.startswith("."):
                tally.add("hidden files and folders", relative_name)
            elif path.is_symlink() and not path.is_file():
                tally.add("links that lead to no file", relative_name)
            elif path.is_dir():
                continue
            elif not path.is_file():
                tally.add("pipes and devices", relative_name)
            elif path.suffix.lower() not in TEXT_SUFFIXES + TABLE_SUFFIXES:
                tally.add(f"files of other kinds than {KNOWN_SUFFIXES}", relative_name)
            else:
                yield path
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _read_file(file: Path, name: str, tally: ExclusionTally | None) -> Iterator[Document]:
    """The documents of one file; ``name`` is its path below the folder that was given.

    Args:
        tally: is told of a file that is no text; without it such a file is an error.
    """
    kind = file.suffix.lower()
    if kind == ".parquet":
        yield from (_row_document(row, name, number) for number, row in enumerate(_parquet(file)))
        return
    text = _decode_file(file)
    if text is None:
        if tally is None:
            raise DataError(NOT_TEXT, where=str(file), todo="remove the file or save it as UTF-8")
        tally.add(f"files of {NOT_TEXT}", name)
    elif kind == ".jsonl":
        for number, line in enumerate(text.split("\n")):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    where = f"{file}, line {number + 1}"
                    raise DataError(f"not JSON: {error}", where=where, todo="write one object a line") from None
                yield _row_document(row, name, number)
    else:
        yield Document(name, text, _replace_undecodable(name), UNSPECIFIED, "code" if kind == ".py" else "prose")


def _decode_file(file: Path) -> str | None:
    """The text of ``of_file``, with line ends as \\n; None where it is not UTF-8 or holds a zero byte."""
    try:
        with open_regular_file(file) as stream:
            text = stream.read().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", where=str(file), todo="check it") from None
    except UnicodeDecodeError:
        return None
    return None if "\x00" in text else text.replace("\r\n", "\n")


def _row_document(row: Any, name: str, number: int) -> Document:
    """One JSONL or Parquet row as a document."""
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError("a row without a text", where=f"{name}, row {number + 1}", todo='give each a string "text"')
    identity = f"{name}:{number + 1}"
    return Document(
        id=f"{identity}:{row['id']}" if row.get("id") is not None else identity,
        text=text,
        source=_replace_undecodable(str(row.get("source") or identity)),
        licence=str(row.get("licence") or row.get("license") or UNSPECIFIED),
        domain=printable_label(str(row.get("domain") or "prose")),
    )


def _replace_undecodable(name: str) -> str:
    """``name`` as a file of UTF-8 holds it, which a name on an old disk may not be."""
    return name.encode("utf-8", "replace").decode()


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
            known_columns = {"text", "id", "source", "licence", "license", "domain"}
            columns = [name for name in table.schema_arrow.names if name in known_columns]
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        what = f"not a Parquet file: {str(error).splitlines()[0]}"
        raise DataError(what, where=str(file), todo="copy the file again") from None

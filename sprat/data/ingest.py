"""Read the user's own text: a folder or file of plain text, JSONL or Parquet.

Files are read in the order of their names, so that the same folder always gives the same documents. What is
not read is counted, with the reason, never passed over in silence:

- In a folder, files of a known kind are read: .txt, .md, .rst and .py as they stand, .jsonl and .parquet, also .gz and
  .zst of the two, row by row.
  Other kinds (.html, .csv, .json, pictures) are left out, since their markup would be learned as text; so are hidden
  files and folders, links that lead to no file, and pipes and devices. A link to a file is read as that file.
- A file that is named by itself must be of a known kind, or hold rows as .json, .csv and .tsv do; to learn another as
  it stands, name it .txt.
- Text is UTF-8, with or without its mark. A file that is not is left out of a folder, and refused by itself; no other
  encoding is guessed, because a wrong guess is learned as readily as a right one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sprat.data.document import Document, printable_label
from sprat.data.folder import ExclusionTally, walk_files
from sprat.data.record import BadRecord
from sprat.data.records import RECORD_SUFFIXES, read_file, record_kind
from sprat.errors import DataError
from sprat.files.compressed import COMPRESSED_SUFFIXES
from sprat.files.regular_file import open_regular_file

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")
KNOWN_SUFFIXES = ", ".join((*TEXT_SUFFIXES, *TABLE_SUFFIXES))
UNSPECIFIED = "unspecified"
_COLUMNS = frozenset({"text", "id", "source", "licence", "license", "domain"})
NOT_TEXT = "binary data, not UTF-8 text"


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
    tally = tally or ExclusionTally()
    yield from read_text_files(path, find_text_files(path, tally), tally)


def find_text_files(
    path: str | Path, tally: ExclusionTally, *, also: Callable[[Path], bool] = lambda _: False
) -> list[Path]:
    """The files of ``path`` that ``read_texts`` would read; see there.

    Args:
        also: which other files of a folder the caller reads himself.
    """
    path = Path(path)
    if not path.exists():
        raise DataError("no such folder or file", where=str(path), todo="give a folder with text in it")
    if path.is_dir():
        files = list(walk_files(path, lambda file: _is_known(file) or also(file), KNOWN_SUFFIXES, tally))
        if not files:
            what = "no text files in the folder" + (f": {tally}" if tally.excluded() else "")
            raise DataError(what, where=str(path), todo=f"put {KNOWN_SUFFIXES} files there")
        return files
    if not path.is_file():
        raise DataError("a pipe or a device, no file", where=str(path), todo="save its text in a file")
    if not _is_known(path) and record_kind(path) not in RECORD_SUFFIXES:
        todo = f"give {KNOWN_SUFFIXES}; .txt is learned as it is"
        raise DataError("no text file by its name", where=str(path), todo=todo)
    return [path]


def read_text_files(
    path: str | Path, files: Sequence[Path], tally: ExclusionTally, *, may_be_blank: bool = False
) -> Iterator[Document]:
    """The documents of ``files``, which are of ``path``; see ``read_texts``.

    Args:
        may_be_blank: no text at all is no error.
    """
    path, has_text = Path(path), False
    root = path if path.is_dir() else path.parent
    for file in files:
        name = file.relative_to(root).as_posix()
        for document in _read_file(file, name, tally if path.is_dir() else None):
            if document.text.strip():
                has_text = True
                yield document
            else:
                tally.add("blank documents", document.id)
    if not has_text and not may_be_blank:
        what = "the text is empty" + (f": {tally}" if tally.excluded() else "")
        raise DataError(what, where=str(path), todo="give files with text in them")


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in TEXT_SUFFIXES or record_kind(path) in TABLE_SUFFIXES


def _read_file(file: Path, name: str, tally: ExclusionTally | None) -> Iterator[Document]:
    """The documents of one file; ``name`` is its path below the folder that was given.

    Args:
        tally: is told of a file that is no text; without it such a file is an error.
    """
    kind = record_kind(file)
    is_read_by_rows = kind == ".parquet" or file.suffix.lower() in COMPRESSED_SUFFIXES
    text = "" if is_read_by_rows else _decode_file(file)
    if text is None:
        if tally is None:
            raise DataError(NOT_TEXT, where=str(file), todo="remove the file or save it as UTF-8")
        tally.add(f"files of {NOT_TEXT}", name)
    elif kind in RECORD_SUFFIXES:
        del text
        for record in read_file(file, str(file), columns=_COLUMNS):
            if isinstance(record, BadRecord):
                raise record.error()
            yield _row_document(record.values, name, record.where.line)
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


def _row_document(row: dict[str, Any], name: str, number: int) -> Document:
    """One JSONL line or Parquet row as a document; ``number`` counts from 1."""
    text = row.get("text")
    if not isinstance(text, str):
        raise DataError("a row without a text", where=f"{name}, row {number}", todo='give each a string "text"')
    identity = f"{name}:{number}"
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

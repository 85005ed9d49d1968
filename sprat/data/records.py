"""Rows of the user's own files: JSONL, JSON, CSV, TSV and Parquet, each also .gz or .zst, one after the other.

- A folder gives the rows of its files in the order of ``folder.walk_files``; files of other kinds are counted.
- A row is a JSON object: a line of JSONL, an item of a JSON list, a record of CSV or TSV under the names of its
  header, a row of Parquet. A .json file may also be objects one behind the other (JSONL by another name), or one object
  that has the list under a key; an object that is itself a conversation (``TURN_COLUMNS``) is one row.
- Text is UTF-8, with or without its mark, lines end in \\n or \\r\\n. No other encoding is guessed.
- What a reader can step over is a ``BadRecord`` with file, line and column: a line that is no JSON, no object, no
  UTF-8 or too long, a CSV record with a stray quote or another number of fields than the header. What it cannot step
  over refuses the file in one DataError: a torn archive, a broken JSON list, a quote that is never closed.
- Memory is that of one record: of JSONL about twice its bytes while it is parsed, plus what Python needs for its values
  (of a JSON file that is one object: of the whole). A record of more than ``max_record_bytes`` is not held.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from sprat.data.csv_records import read_csv
from sprat.data.folder import ExclusionTally, walk_files
from sprat.data.json_stream import JsonStream
from sprat.data.record import NOT_AN_OBJECT, NOT_JSON, TOO_LONG, BadRecord, Record, Where, decode_line, strip_mark
from sprat.errors import DataError, MachineError
from sprat.files.compressed import COMPRESSED_SUFFIXES, open_decompressed

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
KNOWN_SUFFIXES = f"{', '.join(RECORD_SUFFIXES)} (each also {' or '.join(COMPRESSED_SUFFIXES)})"
TURN_COLUMNS = frozenset({"messages", "conversations", "prompt", "completion", "chosen", "rejected"})
MAX_RECORD_BYTES = 128 * 2**20


def read_records(
    path: str | Path, tally: ExclusionTally | None = None, *, max_record_bytes: int = MAX_RECORD_BYTES
) -> Iterator[Record | BadRecord]:
    """The rows of the file or folder at ``path``; see the module's text.

    Args:
        tally: is told of the files of a folder that are not read.
        max_record_bytes: of a record of more bytes (unpacked) no more is held than that.

    Raises:
        DataError: nothing there, no file of a known kind, a file that is torn or cannot be stepped over.
        MachineError: a Parquet or .zst file, and what reads it is not installed.
    """
    path = Path(path)
    tally = tally or ExclusionTally()
    if not path.exists():
        raise DataError("no such folder or file", where=str(path), todo=f"give {KNOWN_SUFFIXES}")
    if path.is_dir():
        files = list(walk_files(path, _is_known, KNOWN_SUFFIXES, tally))
        if not files:
            what = "no data files in the folder" + (f": {tally}" if tally.excluded() else "")
            raise DataError(what, where=str(path), todo=f"put {KNOWN_SUFFIXES} files there")
    else:
        files = [path]
        if not path.is_file():
            raise DataError("a pipe or a device, no file", where=str(path), todo="save its rows in a file")
        if not _is_known(path):
            raise DataError("no data file by its name", where=str(path), todo=f"give {KNOWN_SUFFIXES}")
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        yield from read_file(file, name, max_record_bytes=max_record_bytes)


def read_file(
    file: Path, name: str, *, columns: Collection[str] | None = None, max_record_bytes: int = MAX_RECORD_BYTES
) -> Iterator[Record | BadRecord]:
    """The rows of one file, whose kind its suffix says; see ``read_records``.

    Args:
        name: how places in it are called.
        columns: of Parquet, where columns lie apart, no others are read.
    """
    kind = record_kind(file)
    with open_decompressed(file) as stream:
        if kind == ".parquet":
            yield from _read_parquet(stream, name, columns, is_packed=file.suffix.lower() in COMPRESSED_SUFFIXES)
        elif kind == ".json":
            yield from _read_json(stream, name, max_record_bytes)
        elif kind in (".csv", ".tsv"):
            yield from read_csv(stream, name, "," if kind == ".csv" else "\t", max_record_bytes)
        else:
            yield from _read_jsonl(stream, name, max_record_bytes)


def record_kind(path: Path) -> str:
    """The suffix that says what the rows are: ".jsonl" of a.JSONL.gz."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED_SUFFIXES else path.name).suffix.lower()


def _is_known(path: Path) -> bool:
    return record_kind(path) in RECORD_SUFFIXES


def _read_jsonl(stream: BinaryIO, name: str, max_record_bytes: int) -> Iterator[Record | BadRecord]:
    line_number = 0
    while (text := _next_line(stream, where := Where(name, line_number := line_number + 1), max_record_bytes)) != "":
        if isinstance(text, BadRecord):
            yield text
        elif text.strip():
            record = _parse_line(text, where)
            del text  # a consumer that keeps what it needs of a record of 100 MB holds it once
            yield record


def _next_line(stream: BinaryIO, where: Where, max_record_bytes: int) -> str | BadRecord:
    """The next line with its end; empty where there is none. The end of one that is too long is skipped."""
    size = max_record_bytes + len("\ufeff\r\n".encode())
    line = stream.readline(size)
    is_cut = len(line) == size and not line.endswith(b"\n")
    if where.line == 1:
        line = strip_mark(line, where)
    if is_cut or len(line.rstrip(b"\r\n")) > max_record_bytes:
        while not line.endswith(b"\n") and (line := stream.readline(2**20)):
            pass
        return BadRecord(TOO_LONG, where, f"more than {max_record_bytes:,} bytes")
    return decode_line(line, where)


def _parse_line(text: str, where: Where) -> Record | BadRecord:
    """One line of JSONL; of a key that stands twice the last one counts."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return BadRecord(NOT_JSON, replace(where, column=error.pos + 1), error.msg)
    except RecursionError:
        return BadRecord(NOT_JSON, where, "nested too deep")
    except ValueError as error:  # a number of more digits than Python reads
        return BadRecord(NOT_JSON, where, str(error).partition(";")[0])
    return _as_record(value, where)


def _as_record(value: Any, where: Where) -> Record | BadRecord:
    if isinstance(value, dict):
        return Record(value, where)
    kind = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")
    return BadRecord(NOT_AN_OBJECT, where, kind)


def _read_json(stream: BinaryIO, name: str, max_record_bytes: int) -> Iterator[Record | BadRecord]:
    text = JsonStream(stream, name, max_record_bytes)
    values = text.items() if (is_list := text.peek() == "[") else text.values()
    records: Iterator[Record | BadRecord]
    records = (_as_record(value, Where(name, line, column)) for line, column, value in values)
    if not is_list and isinstance(first := next(records, None), Record):
        second = next(records, None)
        if second is None:
            yield from _rows_of_object(first)
            return
        records = itertools.chain((first, second), records)
    elif not is_list and first is not None:
        yield first
    yield from records


def _rows_of_object(record: Record) -> Iterator[Record | BadRecord]:
    """The rows of a JSON file that is one object: the list of objects under one of its keys, else itself."""
    lists = {key: value for key, value in record.values.items() if isinstance(value, list)}
    keys = [key for key, value in lists.items() if value and isinstance(value[0], dict)]
    if TURN_COLUMNS & record.values.keys() or not keys:
        yield record
        return
    if len(keys) > 1:
        names = ", ".join(map(repr, keys))
        raise DataError(f"lists of rows under {names}", where=record.where.file, todo="leave one of them in the file")
    for row, value in enumerate(lists[keys[0]], start=1):
        yield _as_record(value, Where(record.where.file, row, unit="row"))


def _read_parquet(
    stream: BinaryIO, name: str, columns: Collection[str] | None, *, is_packed: bool
) -> Iterator[Record | BadRecord]:
    """The rows of a Parquet file, a batch at a time."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        todo = "pip install 'sprat[parquet]', or give JSONL"
        raise MachineError("Parquet needs the package pyarrow", where=name, todo=todo) from None
    with tempfile.TemporaryFile() as unpacked:
        if is_packed:  # Parquet is read from its end
            shutil.copyfileobj(stream, unpacked)
        try:
            with parquet.ParquetFile(unpacked if is_packed else stream) as table:
                names = [each for each in table.schema_arrow.names if columns is None or each in columns]
                row_number = 0
                for batch in table.iter_batches(batch_size=256, columns=names):
                    for row in batch.to_pylist():
                        row_number += 1
                        yield Record(row, Where(name, row_number, unit="row"))
        except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
            what = f"not a Parquet file: {str(error).splitlines()[0]}"
            raise DataError(what, where=name, todo="copy the file again") from None

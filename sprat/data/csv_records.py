"""The records of CSV and TSV: each with the line where it begins, and of a fault the column."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO

from sprat.data.record import NOT_CSV, TOO_LONG, WRONG_FIELDS, BadRecord, Record, Where, decode_line, strip_mark
from sprat.errors import DataError


class _CsvLines(Iterator[str]):
    """The lines of a file for csv.reader, which takes as many as a record has; and what of the record is known."""

    def __init__(self, stream: BinaryIO, name: str, max_record_bytes: int) -> None:
        self._stream, self._name, self._limit = stream, name, max_record_bytes
        self._line_number = 0
        self.start_record()

    def start_record(self) -> None:
        """The next line begins a record."""
        self.where = Where(self._name, self._line_number + 1)
        self.lines: list[str] = []
        self.undecodable: BadRecord | None = None
        self._size = 0

    def __next__(self) -> str:
        line = self._stream.readline(self._limit - self._size + 1)
        self._size += len(line)
        self._line_number += 1
        if self._size > self._limit:
            raise BadRecord(TOO_LONG, self.where, f"more than {self._limit:,} bytes; a quote not closed?").error()
        if not line:
            raise StopIteration
        here = Where(self._name, self._line_number)
        text = decode_line(strip_mark(line, here) if self._line_number == 1 else line, here)
        if isinstance(text, BadRecord):
            self.undecodable = self.undecodable or text
            text = line.decode("utf-8", "replace")  # the borders of records are still read
        self.lines.append(text)
        return text

    def fault(self, message: str, delimiter: str) -> BadRecord:
        """What csv.reader said of the record, with the column of the last line's first character that it refuses."""
        *before, line = self.lines

        def is_refused(length: int) -> bool:
            reader = csv.reader([*before, line[:length]], delimiter=delimiter, strict=True)
            try:
                next(reader)
            except csv.Error as error:
                return "unexpected end" not in str(error)
            return False

        low, high = 0, len(line)  # a prefix of low characters is read, one of high is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_refused(middle) else (middle, high)
        return BadRecord(NOT_CSV, Where(self._name, self._line_number, high), message)


def read_csv(stream: BinaryIO, name: str, delimiter: str, max_record_bytes: int) -> Iterator[Record | BadRecord]:
    """The records of CSV or TSV (RFC 4180); the first has the names of the columns."""
    csv.field_size_limit(max(csv.field_size_limit(), max_record_bytes))  # Python's own is 131,072 characters
    lines = _CsvLines(stream, name, max_record_bytes)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        lines.start_record()
        fault: BadRecord | None = None
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                todo = "close it; the rest of the file is in that field"
                raise DataError("a quote that is never closed", where=str(lines.where), todo=todo) from None
            fault, fields = lines.fault(str(error), delimiter), []
        if fields is None:
            return
        fault = lines.undecodable or fault
        if fault is None and fields and header is not None and len(fields) != len(header):
            fault = BadRecord(WRONG_FIELDS, lines.where, f"{len(fields)} where the header has {len(header)}")
        if fault is not None and header is None:
            raise fault.error()
        if fault is not None:
            yield fault
        elif fields and header is None:
            header = _check_header(fields, lines.where)
        elif fields and header is not None:
            yield Record(dict(zip(header, fields, strict=True)), lines.where)


def _check_header(header: list[str], where: Where) -> list[str]:
    """The names of the columns.

    Raises:
        DataError: one has no name, or two have the same.
    """
    names = [name.strip() for name in header]
    for column, name in enumerate(names):
        if not name or name in names[:column]:
            fault = f"two columns called {name!r}" if name else f"column {column + 1} has no name"
            raise DataError(fault, where=str(where), todo="give each column a name of its own in the first line")
    return names

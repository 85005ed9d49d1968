"""A record: a row of a user's file and the place where it stands, or what is wrong with it there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sprat.errors import DataError

NOT_UTF8, NOT_JSON, NOT_AN_OBJECT = "not UTF-8", "not JSON", "not an object"
NOT_CSV, WRONG_FIELDS, TOO_LONG = "not CSV", "fields that do not fit the header", "a record that is too long"
_ADVICE = {
    NOT_UTF8: "save the file as UTF-8",
    NOT_JSON: "write one object a line; what is one list is a .json file",
    NOT_AN_OBJECT: "write one object a line; what is one list is a .json file",
    NOT_CSV: "put fields with quotes, commas or line breaks in double quotes",
    WRONG_FIELDS: "give each line as many fields as the header",
    TOO_LONG: "cut the record, or raise max_record_bytes",
}
_UTF8_MARK, _UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Where:
    """A place in a file.

    Attributes:
        file: its name below the folder that was given.
        line: counted from 1; where the record begins, or its fault is.
        column: of a fault, or where an item of a JSON list begins, counted from 1 in characters, of bytes that are no
            UTF-8 in bytes; None where only the line is known.
        unit: "row" where a file has no lines: Parquet, and the list of a JSON object.
    """

    file: str
    line: int
    column: int | None = None
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.line}" + (f", column {self.column}" if self.column else "")

    @property
    def short(self) -> str:
        """As compilers say it.

        >>> Where("a.jsonl", 3, 7).short, str(Where("a.parquet", 2, unit="row"))
        ('a.jsonl:3:7', 'a.parquet, row 2')
        """
        return f"{self.file}:{self.line}" + (f":{self.column}" if self.column else "")


@dataclass(frozen=True)
class Record:
    """A row: its values by column, as JSON has them (of CSV all strings), and where it stands."""

    values: dict[str, Any]
    where: Where


@dataclass(frozen=True)
class BadRecord:
    """A row that cannot be read. ``reason`` is one of a few, to be counted by; ``detail`` is about this one."""

    reason: str
    where: Where
    detail: str = ""

    def error(self) -> DataError:
        """The same as an error."""
        what = self.reason + (f": {self.detail}" if self.detail else "")
        return DataError(what, where=str(self.where), todo=_ADVICE.get(self.reason, "mend it, or leave it out"))


def strip_mark(line: bytes, where: Where) -> bytes:
    """The first line of a file without its byte order mark.

    Raises:
        DataError: it is the mark of UTF-16.
    """
    if line.startswith(_UTF16_MARKS):
        raise DataError("UTF-16, not UTF-8", where=where.file, todo="save the file as UTF-8")
    return line.removeprefix(_UTF8_MARK)


def decode_line(line: bytes, where: Where) -> str | BadRecord:
    """A line as text; where it is no UTF-8, the byte that is not."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecord(NOT_UTF8, replace(where, column=error.start + 1), f"byte 0x{line[error.start]:02x}")

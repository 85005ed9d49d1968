"""JSON values of a stream, one at a time: the items of a list that need not fit in memory, or values in a row.

A value is parsed by Python's own decoder from a buffer, which is doubled as long as the value does not end in it; so
each character is parsed twice on average, whatever the length, and memory is that of one value.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from sprat.errors import DataError

_CHUNK_BYTES = 2**16
_BLANKS = re.compile(r"[ \t\r\n]*")
_NUMBER_GOES_ON = ("", *"0123456789.eE+-")  # what may stand behind the part of a number that is in the buffer
_INCOMPLETE_CHARS = 16  # so near to the end of the buffer a fault may be a word or an escape that goes on behind it


class JsonStream:
    """The JSON text of ``stream``, UTF-8 with or without its mark.

    Every method raises DataError, with line and column, where the text is no JSON or no UTF-8, or a value is longer
    than ``max_value_bytes``: behind such a place nothing can be found again.
    """

    def __init__(self, stream: BinaryIO, name: str, max_value_bytes: int) -> None:
        self._stream, self._name, self._limit = stream, name, max_value_bytes
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._buffer, self._position, self._ended = "", 0, False
        self._line, self._line_start = 1, 0  # of the position; where that line starts in the buffer, or before it
        self._bytes, self._newlines, self._line_bytes = 0, 0, 0  # read; line ends in them; where the last line starts

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            match = _BLANKS.match(self._buffer, self._position)
            self._advance(match.end() if match else self._position)
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if self._ended:
                return ""
            self._read()

    def items(self) -> Iterator[tuple[int, int, Any]]:
        """Line, column and value of each item of the list that begins here and is all of the text."""
        self._advance(self._position + 1)
        if self.peek() == "]":
            self._advance(self._position + 1)
        else:
            while True:
                self.peek()
                yield self._line, self._column(), self._value()
                mark = self.peek()
                if mark not in (",", "]"):
                    raise self._error("not JSON: ',' or ']' expected", self._position)
                self._advance(self._position + 1)
                if mark == "]":
                    break
        if self.peek():
            raise self._error("not JSON: more behind the end of the list", self._position)

    def values(self) -> Iterator[tuple[int, int, Any]]:
        """Line, column and value of each of the values that stand one behind the other."""
        while self.peek():
            yield self._line, self._column(), self._value()

    def _value(self) -> Any:
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                is_incomplete = error.msg.startswith("Unterminated string")
                if self._ended or not (is_incomplete or error.pos > len(self._buffer) - _INCOMPLETE_CHARS):
                    raise self._error(f"not JSON: {error.msg}", error.pos) from None
            except (RecursionError, ValueError) as error:
                reason = str(error).partition(";")[0] if isinstance(error, ValueError) else "nested too deep"
                raise self._error(f"not JSON: {reason}", self._position) from None
            else:
                is_cut = isinstance(value, int | float) and self._buffer[end : end + 1] in _NUMBER_GOES_ON
                if self._ended or not is_cut:
                    self._advance(end)
                    return value
            if len(self._buffer) - self._position > self._limit:
                what, todo = (
                    f"a record of more than {self._limit:,} bytes",
                    "write one object a line (JSONL), or cut it",
                )
                raise self._error(what, self._position, todo)
            self._read()

    def _column(self) -> int:
        return self._position - self._line_start + 1

    def _advance(self, position: int) -> None:
        count = self._buffer.count("\n", self._position, position)
        if count:
            self._line += count
            self._line_start = self._buffer.rfind("\n", self._position, position) + 1
        self._position = position

    def _read(self) -> None:
        """As much again as is held, so that a long value is not parsed too often."""
        data = self._stream.read(max(_CHUNK_BYTES, len(self._buffer) - self._position))
        try:
            text = self._decode(data, final=not data)
        except UnicodeDecodeError as error:
            before = error.object[: error.start]
            line = self._newlines + before.count(b"\n") + 1
            start = self._bytes + len(data) - len(error.object)  # of the object in the file
            line_start = start + before.rfind(b"\n") + 1 if b"\n" in before else self._line_bytes
            where = f"{self._name}, line {line}, column {start + error.start - line_start + 1}"
            what = f"not UTF-8: byte 0x{error.object[error.start]:02x}"
            raise DataError(what, where=where, todo="save the file as UTF-8") from None
        if b"\n" in data:
            self._newlines += data.count(b"\n")
            self._line_bytes = self._bytes + data.rfind(b"\n") + 1
        self._bytes += len(data)
        self._ended = not data
        self._buffer = self._buffer[self._position :] + text
        self._line_start -= self._position
        self._position = 0

    def _error(self, what: str, position: int, todo: str = "mend it there") -> DataError:
        self._advance(max(position, self._position))
        return DataError(what, where=f"{self._name}, line {self._line}, column {self._column()}", todo=todo)

"""Read character vectors out of an R package's lazy-load database, without R.

An R package keeps its data in two files. ``Rdata.rdx`` is an index, a gzipped R value whose
``variables`` map each name to (offset, length) in ``Rdata.rdb``; there lies the value itself: its length
in four bytes, then zlib. Values are in R's XDR serialisation (R Internals, section 1.8): big-endian, each
item a 4-byte word that holds its type in the low byte and flags for attributes and tags above it.

Only what a package of texts needs is read: lists, integer, real, logical and character vectors,
attributes, symbols and back references. Code, environments and S4 objects are not.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

from sprat.errors import DataError

NIL, REFERENCE, SYMBOL, PAIRS, CHARS = 254, 255, 1, 2, 9
LOGICAL, INTEGER, REAL, STRINGS, LIST = 10, 13, 14, 16, 19
HAS_ATTRIBUTES, HAS_TAG = 0x200, 0x400
MAX_OBJECT_BYTES = 1 << 28  # bytes; no text of ours comes near


def texts(database: Path) -> dict[str, list[str]]:
    """The character vectors of ``database`` (an Rdata.rdb with its Rdata.rdx beside it), by name, sorted.

    Raises:
        DataError: a file is missing or not what the format says.
    """
    try:
        index = _Reader(gzip.decompress(database.with_suffix(".rdx").read_bytes())).value()["variables"]
        content = database.read_bytes()
        result: dict[str, list[str]] = {}
        for name, (offset, length) in sorted(index.items()):
            (size,) = struct.unpack_from(">I", content, offset)
            if size > MAX_OBJECT_BYTES:
                raise ValueError("an object is too large")
            stream = zlib.decompressobj()
            plain = stream.decompress(content[offset + 4 : offset + length], size + 1)
            if len(plain) != size or not stream.eof:
                raise ValueError("an object is not as long as it says")
            value = _Reader(plain).value()
            if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
                result[name] = value
        return result
    except OSError as error:
        raise DataError(f"cannot read R data: {error}", where=str(database), todo="fetch the package again") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error, zlib.error, EOFError) as error:
        raise DataError(f"not R data: {error}", where=str(database), todo="fetch the package again") from None


class _Reader:
    """A cursor over one serialised R value."""

    def __init__(self, content: bytes) -> None:
        """Check the header: the letter X, a line end, format version 2 or 3, two R versions, an encoding name."""
        if content[:2] != b"X\n":
            raise ValueError("no XDR header")
        self.content, self.position = content, 2
        self.symbols: list[str] = []
        version, _, _ = (self._word() for _ in range(3))
        if version == 3:
            self._bytes(self._word())
        elif version != 2:
            raise ValueError(f"version {version}")

    def value(self) -> Any:
        """The next value: str, None, list, or a dict where a list has names."""
        flags = self._word()
        kind = flags & 0xFF
        if kind == NIL:
            return None
        if kind == CHARS:
            return self._chars(flags)
        if kind == REFERENCE:
            return self.symbols[((flags >> 8) or self._word()) - 1]
        if kind == SYMBOL:
            self.symbols.append(str(self.value()))
            return self.symbols[-1]
        if kind == PAIRS:
            return self._pairs(flags)
        values = self._vector(kind)
        attributes = self.value() if flags & HAS_ATTRIBUTES else None
        names = (attributes or {}).get("names")
        return dict(zip(names, values, strict=True)) if names else values

    def _vector(self, kind: int) -> list[Any]:
        """The elements of a vector of type ``kind``."""
        count = self._word()
        if not 0 <= count <= len(self.content):
            raise ValueError("a vector is longer than its file")
        if kind in (INTEGER, LOGICAL):
            return list(struct.unpack(f">{count}i", self._bytes(4 * count)))
        if kind == REAL:
            return list(struct.unpack(f">{count}d", self._bytes(8 * count)))
        if kind in (STRINGS, LIST):
            return [self.value() for _ in range(count)]
        raise ValueError(f"type {kind} is not data")

    def _pairs(self, flags: int) -> dict[str, Any]:
        """A pairlist, as attributes are kept: tag and value, then the rest of the list."""
        result: dict[str, Any] = {}
        while flags & 0xFF == PAIRS:
            if flags & HAS_ATTRIBUTES:
                self.value()
            tag = str(self.value()) if flags & HAS_TAG else ""
            result[tag] = self.value()
            flags = self._word()
        return result

    def _chars(self, flags: int) -> str:
        """One string; R's NA, which has length -1, becomes an empty one. Bit 14 marks Latin-1."""
        length = self._word()
        encoding = "latin-1" if flags & (1 << 14) else "utf-8"
        return self._bytes(length).decode(encoding) if length >= 0 else ""

    def _word(self) -> int:
        """The next big-endian 4-byte integer."""
        word: int = struct.unpack(">i", self._bytes(4))[0]
        return word

    def _bytes(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        chunk = self.content[self.position : self.position + count]
        if count < 0 or len(chunk) != count:
            raise ValueError("the value is cut short")
        self.position += count
        return chunk

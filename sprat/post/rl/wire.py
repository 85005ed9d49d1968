"""What the roles of RL say to each other: a JSON object and raw arrays, each message behind its lengths. No pickle.

    4 bytes  length of the header        header: {"body": {...}, "arrays": [[name, dtype, [shape]], ...]}
    8 bytes  length of the payload       payload: the arrays' bytes, one after the other, little-endian

Tokens in, tokens out: nothing but ids, log-probabilities and settings crosses it. A message is checked before it is
believed: lengths have bounds, the arrays fill the payload to the byte, dtypes are of a short list, and the header is
JSON without a name twice and without NaN. What does not hold ends the connection by one sentence.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from sprat.errors import TrustError
from sprat.files.json import reject_duplicate_keys

Arrays = Mapping[str, NDArray[Any]]
MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES = 1 << 26, 1 << 31
MAX_DIMENSIONS = 4
DTYPES = {name: np.dtype(name) for name in ("<i4", "<i8", "<f4", "<f8", "<i2", "|u1")}
LENGTHS = struct.Struct("!IQ")


@dataclass(frozen=True)
class Message:
    """A checked message; its fields are asked for by type."""

    body: dict[str, Any]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What it is about."""
        return self.text("kind")

    def integer(self, name: str, low: int = 0) -> int:
        """The whole number ``name``. Raises TrustError: it is none, or below ``low``."""
        value = self.body.get(name)
        if type(value) is not int or value < low:
            _refuse(f"{name} is {value!r:.80}, not a whole number from {low} on")
        return value

    def number(self, name: str) -> float:
        """The number ``name``. Raises TrustError: it is none."""
        value = self.body.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            _refuse(f"{name} is {value!r:.80}, not a number")
        return float(value)

    def text(self, name: str) -> str:
        """The text ``name``. Raises TrustError: it is none."""
        value = self.body.get(name)
        if not isinstance(value, str):
            _refuse(f"{name} is {value!r:.80}, not a text")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """The JSON object ``name``. Raises TrustError: it is none."""
        value = self.body.get(name)
        if not isinstance(value, dict):
            _refuse(f"{name} is {value!r:.80}, not an object")
        return value

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The list of JSON objects ``name``. Raises TrustError: it is none."""
        value = self.body.get(name)
        if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
            _refuse(f"{name} is no list of objects")
        return value

    def array(self, name: str, dtype: str, dimensions: int = 1) -> NDArray[Any]:
        """The array ``name``. Raises TrustError: there is none of this dtype and so many dimensions."""
        value = self.arrays.get(name)
        if value is None or value.dtype != DTYPES[dtype] or value.ndim != dimensions:
            _refuse(f"{name} is no {dtype} array of {dimensions} dimensions")
        return value


def _refuse(fault: str) -> NoReturn:
    todo = "run the same version of sprat on all machines"
    raise TrustError(f"a message cannot be read: {fault}", where="wire", todo=todo)


def pack(body: Mapping[str, Any], arrays: Arrays | None = None) -> list[bytes | memoryview]:
    """The pieces of a message, to be sent one after the other.

    Raises:
        ValueError: an array's dtype does not travel, a number is not finite, or it is too long.
    """
    ready = {name: np.ascontiguousarray(value) for name, value in (arrays or {}).items()}
    if unknown := {value.dtype.str for value in ready.values()} - DTYPES.keys():
        raise ValueError(f"arrays of {', '.join(sorted(unknown))} do not cross the wire")
    listing = [[name, value.dtype.str, list(value.shape)] for name, value in ready.items()]
    header = json.dumps({"body": body, "arrays": listing}, separators=(",", ":"), allow_nan=False).encode()
    size = sum(value.nbytes for value in ready.values())
    if len(header) > MAX_HEADER_BYTES or size > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a message of {len(header)} + {size} bytes is too long")
    parts = [value.reshape(-1).view(np.uint8).data for value in ready.values() if value.nbytes]
    return [LENGTHS.pack(len(header), size) + header, *parts]


def unpack_header(lengths: bytes) -> tuple[int, int]:
    """Bytes of header and payload that follow ``lengths``. Raises TrustError: more than a message may have."""
    header, payload = LENGTHS.unpack(lengths)
    if header > MAX_HEADER_BYTES or payload > MAX_PAYLOAD_BYTES:
        _refuse(f"it claims {header} + {payload} bytes")
    return header, payload


def unpack(header: bytes | bytearray, payload: bytes | bytearray) -> Message:
    """The message of a whole header and payload. Raises TrustError: they do not hold together."""
    try:
        content = json.loads(header, object_pairs_hook=reject_duplicate_keys, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        _refuse(f"its header is no JSON: {error}")
    if not isinstance(content, dict) or content.keys() != {"body", "arrays"}:
        _refuse("its header is no object of body and arrays")
    body, listing = content["body"], content["arrays"]
    if not isinstance(body, dict) or not isinstance(listing, list):
        _refuse("its header is no object of body and arrays")
    arrays, start = dict[str, NDArray[Any]](), 0
    for row in listing:
        name, dtype, shape = _parse_row(row)
        count = math.prod(shape)
        stop = start + count * dtype.itemsize
        if name in arrays or stop > len(payload):
            _refuse(f"the array {name!r:.80} stands twice, or ends behind the payload")
        arrays[name] = np.frombuffer(payload, dtype, count, start).reshape(shape)
        start = stop
    if start != len(payload):
        _refuse(f"its arrays end at byte {start}, the payload at {len(payload)}")
    return Message(body, arrays)


def _parse_row(row: Any) -> tuple[str, np.dtype[Any], list[int]]:
    """Name, dtype and shape of an array, as the header says them."""
    if isinstance(row, list) and len(row) == 3:
        name, dtype, shape = row
        known = isinstance(name, str) and isinstance(dtype, str) and dtype in DTYPES
        bounded = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
        if known and bounded and all(type(side) is int and 0 <= side <= MAX_PAYLOAD_BYTES for side in shape):
            return name, DTYPES[dtype], shape
    _refuse(f"the array {row!r:.80} is not sound")

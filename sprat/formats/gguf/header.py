"""The header of a GGUF file (versions 2 and 3), read as if its author meant harm.

A file is magic, version, two counts, so many key-value pairs, so many tensor descriptions, padding, and the tensors.
Everything is little-endian and every length stands before what it measures, so a reader that believes the file
allocates what the file says. This one believes nothing: each count is bounded by a constant and by the bytes that
are left, each string and array must fit into the file, names stand once, and each tensor has known type, whole blocks,
an aligned place inside the file and no byte in common with another. Only metadata is read, no tensor.

Left out: version 1 (32-bit counts; nobody writes it), big-endian files, models cut into several files (each tells
in which it is; merge them first), arrays of arrays (no key has one).
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sprat.errors import CheckpointError

Value = int | float | bool | str
Values = list[int] | list[float] | list[bool] | list[str]

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
HEADER_BYTES = 64 << 20  # of keys, values and descriptions; a vocabulary of half a million tokens needs a third
KEYS, TENSORS, ELEMENTS = 1 << 14, 1 << 16, 1 << 22  # most pairs, most tensors, most array elements in all
KEY_BYTES, NAME_BYTES, TEXT_BYTES = 1 << 10, 1 << 8, 1 << 22
RANK, DIMENSION = 4, 1 << 31
STRING, ARRAY = 8, 9  # types of values that are no number
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GGMLType:
    """A tensor type: how many weights one block holds, and in how many bytes."""

    name: str
    block_weights: int
    block_bytes: int


GGML_TYPES = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    10: GGMLType("Q2_K", 256, 84),
    11: GGMLType("Q3_K", 256, 110),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    30: GGMLType("BF16", 1, 2),
}
# fmt: off
_OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}
# fmt: on


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: ``shape`` row-major as torch has it (outermost first), ``offset`` and ``nbytes`` in the file."""

    kind: GGMLType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself: ``metadata`` its key-value pairs, ``tensors`` its tensors by name."""

    path: Path
    metadata: dict[str, Value | Values]
    tensors: dict[str, TensorInfo]


def read_header(path: str | Path) -> Header:
    """Read and check the header of ``path``.

    Raises:
        CheckpointError: there is no such file, or it does not hold together; the sentence names the key or tensor.
    """
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            return _Reader(stream, path).read()
    except FileNotFoundError:
        raise CheckpointError("no such file", where=str(path), todo="give the path of a GGUF file") from None
    except OSError as error:
        raise _broken(path, str(error.strerror or error)) from None


class _Reader:
    """Takes a header apart, front to back; ``at`` names what is being read."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.path, self.at = stream, path, "the first bytes"
        self.size = os.fstat(stream.fileno()).st_size
        self.left = min(self.size, HEADER_BYTES)
        self.elements = ELEMENTS

    def read(self) -> Header:
        """The whole header."""
        if (head := self.take(4)) != MAGIC:
            if head == b"vers":
                from sprat.formats.safetensors import refuse_lfs_pointer

                self.stream.seek(0)
                refuse_lfs_pointer(self.stream.read(8), self.path)
            raise self.broken("it does not begin with GGUF")
        version = self.number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            why = "a big-endian file" if swapped in VERSIONS else f"version {version}"
            raise self.broken(f"{why} is not supported, only versions 2 and 3 in little-endian")
        tensors, pairs = self.number("Q"), self.number("Q")
        if tensors > TENSORS or pairs > KEYS:
            raise self.broken(f"it claims {tensors} tensors and {pairs} keys")
        metadata: dict[str, Value | Values] = {}
        for _ in range(pairs):
            self.at = f"the key after {next(reversed(metadata), 'the counts')!r}"
            key = self.text(KEY_BYTES)
            self.at = f"key {key!r}"
            if key in metadata:
                raise self.broken("it stands twice")
            metadata[key] = self.value()
        self.at = "key 'general.alignment'"
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self.broken(f"{alignment!r} is no power of two up to 65536")
        return Header(self.path, metadata, self.tensors(tensors, alignment))

    def tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        """The tensor descriptions, and their places in the file."""
        descriptions: dict[str, tuple[GGMLType, tuple[int, ...], int, int]] = {}
        for _ in range(count):
            self.at = f"the tensor after {next(reversed(descriptions), 'the keys')!r}"
            name = self.text(NAME_BYTES)
            self.at = f"tensor {name!r}"
            if name in descriptions:
                raise self.broken("it stands twice")
            descriptions[name] = self.description()
        start = -(-self.stream.tell() // alignment) * alignment
        entries: dict[str, TensorInfo] = {}
        free = start
        for name, (kind, shape, offset, nbytes) in sorted(descriptions.items(), key=lambda item: item[1][2]):
            self.at = f"tensor {name!r}"
            if offset % alignment:
                raise self.broken(f"its offset {offset} is no multiple of {alignment}")
            if start + offset < free:
                raise self.broken("it overlaps the tensor before it")
            free = start + offset + nbytes
            if free > self.size:
                raise self.broken(f"it ends at byte {free}, the file at {self.size}")
            entries[name] = TensorInfo(kind, shape, start + offset, nbytes)
        return entries

    def description(self) -> tuple[GGMLType, tuple[int, ...], int, int]:
        """(type, row-major shape, offset after the header, bytes) of one tensor."""
        rank = self.number("I")
        if not 1 <= rank <= RANK:
            raise self.broken(f"it has {rank} dimensions")
        shape = [self.number("Q") for _ in range(rank)]
        if not all(1 <= size <= DIMENSION for size in shape):
            raise self.broken(f"its dimensions are {shape}")
        number, offset = self.number("I"), self.number("Q")
        if number not in GGML_TYPES:
            known = ", ".join(kind.name for kind in GGML_TYPES.values())
            raise self.broken(f"its type {_OTHERS.get(number, number)} is not one of {known}")
        kind = GGML_TYPES[number]
        if shape[0] % kind.block_weights:
            raise self.broken(f"rows of {shape[0]} weights are no whole blocks of {kind.name}")
        return kind, tuple(reversed(shape)), offset, math.prod(shape) // kind.block_weights * kind.block_bytes

    def value(self) -> Value | Values:
        """One value of a pair, or an array of them."""
        kind = self.number("I")
        if kind != ARRAY:
            return self.text(TEXT_BYTES) if kind == STRING else self.number(self.scalar(kind))
        kind, count = self.number("I"), self.number("Q")
        self.elements -= count
        if self.elements < 0:
            raise self.broken(f"with it the arrays have more than {ELEMENTS} elements")
        if kind == STRING:
            if count * 8 > self.left:
                raise self.broken(f"{count} strings do not fit into the file")
            return [self.text(TEXT_BYTES) for _ in range(count)]
        letter = self.scalar(kind)
        return list(struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(f"<{letter}"))))

    def scalar(self, kind: int) -> str:
        """The struct letter of a value type."""
        if kind not in SCALARS:
            raise self.broken(f"its value has the type {kind}")
        return SCALARS[kind]

    def text(self, most: int) -> str:
        """A string of at most ``most`` bytes."""
        length = self.number("Q")
        if length > most:
            raise self.broken(f"a string claims {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.broken("a string is no UTF-8") from None

    def number(self, letter: str) -> int:
        """One scalar; the annotation is right where it is used for counts."""
        value: int = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]
        return value

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if count > self.left:
            raise self.broken(f"{count} more bytes are asked for, {self.left} are left")
        self.left -= count
        content = self.stream.read(count)
        if len(content) < count:
            raise self.broken("the file ends within it")
        return content

    def broken(self, why: str) -> CheckpointError:
        """The sentence about what is being read."""
        return _broken(self.path, f"{self.at}: {why}")


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"not a sound GGUF file: {why}", where=str(path), todo="fetch or convert it again")

"""A GGUF file (version 3, little-endian), written: what ``header`` reads.

Magic, version, counts, key-value pairs, tensor descriptions, and each tensor at the next multiple of the alignment.
Places follow from types and shapes, so tensors are asked for their bytes one after the other, as the file grows, and
none is held longer than that. The file takes its name when all of it is on disk.

Numbers have the types that llama.cpp asks for: whole ones are uint32 alone and int32 in arrays, others float32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sprat.errors import CheckpointError
from sprat.files.atomic import replace_file
from sprat.formats.gguf.blocks import Array
from sprat.formats.gguf.header import ALIGNMENT, ARRAY, GGML_TYPES, MAGIC, SCALARS, STRING, Value, Values

TYPE_NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}
_BOOL, _FLOAT, _WHOLE, _WHOLE_IN_ARRAY, _LARGE = 7, 6, 4, 5, 10


@dataclass(frozen=True)
class TensorData:
    """One tensor to be written.

    Attributes:
        name: in the file.
        kind: its type, by ggml's name.
        shape: row-major.
        chunks: gives its bytes in pieces (uint8 arrays), in order.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Array]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        kind = GGML_TYPES[TYPE_NUMBERS[self.kind]]
        return math.prod(self.shape) // kind.block_weights * kind.block_bytes


def write_file(path: str | Path, metadata: Mapping[str, Value | Values], tensors: Sequence[TensorData]) -> None:
    """Write a GGUF file; empty arrays are left out, as the format has no type for them.

    Raises:
        CheckpointError: a value is none that the format has, or a tensor gave other bytes than its shape says.
        MachineError: the disk is full or closed to us; what was there is untouched.
    """
    head = _head({key: value for key, value in metadata.items() if value != []}, tensors)
    with replace_file(path) as temporary, open(temporary, "wb") as stream:
        stream.write(head)
        for tensor in tensors:
            start = stream.tell()
            for chunk in tensor.chunks():
                stream.write(chunk.data)
            if (count := stream.tell() - start) != tensor.nbytes:
                fault = f"tensor {tensor.name!r} came to {count} bytes, its shape says {tensor.nbytes}"
                raise CheckpointError(fault, where=str(path), todo="export a model that is whole")
            stream.write(bytes(-tensor.nbytes % ALIGNMENT))


def _head(metadata: Mapping[str, Value | Values], tensors: Sequence[TensorData]) -> bytes:
    """All that stands before the first tensor."""
    head = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        try:
            head += _text(key) + _pair(value)
        except (struct.error, OverflowError, UnicodeError) as error:
            todo = "correct it in the model's config or tokenizer"
            raise CheckpointError(f"{str(value)[:60]!r} cannot be written: {error}", where=key, todo=todo) from None
    offset = 0
    for tensor in tensors:
        head += _text(tensor.name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        head += struct.pack("<IQ", TYPE_NUMBERS[tensor.kind], offset)
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return bytes(head) + bytes(-len(head) % ALIGNMENT)


def _pair(value: Value | Values) -> bytes:
    """The type and the bytes of a value."""
    if not isinstance(value, list):
        kind = _kind(value)
        return struct.pack("<I", kind) + _item(kind, value)
    kind = _kind(value[0])
    kind = _WHOLE_IN_ARRAY if kind == _WHOLE else kind
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(_item(kind, item) for item in value)


def _kind(value: Value) -> int:
    """The number of a value's type."""
    if isinstance(value, str):
        return STRING
    if isinstance(value, float):
        return _FLOAT
    return _BOOL if isinstance(value, bool) else _WHOLE if value < 1 << 32 else _LARGE


def _item(kind: int, value: Value) -> bytes:
    return _text(str(value)) if kind == STRING else struct.pack(f"<{SCALARS[kind]}", value)


def _text(text: str) -> bytes:
    content = text.encode("utf-8")
    return struct.pack("<Q", len(content)) + content

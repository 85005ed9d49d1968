"""The safetensors files of a model: checked before they are believed, then read tensor by tensor.

A file is eight bytes of length, that many bytes of JSON, and the tensors. The JSON is foreign, so every number in it
is checked against the file before any of them is used: names once, shapes of bounded whole numbers, each range as
long as its shape and dtype say, ranges side by side without gap or overlap from the header to the end of the file.
What is left is arithmetic on plain integers.

Tensors are read straight into the memory that they will live in, and not through a mapping of the file: a load
never holds more than the model and the one tensor that is being converted.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sprat.errors import CheckpointError
from sprat.files.json import load_json_object, reject_duplicate_keys
from sprat.formats.memory import explain_out_of_memory

HEADER_BYTES = 32 << 20  # of JSON; a hundred thousand tensors need half of it
_RANK, _DIMENSION = 8, 1 << 40
_EARLIER = ("model.safetensors.index.json", "quant.json")  # what says how an earlier model in a folder is to be read
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``offset`` and ``nbytes`` in ``file``, in bytes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Shards:
    """The tensors of some safetensors files by name.

    Attributes:
        entries: tensor name -> where it lies.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        """Check the headers of ``files``.

        Raises:
            CheckpointError: a file is missing, torn, or holds a tensor that another file holds too.
        """
        self.entries: dict[str, TensorInfo] = {}
        for file in files:
            for name, entry in read_header(file).items():
                if name in self.entries:
                    raise _corrupt(file, f"tensor {name!r} also stands in {self.entries[name].file.name}")
                self.entries[name] = entry

    def read(self, name: str) -> Tensor:
        """Tensor ``name`` as it was written, in memory of its own.

        Raises:
            CheckpointError: the file ends early, or there is no memory.
        """
        entry = self.entries[name]
        with explain_out_of_memory(name, entry.file):
            out = torch.empty(entry.shape, dtype=entry.dtype)
        self._fill(name, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Tensor ``name`` into ``out`` [same shape], converted to its dtype and device.

        Raises:
            CheckpointError: see ``read``.
        """
        same = out.dtype == self.entries[name].dtype and out.device.type == "cpu" and out.is_contiguous()
        if same:
            self._fill(name, out)
        else:
            out.copy_(self.read(name))

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same numbers.

        Raises:
            CheckpointError: see ``read``.
        """
        a, b = self.entries[name], self.entries[other]
        return a.shape == b.shape and torch.equal(self.read(name).float(), self.read(other).float())

    def _fill(self, name: str, out: Tensor) -> None:
        """Read the bytes of ``name`` into the contiguous ``out``."""
        entry = self.entries[name]
        view = out.detach().reshape(-1).view(torch.uint8).numpy().data if entry.nbytes else memoryview(b"")
        try:
            with open(entry.file, "rb", buffering=0) as stream:
                stream.seek(entry.offset)
                num_read = 0
                while num_read < entry.nbytes:
                    count = stream.readinto(view[num_read:])
                    if not count:
                        raise _corrupt(entry.file, f"it ends within tensor {name!r}")
                    num_read += count
        except OSError as error:
            raise _corrupt(entry.file, str(error.strerror or error)) from None


def refuse_lfs_pointer(head: bytes, file: Path) -> None:
    """Raise CheckpointError where ``file``, whose first bytes are ``head``, only says where Git LFS keeps it."""
    if head[:8] == b"version ":  # of https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
        todo = "fetch the file itself: git lfs pull, in its folder"
        raise CheckpointError("a pointer of Git LFS, not the weights", where=str(file), todo=todo)


def remove_other_weights(folder: Path) -> None:
    """Take away what of an earlier model in ``folder`` would be read with, or instead of, a new ``model.safetensors``.

    Raises:
        OSError: the folder is closed to us.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in _EARLIER or _SHARD.fullmatch(path.name):
            path.unlink()


def sort_metadata(file: Path) -> None:
    """Put the metadata in the header of ``file`` in order: safetensors writes them in another one every time.

    Raises:
        OSError: the file cannot be read or written.
    """
    with open(file, "r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        stream.seek(8)
        stream.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object at ``path``, a file of a model's folder.

    Raises:
        CheckpointError: the file is missing, or holds none.
    """
    try:
        return load_json_object(path, CheckpointError, problem="not readable as JSON", todo="fetch it again")
    except FileNotFoundError:
        raise CheckpointError("a file is missing", where=str(path), todo="give the folder of a model") from None


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensor name -> where it lies in ``file``; nothing but the header is read.

    Raises:
        CheckpointError: the file is missing, or its header does not hold; the sentence names the tensor.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(8)
            refuse_lfs_pointer(head, file)
            if len(head) < 8:
                raise _corrupt(file, "it is too short")
            (length,) = struct.unpack("<Q", head)
            if length > min(HEADER_BYTES, size - 8):
                raise _corrupt(file, f"its header claims {length} bytes of {size}")
            text = stream.read(length)
    except FileNotFoundError:
        todo = "fetch or save the model again"
        raise CheckpointError("the weights are missing", where=str(file), todo=todo) from None
    except OSError as error:
        raise _corrupt(file, str(error.strerror or error)) from None
    table = _parse(text, file)
    table.pop("__metadata__", None)
    entries = {name: _entry(name, row, file, 8 + length) for name, row in table.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise _corrupt(file, f"tensor {name!r} begins at byte {entry.offset}, the one before ends at {end}")
        end += entry.nbytes
    if end != size:
        raise _corrupt(file, f"its tensors end at byte {end}, the file at {size}")
    return entries


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    """The JSON object of the header; a name that stands twice is refused."""
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=reject_duplicate_keys)
    except (ValueError, RecursionError) as error:
        raise _corrupt(file, f"its header is no JSON: {error}") from None
    if not isinstance(table, dict):
        raise _corrupt(file, "its header is no JSON object")
    return table


def _entry(name: str, row: Any, file: Path, start: int) -> TensorInfo:
    """One row of the header, checked by itself; ``start`` is where the tensors begin."""
    row = row if isinstance(row, dict) else {}
    kind, shape, ends = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise _corrupt(file, f"tensor {name!r} has dtype {kind!r}, which is not known")
    if not _are_bounded(shape, _RANK) or not _are_bounded(ends, 2) or len(ends) != 2:
        raise _corrupt(file, f"tensor {name!r} has no sound shape and data_offsets")
    nbytes = math.prod(shape) * DTYPES[kind].itemsize
    if ends[1] - ends[0] != nbytes:
        raise _corrupt(file, f"tensor {name!r} of shape {shape} takes {nbytes} bytes, not {ends[1] - ends[0]}")
    return TensorInfo(file, DTYPES[kind], tuple(shape), start + ends[0], nbytes)


def _are_bounded(values: Any, most: int) -> bool:
    """Whether ``values`` is a list of at most ``most`` bounded natural numbers."""
    if not isinstance(values, list) or len(values) > most:
        return False
    return all(type(value) is int and 0 <= value <= _DIMENSION for value in values)


def _corrupt(file: Path, why: str) -> CheckpointError:
    """The sentence about a file that does not hold together."""
    return CheckpointError(f"not a whole safetensors file: {why}", where=str(file), todo="fetch or save it again")

"""The process that touches foreign tensors: raw blocks in from one descriptor, plain arrays out to another.

Run as ``python -m sprat.formats.gguf.decode IN OUT MEMORY SECONDS``: two open descriptors, and bounds in bytes of
address space and CPU seconds that the process puts upon itself before it reads a byte. The jobs come as JSON on stdin,
were made by the parent from a checked header, and hold nothing but numbers and names of types. The answer is one JSON
object on stdout: ``{}``, or the tensor and what was wrong with it. Nothing else leaves the process.

Rows are decoded some millions of weights at a time, so memory does not grow with the tensor.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import dataclass, field

import numpy as np

from sprat.formats.gguf import blocks
from sprat.formats.gguf.blocks import Array

CHUNK = 4 << 20  # weights that are decoded at a time


@dataclass(frozen=True)
class Job:
    """One tensor to decode, or one that is to become a part of another.

    Attributes:
        tensor: its name in the file, for messages.
        kind: its type; ``block`` bytes for each block of ``weights``.
        offset: of its first byte in the file.
        rows, width: its shape; ``unit`` rows at a time are reordered.
        reorder: "pairs" sorts the rows of a unit from (i, half) to (half, i), "transpose" transposes it.
        dense: "float32" or "bfloat16" to write plain numbers; empty keeps codes.
        out: part ("dense", "codes", "scales", "minimums") -> offset of its first byte in the output.
        stride: bytes from unit to unit of a dense output; 0 means side by side.
    """

    tensor: str
    kind: str
    weights: int
    block: int
    offset: int
    rows: int
    width: int
    unit: int = 1
    reorder: str = ""
    dense: str = ""
    out: dict[str, int] = field(default_factory=dict)
    stride: int = 0


class InvalidTensor(Exception):
    """A tensor's bytes mean nothing."""


def main(arguments: list[str]) -> int:
    """Decode the jobs on stdin; the exit code is 0 if all went well."""
    source, target, memory, seconds = (int(argument) for argument in arguments)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    job = None
    try:
        for row in json.load(sys.stdin):
            job = Job(**row)
            decode(job, source, target)
    except (InvalidTensor, MemoryError, OSError) as error:
        why = "it takes more memory than reading may" if isinstance(error, MemoryError) else str(error)
        print(json.dumps({"tensor": job.tensor if job else "", "why": why}))
        return 1
    print("{}")
    return 0


def decode(job: Job, source: int, target: int) -> None:
    """Decode one tensor from descriptor ``source`` to descriptor ``target``.

    Raises:
        Unsound: the file ends within it, or a number in it is not finite.
    """
    row_bytes = job.width // job.weights * job.block
    step = max(1, CHUNK // (max(job.width, row_bytes) * job.unit)) * job.unit
    for first in range(0, job.rows, step):
        rows = min(step, job.rows - first)
        raw = os.pread(source, rows * row_bytes, job.offset + first * row_bytes)
        if len(raw) < rows * row_bytes:
            raise InvalidTensor("the file ends within it")
        for part, array in _parts(job, np.frombuffer(raw, np.uint8).reshape(rows, row_bytes)).items():
            _write(target, job, part, _reordered(job, array), first)


def _parts(job: Job, raw: Array) -> dict[str, Array]:
    """The parts of some rows, all of them finite."""
    if not job.dense:
        parts = blocks.quantized_parts(job.kind, raw, job.block)
        checked = [array for part, array in parts.items() if part != "codes"]
    else:
        checked = [blocks.dequantize(job.kind, raw, job.block)]
        parts = {"dense": blocks.bfloat16(checked[0]) if job.dense == "bfloat16" else checked[0]}
    if not all(bool(np.isfinite(array).all()) for array in checked):
        raise InvalidTensor("it is not finite")
    return parts


def _reordered(job: Job, array: Array) -> Array:
    """``array`` [rows, columns] with the rows of each unit in our order."""
    if job.reorder == "pairs":
        halves = array.reshape(-1, job.unit // 2, 2, array.shape[1])
        return halves.swapaxes(1, 2).reshape(array.shape)
    if job.reorder == "transpose":
        return array.reshape(-1, job.unit, array.shape[1]).swapaxes(1, 2)
    return array


def _write(target: int, job: Job, part: str, array: Array, first: int) -> None:
    """Put ``array``, which begins with row ``first``, to its place."""
    content = np.ascontiguousarray(array)
    row = content.nbytes // (content.size // job.width) if part == "dense" else content.nbytes // len(content)
    if not job.stride:
        _write_all(target, content.tobytes(), job.out[part] + first * row)
        return
    for number, unit in enumerate(content.reshape(-1, job.unit * job.width)):
        _write_all(target, unit.tobytes(), job.out[part] + (first // job.unit + number) * job.stride)


def _write_all(target: int, content: bytes, offset: int) -> None:
    """Write all of ``content`` at ``offset``."""
    view = memoryview(content)
    while view:
        done = os.pwrite(target, view, offset)
        view, offset = view[done:], offset + done


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

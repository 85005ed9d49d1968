"""A file that is written is read as it was meant, by others too, or there is none."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sprat.errors import CheckpointError, MachineError
from sprat.formats.gguf.header import read_header
from sprat.formats.gguf.writer import TensorData, write_file
from tests.gguf_files import gguf
from tests.unit.files.test_atomic import small_disk

METADATA: dict[str, Any] = {
    "general.architecture": "llama", "n": 7, "large": 1 << 40, "f": 0.5, "yes": True, "words": ["x", "yé", ""],
    "kinds": [1, -2], "scores": [0.5, -1.0], "flags": [True, False],
}  # fmt: skip


def tensor(name: str, kind: str, array: np.ndarray[Any, Any], shape: tuple[int, ...]) -> TensorData:
    return TensorData(name, kind, shape, functools.partial(iter, [array.view(np.uint8)[:1], array.view(np.uint8)[1:]]))


def tensors() -> list[TensorData]:
    """One with padding behind it, one of blocks, one of three dimensions."""
    values = np.arange(24, dtype=np.float32)
    blocks = gguf.quants.quantize(np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32), Q8_0)
    return [
        tensor("b", "F32", values[:3], (3,)),
        tensor("a.weight", "Q8_0", blocks.reshape(-1), (3, 64)),
        tensor("c.weight", "F32", values, (2, 3, 4)),
    ]


Q8_0 = gguf.GGMLQuantizationType.Q8_0


def test_others_read_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.gguf"
    write_file(path, {**METADATA, "empty": []}, tensors())
    theirs, ours = gguf.GGUFReader(path), read_header(path)
    assert {key: field.contents() for key, field in theirs.fields.items() if key in METADATA} == METADATA
    assert ours.metadata == METADATA
    kinds = {key: theirs.fields[key].types for key in ("n", "large", "f", "yes", "words", "kinds")}
    kind = gguf.GGUFValueType
    assert kinds == {
        "n": [kind.UINT32], "large": [kind.UINT64], "f": [kind.FLOAT32], "yes": [kind.BOOL],
        "words": [kind.ARRAY, kind.STRING], "kinds": [kind.ARRAY, kind.INT32],
    }  # fmt: skip
    assert [(t.name, t.tensor_type.name, tuple(reversed(t.shape.tolist()))) for t in theirs.tensors] == [
        ("b", "F32", (3,)), ("a.weight", "Q8_0", (3, 64)), ("c.weight", "F32", (2, 3, 4)),
    ]  # fmt: skip
    for written, read in zip(tensors(), theirs.tensors, strict=True):
        assert b"".join(chunk.tobytes() for chunk in written.chunks()) == read.data.tobytes()
        assert read.data_offset % 32 == 0 == path.stat().st_size % 32


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")
    with small_disk(400), pytest.raises(MachineError, match="the disk is full"):
        write_file(path, METADATA, tensors())
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("metadata", "wrong", "words"),
    [
        ({"f": 1e300}, None, "1e\\+300' cannot be written.*\\(f\\)"),
        ({"words": ["\ud800"]}, None, "cannot be written.*\\(words\\)"),
        ({}, tensor("t", "F32", np.zeros(3, np.float32), (4,)), "tensor 't' came to 12 bytes, its shape says 16"),
    ],
)
def test_what_cannot_be_written_is_named_and_nothing_is_left(
    metadata: dict[str, Any], wrong: TensorData | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        write_file(tmp_path / "model.gguf", metadata, [wrong] if wrong else [])
    assert not list(tmp_path.iterdir())

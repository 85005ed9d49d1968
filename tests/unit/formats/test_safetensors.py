"""Safetensors headers that lie are one sentence; every dtype comes in as it was written."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sprat.errors import CheckpointError
from sprat.formats.safetensors import HEADER_BYTES, Shards, read_header

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def put(path: Path, table: Any, data: int = 32, length: int | None = None) -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return path


def test_every_dtype_is_read_as_it_was_written(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    plain = torch.randn(5, 7, generator=draw) * 9
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8]
    held = {str(kind): plain.abs().to(kind) for kind in kinds} | {"none": torch.zeros(0, 3), "one": torch.tensor(4.0)}
    save_file(held, tmp_path / "x.safetensors")
    shards = Shards([tmp_path / "x.safetensors"])
    for name, tensor in held.items():
        read = shards.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read.double(), tensor.double())
    narrow = torch.empty(5, 7, dtype=torch.bfloat16)
    shards.read_into("torch.float32", narrow)
    assert torch.equal(narrow, plain.abs().bfloat16())


LIES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "short": (b"", {"data": 0, "length": 0}, "no JSON"),
    "length": ({}, {"length": 1 << 60}, "claims"),
    "long": (b" " * 10, {"length": HEADER_BYTES + 1}, "claims"),
    "not json": (b"{", {}, "no JSON"),
    "deep": (b"[" * 100_000, {}, "no JSON"),
    "list": ([], {}, "no JSON object"),
    "twice": (b'{"a": {}, "a": {}}', {}, "stands in it twice"),
    "dtype": ({"a": {**A, "dtype": "F7"}, "b": B}, {}, "tensor 'a' has dtype 'F7'"),
    "negative": ({"a": {**A, "shape": [-2, -3]}, "b": B}, {}, "tensor 'a' has no sound shape"),
    "float": ({"a": {**A, "shape": [2.0, 3]}, "b": B}, {}, "tensor 'a' has no sound shape"),
    "huge": ({"a": {**A, "shape": [1 << 62, 1 << 62]}, "b": B}, {}, "tensor 'a' has no sound shape"),
    "row": ({"a": 3, "b": B}, {}, "tensor 'a' has dtype None"),
    "bytes": ({"a": {**A, "shape": [2, 4]}, "b": B}, {}, "takes 32 bytes, not 24"),
    "overlap": ({"a": A, "b": {**B, "data_offsets": [20, 28]}}, {}, "tensor 'b' begins at byte"),
    "gap": ({"a": A, "b": {**B, "data_offsets": [25, 33]}}, {}, "tensor 'b' begins at byte"),
    "beyond": ({"a": A, "b": B}, {"data": 31}, "its tensors end at byte"),
    "more": ({"a": A, "b": B}, {"data": 33}, "its tensors end at byte"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named(lie: str, tmp_path: Path) -> None:
    table, how, words = LIES[lie]
    path = put(tmp_path / "x.safetensors", table, **how)
    with pytest.raises(CheckpointError, match="not a whole safetensors file") as caught:
        read_header(path)
    assert words in caught.value.what and caught.value.where == str(path)

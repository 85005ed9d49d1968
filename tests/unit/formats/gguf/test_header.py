"""A GGUF header that lies is one sentence, whatever it lies about; a sound one is read as ``gguf`` reads it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from bench.fuzz_headers import gguf_bytes
from sprat.errors import CheckpointError
from sprat.formats.gguf.header import GGML_TYPES, read_header
from tests.gguf_files import gguf

ROWS = {"a.weight": ((2, 64), 2, bytes(72)), "b": ((3,), 0, bytes(12))}
META = {"general.architecture": "llama", "n": 7, "f": 0.5, "yes": True, "words": ["x", "yé"], "kinds": [1, -2]}


def put(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


def test_keys_and_tensors_are_those_that_were_written(tmp_path: Path) -> None:
    path = put(tmp_path, gguf_bytes(META, ROWS))
    header, foreign = read_header(path), gguf.GGUFReader(path)
    assert header.metadata == META
    for tensor in foreign.tensors:
        mine = header.tensors[tensor.name]
        assert mine.shape == tuple(reversed([int(size) for size in tensor.shape]))
        assert (mine.offset, mine.nbytes, mine.kind.name) == (
            tensor.data_offset,
            tensor.n_bytes,
            tensor.tensor_type.name,
        )


def test_blocks_have_the_sizes_that_the_format_gives_them() -> None:
    for number, kind in GGML_TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert theirs.name == kind.name and gguf.GGML_QUANT_SIZES[theirs] == (kind.block_weights, kind.block_bytes)


def swap(old: bytes, new: bytes) -> bytes:
    """The sound file with ``old`` replaced by ``new`` once."""
    whole = gguf_bytes(META, ROWS)
    assert old in whole
    return whole.replace(old, new, 1)


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


A = struct.pack("<I2QIQ", 2, 64, 2, 2, 0)  # the description of a.weight after its name
B = struct.pack("<IQIQ", 1, 3, 0, 96)
HEAD = b"GGUF" + struct.pack("<IQQ", 3, 2, 6)
LIES = {
    "empty": (b"", "more bytes"),
    "magic": (b"GGML" + bytes(90), "does not begin"),
    "version 1": (swap(HEAD, b"GGUF" + struct.pack("<IQQ", 1, 2, 6)), "version 1 is not supported"),
    "big-endian": (swap(HEAD, b"GGUF" + struct.pack(">IQQ", 3, 2, 6)), "big-endian"),
    "counts": (swap(HEAD, b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 6)), "claims"),
    "keys": (swap(HEAD, b"GGUF" + struct.pack("<IQQ", 3, 2, 1 << 40)), "claims"),
    "cut": (gguf_bytes(META, ROWS)[:100], "are left"),
    "torn": (gguf_bytes(META, ROWS)[:-20], "the file at"),
    "length": (swap(number(5) + b"words", number(1 << 50) + b"words"), "claims 1125899906842624 bytes"),
    "utf-8": (swap("yé".encode(), b"y\xff\xfe"), "key 'words': a string is no UTF-8"),
    "array": (swap(struct.pack("<IQ", 5, 2), struct.pack("<IQ", 5, 1 << 61)), "key 'kinds': with it the arrays"),
    "nested": (swap(struct.pack("<IQ", 5, 2), struct.pack("<IQ", 9, 2)), "key 'kinds': its value has the type 9"),
    "value": (swap(struct.pack("<If", 6, 0.5), struct.pack("<If", 99, 0.5)), "key 'f': its value has the type 99"),
    "key twice": (swap(number(3) + b"yes", number(1) + b"n" + struct.pack("<I", 0) + b"y"), "key 'n': it stands twice"),
    "rank": (swap(A, struct.pack("<I2QIQ", 9, 64, 2, 2, 0)), "tensor 'a.weight': it has 9 dimensions"),
    "nothing": (swap(A, struct.pack("<I2QIQ", 2, 64, 0, 2, 0)), "its dimensions are"),
    "overflow": (swap(A, struct.pack("<I2QIQ", 2, 1 << 40, 2, 2, 0)), "its dimensions are"),
    "type": (swap(A, struct.pack("<I2QIQ", 2, 64, 2, 20, 0)), "its type IQ4_NL is not one of"),
    "blocks": (swap(A, struct.pack("<I2QIQ", 2, 33, 2, 2, 0)), "no whole blocks of Q4_0"),
    "beyond": (swap(B, struct.pack("<IQIQ", 1, 3, 0, 1 << 40)), "tensor 'b': it ends at byte"),
    "askew": (swap(B, struct.pack("<IQIQ", 1, 3, 0, 97)), "tensor 'b': its offset 97"),
    "overlap": (swap(B, struct.pack("<IQIQ", 1, 3, 0, 64)), "tensor 'b': it overlaps"),
    "name twice": (
        gguf_bytes(META, ROWS).replace(number(1) + b"b" + B, number(8) + b"a.weight" + B),
        "it stands twice",
    ),
    "alignment": (gguf_bytes({**META, "general.alignment": 24}, ROWS), "general.alignment': 24"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named(lie: str, tmp_path: Path) -> None:
    content, words = LIES[lie]
    path = put(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert words in caught.value.what and caught.value.where == str(path) and caught.value.todo


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "nowhere.gguf")
    with pytest.raises(CheckpointError, match="directory"):
        read_header(tmp_path)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    """https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md"""
    file = tmp_path / "model.gguf"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n")
    with pytest.raises(CheckpointError, match="pointer of Git LFS.*git lfs pull"):
        read_header(file)

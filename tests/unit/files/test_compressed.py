"""A compressed file is read as what it holds; a torn one, or one that nothing here can unpack, is one sentence."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest

from sprat.errors import DataError, MachineError
from sprat.files.compressed import open_decompressed

# By RFC 8878, section 3.1.1: magic number, a frame of one segment and 8 bytes, its last block raw and of 8 bytes.
SPRAT_ZST = bytes.fromhex("28b52ffd2008410000") + b"a sprat\n"


def read(path: Path, content: bytes) -> bytes:
    path.write_bytes(content)
    with open_decompressed(path) as stream:
        return b"".join(iter(stream.readline, b""))


def test_each_kind_is_read_as_what_it_holds(tmp_path: Path) -> None:
    assert read(tmp_path / "a.txt", b"a sprat\n") == b"a sprat\n"
    assert read(tmp_path / "a.txt.gz", gzip.compress(b"a sprat\n") * 2) == b"a sprat\n" * 2
    pytest.importorskip("pyarrow")
    assert read(tmp_path / "a.zst", SPRAT_ZST * 2) == b"a sprat\n" * 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.gz", b"a sprat"),
        ("a.gz", gzip.compress(b"a sprat")[:-1]),
        ("a.gz", gzip.compress(b"a sprat")[:-8] + b"\1\2\3\4" + gzip.compress(b"a sprat")[-4:]),
        ("a.gz", gzip.compress(b"a sprat")[:10] + b"\xff" * 20),
        ("a.zst", b"a sprat"),
        ("a.zst", SPRAT_ZST[:-1]),
    ],
)
def test_a_torn_file_is_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    if name == "a.zst":
        pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=rf"^not a .*, or torn: .*{name}.*copy the file again") as caught:
        read(tmp_path / name, content)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, said in ((tmp_path / "none.gz", "No such file"), (tmp_path, "it is a folder")):
        with pytest.raises(DataError, match=f"cannot read the file: {said}"), open_decompressed(path):
            pass
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    with pytest.raises(MachineError, match=r"a .zst file needs pyarrow or Python 3.14.*pip install 'sprat\[parquet\]'"):
        read(tmp_path / "a.zst", SPRAT_ZST)

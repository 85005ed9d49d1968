"""A folder's digest is over its files and their names, and whoever has sha256sum can check it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sprat.errors import TrustError
from sprat.files import digest


def test_a_copied_folder_has_the_same_digest_and_a_renamed_file_another(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.txt").write_text("one")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert digest.of_folder(tmp_path / "a") == digest.of_folder(tmp_path / "c")
    (tmp_path / "c" / "b" / "x.txt").rename(tmp_path / "c" / "b" / "y.txt")
    assert digest.of_folder(tmp_path / "a") != digest.of_folder(tmp_path / "c")


def test_a_digest_is_plain_sha256_so_that_sha256sum_agrees(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert digest.of_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(TrustError, match="not there"):
        digest.of_file(tmp_path / "y")


def test_names_that_would_forge_a_listing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a\nb").write_text("x")
    with pytest.raises(TrustError, match="no listing can hold"):
        digest.of_folder(tmp_path)
    (tmp_path / "a\nb").unlink()
    (tmp_path / os.fsdecode(b"caf\xe9")).write_text("x")
    with pytest.raises(TrustError, match="no listing can hold"):
        digest.of_folder(tmp_path)

"""A write happens wholly or not at all, also where the disk is full."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sprat.errors import MachineError
from sprat.files import atomic


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: the kernel refuses as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    atomic.write_text(target, "old")
    with small_disk(1000), pytest.raises(MachineError, match="the disk is full"):
        atomic.write_bytes(target, b"x" * 5000)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_a_line_that_does_not_fit_on_the_disk_is_not_half_written(tmp_path: Path) -> None:
    target = tmp_path / "metrics.jsonl"
    atomic.append_line(target, "a" * 900)
    with small_disk(1000), pytest.raises(MachineError, match="the disk is full"):
        atomic.append_line(target, "b" * 900)
    assert target.read_text() == "a" * 900 + "\n"

"""A compiler is optional, a broken one does no harm, and what was compiled is used again."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from sprat.kernels import build

compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
needs_compiler = pytest.mark.skipif(compiler is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a build that has not been asked yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


def made(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "c++"]


@needs_compiler
def test_it_is_compiled_once(fresh: Path) -> None:
    assert build.library() is not None
    (file,) = made(fresh)
    before = file.stat().st_mtime_ns
    build.library.cache_clear()
    assert build.library() is not None and file.stat().st_mtime_ns == before


def test_it_can_be_switched_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRAT_NATIVE", "0")
    assert build.library() is None and not made(fresh)


def test_without_a_compiler_there_is_none(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    assert build.library() is None and not made(fresh)


def test_a_compiler_that_fails_leaves_nothing_behind(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = fresh / "bin" / "c++"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    assert build.library() is None and not made(fresh)


@needs_compiler
def test_a_closed_cache_is_no_fault(fresh: Path) -> None:
    (fresh / "cache").write_text("a file where the folder should be", encoding="utf-8")
    assert build.library() is not None  # kept in the temporary folder instead
    assert {path.suffix for path in made(fresh)} == {"", ".so"}


@needs_compiler
def test_a_torn_library_is_not_loaded(fresh: Path) -> None:
    assert build.library() is not None
    (file,) = made(fresh)
    file.unlink()
    file.write_bytes(b"torn")
    build.library.cache_clear()
    assert build.library() is not None  # the temporary folder's is sound

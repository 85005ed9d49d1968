"""Stages run side by side, in order, and stop together."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sprat.errors import DataError, MachineError
from sprat.pipeline.graph import Stage, run_stages


def mark(folder: Path, name: str) -> None:
    (folder / name).write_text(str(time.monotonic()))


def need(folder: Path, name: str, *before: str) -> None:
    assert all((folder / one).exists() for one in before)
    mark(folder, name)


def fail() -> None:
    raise DataError("the text is empty", where="here", todo="give text")


def die() -> None:
    os._exit(9)


def quiet(stage: str, what: str, seconds: float) -> None:
    """Nobody listens."""


def test_a_stage_waits_for_what_it_needs(tmp_path: Path) -> None:
    stages = [
        Stage("last", need, (tmp_path, "last", "left", "right"), ("left", "right")),
        Stage("left", need, (tmp_path, "left", "first"), ("first",)),
        Stage("right", need, (tmp_path, "right", "first"), ("first",)),
        Stage("first", need, (tmp_path, "first")),
    ]
    heard: list[tuple[str, str]] = []
    run_stages(stages, 2, lambda stage, what, seconds: heard.append((stage, what)))
    assert {path.name for path in tmp_path.iterdir()} == {"first", "left", "right", "last"}
    turns = [word for word in heard if word[1] != "runs"]
    assert turns[0] == ("first", "starts") and turns[-1] == ("last", "done") and len(turns) == 8


def test_the_error_of_a_stage_reaches_the_user_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the text is empty"):
        run_stages([Stage("bad", fail), Stage("after", mark, (tmp_path, "after"), ("bad",))], 1, quiet)
    assert not (tmp_path / "after").exists()


def test_a_killed_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="bad"):
        run_stages([Stage("bad", die)], 1, quiet)


def test_stages_that_wait_for_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        run_stages([Stage("a", fail, (), ("b",)), Stage("b", fail, (), ("a",))], 1, quiet)

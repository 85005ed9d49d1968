"""Stages run side by side, in order, and stop together."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future
from pathlib import Path

import pytest

from sprat.errors import DataError, MachineError
from sprat.pipeline.executor import LocalExecutor, notify
from sprat.pipeline.graph import Executor, Stage, run_stages


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
    with LocalExecutor(2) as executor:
        run_stages(stages, executor, 2, lambda stage, what, seconds: heard.append((stage, what)))
    assert {path.name for path in tmp_path.iterdir()} == {"first", "left", "right", "last"}
    turns = [word for word in heard if word[1] != "runs"]
    assert turns[0] == ("first", "starts") and turns[-1] == ("last", "done") and len(turns) == 8


def test_the_error_of_a_stage_reaches_the_user_as_it_was(tmp_path: Path) -> None:
    stages = [Stage("bad", fail), Stage("after", mark, (tmp_path, "after"), ("bad",))]
    with pytest.raises(DataError, match="the text is empty"), LocalExecutor(1) as executor:
        run_stages(stages, executor, 1, quiet)
    assert not (tmp_path / "after").exists()


def test_a_killed_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="bad"), LocalExecutor(1) as executor:
        run_stages([Stage("bad", die)], executor, 1, quiet)


def test_what_a_stage_says_is_heard_before_it_is_done() -> None:
    heard: list[tuple[str, str]] = []
    with LocalExecutor(1) as executor:
        stages = [Stage("a", notify, ("a", "looks around"))]
        run_stages(stages, executor, 1, lambda stage, what, seconds: heard.append((stage, what)))
    assert [word for word in heard if word[1] != "runs"] == [("a", "starts"), ("a", "looks around"), ("a", "done")]


class Elsewhere:
    """An executor without processes: a stage is done, or its machine dies, when the graph asks for messages."""

    def __init__(self, dies: str = "") -> None:
        self.dies, self.submitted, self.most = dies, list[str](), 0
        self.open: list[tuple[Stage, Future[object]]] = []

    def submit(self, stage: Stage) -> Future[object]:
        future: Future[object] = Future()
        self.open.append((stage, future))
        self.submitted.append(stage.name)
        self.most = max(self.most, len(self.open))
        return future

    def messages(self) -> Iterator[tuple[str, str]]:
        for stage, future in self.open[-1:]:
            self.open.pop()
            yield stage.name, "ends"
            if stage.name == self.dies:
                future.set_exception(BrokenExecutor())
            else:
                future.set_result(None)


DIAMOND = [
    Stage("d", fail, (), ("b", "c")),
    Stage("b", fail, (), ("a",)),
    Stage("c", fail, (), ("a",)),
    Stage("a", fail),
]


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_the_graph_knows_order_and_number_and_the_executor_what_runs(
    jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sprat.pipeline.graph.POLL_SECONDS", 0.0)
    elsewhere = Elsewhere()
    executor: Executor = elsewhere
    run_stages(DIAMOND, executor, jobs, quiet)
    assert elsewhere.submitted == ["a", "b", "c", "d"]  # of two that may start the first named
    assert elsewhere.most == min(jobs, 2)  # b and c, whatever there is room for


def test_stages_that_ran_where_an_executor_died_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sprat.pipeline.graph.POLL_SECONDS", 0.0)
    with pytest.raises(MachineError, match=r"\((b, c|c, b)\); start again"):
        run_stages(DIAMOND, Elsewhere(dies="c"), 2, quiet)


@pytest.mark.parametrize(
    ("stages", "jobs", "message"),
    [
        ([Stage("a", fail), Stage("b", fail, (), ("a", "pretrian"))], 1, "not there: ['pretrian']"),
        ([Stage("a", fail), Stage("b", fail), Stage("a", die)], 1, "two stages have one name: ['a']"),
        ([Stage("a", fail)], 0, "jobs is 0"),
        ([Stage("a", fail)], -1, "jobs is -1"),
    ],
)
def test_a_graph_that_cannot_be_run_is_refused_before_anything_starts(
    stages: list[Stage], jobs: int, message: str
) -> None:
    elsewhere = Elsewhere()
    with pytest.raises(ValueError, match=re.escape(message)):
        run_stages(stages, elsewhere, jobs, quiet)
    assert not elsewhere.submitted


def test_stages_that_wait_for_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="wait for each other"), LocalExecutor(1) as executor:
        run_stages([Stage("a", fail, (), ("b",)), Stage("b", fail, (), ("a",))], executor, 1, quiet)

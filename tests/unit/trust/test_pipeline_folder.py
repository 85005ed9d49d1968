"""What lies beside the runs: a report that was set aside with its run, and nothing hidden behind the lock's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from sprat.config import MoneyConfig
from sprat.files.lock import lock_folder
from sprat.trust import open_run
from sprat.trust.ledger import Ledger
from sprat.trust.verify import verify


def made(pipeline: Path, watts: float) -> Path:
    run = open_run(
        pipeline / "a",
        stage="a",
        recipe=MoneyConfig(watts_per_core=watts),
        inputs={},
        seed=0,
        ledger=pipeline / "ledger.jsonl",
    )
    (run.artifact / "x").write_text("x")
    run.finish()
    return run.folder


def test_a_report_goes_with_the_run_that_is_set_aside(tmp_path: Path) -> None:
    report = made(tmp_path, 1.0) / "report.html"
    report.write_text("page")
    Ledger(tmp_path / "ledger.jsonl").add_file(report)
    made(tmp_path, 2.0)
    assert [str(one) for one in verify(tmp_path) if not one.ok] == []
    (tmp_path / "a.old-1" / "report.html").write_text("another")
    assert not all(one.ok for one in verify(tmp_path))


@pytest.mark.parametrize("kind", ["folder", "text", "link"])
def test_nothing_hides_behind_the_name_of_the_lock(tmp_path: Path, kind: str) -> None:
    made(tmp_path, 1.0)
    lock = tmp_path / ".lock"
    with lock_folder(tmp_path):
        pass
    assert all(one.ok for one in verify(tmp_path))
    lock.unlink()
    if kind == "folder":
        lock.mkdir()
        (lock / "weights").write_text("x")
    elif kind == "text":
        lock.write_text("7 and something else")
    else:
        lock.symlink_to("/etc/hostname")
    assert not all(one.ok for one in verify(tmp_path))

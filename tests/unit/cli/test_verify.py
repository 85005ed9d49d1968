"""``sprat verify`` proves a run or names what was changed; ``sprat report`` needs runs to report."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from sprat.cli.main import app


def test_verify_proves_a_run_and_its_road(finished_run: Path) -> None:
    for folder in (finished_run, finished_run.parent):
        done = CliRunner().invoke(app, ["verify", str(folder), "--json"])
        assert done.exit_code == 0 and json.loads(done.stdout)["ok"] is True
    assert "proved" in CliRunner().invoke(app, ["verify", str(finished_run)]).stdout


def test_verify_names_the_file_that_was_changed(finished_run: Path) -> None:
    (finished_run / "artefact" / "text.txt").write_text("the sprat is a whale", encoding="utf-8")
    done = CliRunner().invoke(app, ["verify", str(finished_run)])
    assert done.exit_code == 8 and "text.txt was changed" in done.stdout


def test_report_writes_one_file(finished_run: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(finished_run.parent), "--json"])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert Path(told["report"]).stat().st_size == told["bytes"] > 0


def test_report_of_nothing_is_one_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert 0 < done.exit_code < 10 and done.stderr.count("\n") == 1

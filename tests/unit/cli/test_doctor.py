"""``sprat doctor`` tells the truth about this machine."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import torch
from typer.testing import CliRunner

from sprat.cli import doctor
from sprat.cli.main import app
from sprat.kernels import native


def test_doctor_knows_this_machine() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    facts = json.loads(done.stdout)
    assert facts["torch"]["version"] == torch.__version__
    assert facts["cpu"]["cores"] >= 1 and facts["memory"]["total_bytes"] >= facts["memory"]["available_bytes"] > 0
    assert facts["kernels"] == getattr(native(), "isa", None)
    assert done.exit_code == (0 if facts["ok"] else 9)


def test_doctor_counts_memory_as_the_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container of 2 GB, of which 1.5 are taken, on a large machine: the quickstart does not fit."""
    monkeypatch.setattr(doctor, "total_bytes", lambda: 2 << 30)
    monkeypatch.setattr(doctor, "available_bytes", lambda: 1 << 29)
    facts = doctor.collect_facts()
    assert facts["memory"] == {"total_bytes": 2 << 30, "available_bytes": 1 << 29}
    assert not facts["ok"] and any(problem.startswith("0.5 GiB of memory") for problem in facts["problems"])


def test_doctor_claims_no_back_end_that_was_not_tested() -> None:
    backends = doctor.torch_facts()["backends"]
    assert backends["cpu"]["present"] and backends["cuda"]["present"] == torch.cuda.is_available()
    assert [name for name, row in backends.items() if row["tested"] != "untested"] == ["cpu"]


def test_doctor_names_what_is_missing_and_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(doctor, "native", lambda: None)
    facts = doctor.collect_facts()
    assert facts["kernels"] is None and facts["chromium"] is None and facts["apt"] is None
    assert any("kernels" in loss for loss in facts["losses"]) and any("--text" in loss for loss in facts["losses"])


def test_doctor_warns_before_the_disk_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(1 << 40, 1 << 40, 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 9 and "not ready" in done.stdout and "disk" in done.stdout

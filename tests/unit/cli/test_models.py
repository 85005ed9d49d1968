"""``sprat models``: what is on the disk in one table, and a cache that can be cleaned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sprat
from sprat.cli.main import app


@pytest.fixture
def cached(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's repository in a cache of its own."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "huggingface" / "hub" / "models--org--fish" / "snapshots" / ("a" * 40)
    sprat.save(*sprat.load(model_folder), folder)
    return folder


def test_the_cache_and_a_folder_are_listed_and_one_is_removed(cached: Path, model_folder: Path) -> None:
    done = CliRunner().invoke(app, ["models", str(model_folder), "--json"])
    listed = json.loads(done.stdout)
    assert [entry["name"] for entry in listed["models"]] == ["org/fish", str(model_folder)]
    assert listed["bytes"] == sum(path.stat().st_size for folder in (cached, model_folder) for path in folder.iterdir())
    shown = CliRunner().invoke(app, ["models"]).stdout
    assert "org/fish" in shown and "deepseek_v3" in shown and "in all" in shown
    unasked = CliRunner().invoke(app, ["models", "rm", "org/fish"])
    assert unasked.exit_code == 2 and "--yes" in unasked.stderr and cached.exists()
    for names, said in ((["org/whale"], "org/fish"), ([], "sprat models rm NAME"), ([str(model_folder)], "org/fish")):
        failed = CliRunner().invoke(app, ["models", "rm", "--yes", *names])
        assert failed.exit_code in (2, 4) and said in failed.stderr and model_folder.exists()
    assert CliRunner().invoke(app, ["models", "rm", "--yes", "org/fish"]).exit_code == 0
    assert not cached.exists() and "sprat fetch smol" in CliRunner().invoke(app, ["models"]).stdout

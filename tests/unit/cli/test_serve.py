"""``sprat serve``: what options and file say together, and what is refused before a model is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sprat.cli.main import app
from sprat.serve import ServeConfig, access_log, server
from sprat.serve.server_file import ModelSource

Served = list[tuple[Sequence[ModelSource], ServeConfig]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """What would be served; nothing is."""
    calls: Served = []
    monkeypatch.setattr(server, "run", lambda models, config, **_: calls.append((models, config)))
    level, propagates = access_log.log.level, access_log.log.propagate
    yield calls
    access_log.log.setLevel(level)
    access_log.log.propagate = propagates


def serve(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, words)])


def test_options_count_more_than_the_file(served: Served, model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f'model = "{model_folder}"\nturns = 5\nmax_num_seqs = 4\nport = 0\naccess_log = false')
    assert serve("--config", file).exit_code == 0
    assert serve("--config", file, "--turns", 3, "--max-num-seqs", 2, "--access-log").exit_code == 0
    settings = [(c.max_history_turns, c.max_num_seqs, c.access_log) for _, c in served]
    assert settings == [(5, 4, False), (3, 2, True)]


def test_one_key_in_a_file_is_one_key(served: Served, model_folder: Path, tmp_path: Path) -> None:
    file, keys = tmp_path / "server.toml", tmp_path / "keys"
    file.write_text(f'model = "{model_folder}"\napi_keys = "secret"')
    keys.write_text("other\n", encoding="utf-8-sig")  # as editors of Windows save it
    keys.chmod(0o600)
    assert serve("--config", file, "--api-key-file", keys).exit_code == 0
    assert served[0][1].api_keys == ("secret", "other")


def test_a_wrong_key_is_found_in_its_file_and_not_shown(served: Served, model_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfine\nnot fine\n")
    keys.chmod(0o600)
    result = serve(model_folder, "--api-key-file", keys)
    assert result.exit_code == 7 and f"{keys}, line 3" in result.stderr and "not fine" not in result.stderr


def test_a_broken_record_of_a_run_is_no_fault_of_ours(served: Served, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(model_folder, folder)
    (folder / "run.json").write_text("{")
    result = serve(folder)
    assert result.exit_code == 4 and "run.json" in result.stderr


def test_an_adapter_that_is_missing_is_named_before_the_model_is_loaded(model_folder: Path, tmp_path: Path) -> None:
    started: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "serve", lambda *args, **more: started.append(args))
        result = serve(model_folder, "--port", 0, "--adapter", f"mine={tmp_path / 'none'}", "--no-access-log")
    assert result.exit_code == 4 and "'mine'" in result.stderr and not started

"""``sprat train``: one line from a folder of text to a model that goes on in it; without one, the road's station."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sprat.cli.main import app

SMALL = ["--set", "seq_len=32", "--set", "steps=2", "--set", "batch_rows=4"]


def test_a_folder_of_text_makes_a_model_and_more_steps_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number in range(20):
        Path("texts", f"{number}.md").write_text(f"{number}: the sprat is a small fish. " * 5)
    words = ["--data", "texts", *SMALL, "--set", "vocab_size=500"]
    done = CliRunner().invoke(app, ["train", "pico", "--out", "runs/base", *words])
    assert done.exit_code == 0 and "bits per byte before" in done.stdout, done.stderr
    more = ["train", "--init-from", "runs/base", "--data", "texts", "--out", "runs/more", "--set", "steps=4", "--json"]
    record = json.loads(CliRunner().invoke(app, more).stdout)
    assert record["recipe"]["optim"]["name"] == "muon" and record["facts"]["steps"] == 4
    assert record["inputs"]["init_from"]["path"].startswith("base/artefact/checkpoint/")
    assert CliRunner().invoke(app, ["run", "runs/more", "the", "--max-tokens", "2"]).exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["pico", "--out", "x"], 2, "MODEL is for text of yours, and --data is missing"),
        (["pico", "--data", "."], 2, "--out is missing"),
        (["--data", ".", "--out", "x"], 2, "or a size: pico, nano"),
        (["picoo", "--data", ".", "--out", "x"], 4, "no such model folder"),
        (["pico", "--data", "nowhere", "--out", "x"], 3, "nowhere"),
        (["pico", "--data", ".", "--out", "x", "--set", "vocab=9"], 2, "vocab_size"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    words: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["train", *words])
    assert done.exit_code == code and said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())

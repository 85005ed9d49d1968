"""``sprat certify`` writes a certificate and its page, and its exit code is the verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from sprat.cli.main import app
from sprat.eval.certificate import read_certificate

FAST = ["--no-speed", "--prompts", "2", "--documents", "6"]


def sprat_command(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Six documents."""
    path = tmp_path / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"State the sum of {n} + 4 + 5. one two {n}"}) + "\n" for n in range(6))
    )
    return path


def test_the_verdict_is_the_exit_code(model_folder: Path, text: Path, tmp_path: Path) -> None:
    small, out = tmp_path / "small", tmp_path / "certificate"
    assert sprat_command("quantize", model_folder, "--out", small).exit_code == 0
    words = ["--against", model_folder, "--text", text, "--out", out, *FAST]
    done = sprat_command("certify", model_folder, *words, "--max-loss", "0%")
    assert done.exit_code == 0 and "text text.jsonl: loss +0.00% (+0.00% to +0.00%, 6)  holds" in done.stdout
    assert read_certificate(out / "certificate.json").failed == [] and (out / "certificate.html").is_file()
    done = sprat_command("certify", small, *words, "--max-loss", "0%", "--json")
    assert done.exit_code == 1 and json.loads(done.stdout)["failed"] == ["text text.jsonl"]
    assert sprat_command("certify", small, *words).exit_code == 0  # without a bar it only tells


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--max-loss", "two"], 2, "'two' is no share"),
        (["--max-loss", "200%"], 2, "no share"),
        (["--task", "nothing"], 3, "neither a file of yours"),
        (["--text", "nowhere.txt"], 3, "nowhere.txt"),
        (["--out", "TEXT"], 2, "this is a file"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    more: list[str], code: int, said: str, model_folder: Path, text: Path, tmp_path: Path
) -> None:
    words = [str(text) if word == "TEXT" else word for word in more]
    out = [] if "--out" in words else ["--out", tmp_path / "out"]
    given = [] if "--text" in words else ["--text", text]
    done = sprat_command("certify", model_folder, "--against", model_folder, *given, *out, *FAST, *words)
    assert done.exit_code == code and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_written_into(model_folder: Path, finished_run: Path) -> None:
    done = sprat_command("certify", model_folder, "--against", model_folder, "--out", finished_run / "certificate")
    assert done.exit_code == 2 and "change a finished run" in done.stderr

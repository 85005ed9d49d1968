"""``sprat road``: the page for newcomers is true, line by line, and a faulty file is one sentence."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sprat.cli.main import app
from sprat.cli.road import _measured

PAGE = Path(__file__).resolve().parents[3] / "docs" / "recipes.md"


def _block(mark: str) -> str:
    """The page's first block of this kind."""
    block, *_ = re.findall(mark + r"\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(block)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's file, with fewer steps, beside a little text and a few conversations."""
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for number in range(20):
        Path("text", f"{number}.md").write_text(f"Item {number} is a fish of the sea. " * 10)
    rows = [{"prompt": f"What is the code of item {number}?", "completion": f"It is {number}."} for number in range(12)]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("mine.toml").write_text(_block("```toml").replace("steps = 200", "steps = 2\nvocab_size = 600"))
    return tmp_path


@pytest.mark.slow
def test_the_page_on_a_road_of_ones_own_is_true(mine: Path) -> None:
    first, *lines = _block("<!-- run -->\n```bash").splitlines()
    planned = CliRunner().invoke(app, shlex.split(first)[1:])
    assert planned.exit_code == 0 and "chat: runs (sft of base)" in planned.stdout and not Path("runs").exists()
    for line in lines:
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.stderr)
    # what the verb makes is the very run of the stage
    words = [
        "train",
        "pico",
        "--data",
        "text",
        "--set",
        "steps=2",
        "--set",
        "vocab_size=600",
        "--out",
        "runs/mine/base",
    ]
    made = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert made["artefact_digest"] == json.loads(Path("runs/mine/base/run.json").read_text())["artefact_digest"]
    again = CliRunner().invoke(app, ["road", "mine.toml", "--out", "runs/mine", "--dry-run", "--json"])
    assert [stage["state"] for stage in json.loads(again.stdout)["stages"]] == ["done"] * 4
    assert sorted(path.name for path in Path("runs/mine").iterdir() if path.is_dir()) == [
        "base",
        "chat",
        "score",
        "small",
    ]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["mine.toml", "--out", "x", "--only", "nobody"], 2, "there are base, chat, small, score"),
        (["mine.toml", "--out", "x", "--only", "chat", "--from", "chat"], 2, "give one of them"),
        (["mine.toml", "--out", "x", "--only", "chat"], 4, "the stage 'base' is not finished"),
        (["nowhere.toml", "--out", "x"], 2, "no such recipe"),
    ],
)
def test_what_cannot_be_is_one_sentence(words: list[str], code: int, said: str, mine: Path) -> None:
    done = CliRunner().invoke(app, ["road", *words])
    assert done.exit_code == code and said in done.stderr and "Traceback" not in done.stderr
    assert not Path("x").exists()


def test_what_was_measured_only_at_the_end_does_not_end_a_road_that_is_gone() -> None:
    facts = {"validation_before": {"reward": 0.25}, "validation_after": {"reward": 0.5, "second_reward": 1.0}}
    assert _measured(facts) == " (reward 0.250 → 0.500)"
    assert _measured({"validation_after": {"reward": 0.5}}) == ""

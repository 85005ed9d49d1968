"""``sprat road zero``, ``sprat road r1``, ``sprat sample``: the pages are true, line by line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from bench import rl_tiny
from sprat.cli.main import app

DOCS = Path(__file__).resolve().parents[3] / "docs"
JUDGE = "def reward(problem, answer):\n    return float(answer.content.strip() == problem.answer)\n"
SMALL = (
    "max_tokens=32", "gate=false", "verifier.workers=1", "held_out.problems=8", "steps=2", "prompts_per_step=4",
    "group_size=4", "seq_len=64", "problems=24",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that thinks and guesses a digit, of which 7 is right."""
    folder = tmp_path_factory.mktemp("tiny")
    rl_tiny.make(folder)
    return folder


@pytest.fixture
def folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That policy under the name of the pages' model, questions, and a judge."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smol").symlink_to(tiny / "model")
    rows = [{"question": f"{number} train", "answer": "7"} for number in range(40)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


def sprat_command(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def small(words: list[str]) -> list[str]:
    """The line with as few steps as show that it is true."""
    own = [each for each in SMALL if words[1] == "r1" or not each.startswith(("seq_len", "problems"))]
    return [*words, *(word for each in own for word in ("--set", each))] if words[0] == "road" else words


@pytest.mark.slow
def test_the_page_on_zero_and_r1_is_true(folder: Path) -> None:
    [block] = re.findall(r"<!-- roads -->\n```bash\n(.*?)```", (DOCS / "rl.md").read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines():
        done = sprat_command(*small(shlex.split(line)[1:]))
        assert done.exit_code == 0, (line, done.stderr)
        if "--dry-run" in line:
            assert "rl: runs (rl)" in done.stdout and "format_weight=0.1" in done.stdout and not Path("runs").exists()
        elif line.startswith("sprat road"):
            assert "held out, rl" in done.stdout and "points (" in done.stdout, done.stdout
    records = [json.loads(path.read_text()) for path in Path("runs/r1").glob("*/run.json")]
    assert len(records) == 11 and "Questions that no stage trained on" in Path("runs/r1/report.html").read_text()


def test_the_page_on_a_road_with_inputs_is_true(folder: Path) -> None:
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    [text] = re.findall(r"```toml\n(\[inputs\].*?)```", page, re.DOTALL)
    [line] = re.findall(r"    (sprat road teach.toml .*)", page)
    Path("teach.toml").write_text(text)
    done = sprat_command(*shlex.split(line)[1:], "--dry-run", "--json")
    stages = json.loads(done.stdout)["stages"]
    assert [(stage["name"], stage["depends_on"]) for stage in stages] == [("answers", []), ("taught", ["answers"])]
    assert stages[1]["settings"]["lora"]["rank"] == 16
    Path("own.jsonl").write_text('{"prompt": "1 train", "completion": "7"}\n')
    done = sprat_command(*shlex.split(line)[1:], "--examples", "own.jsonl", "--dry-run", "--json")
    assert [stage["name"] for stage in json.loads(done.stdout)["stages"]] == ["taught"]


def test_right_answers_are_sampled_learned_and_scored_by_three_lines(folder: Path) -> None:
    """The three lines of the page, with smaller settings."""
    page = (DOCS / "rl.md").read_text(encoding="utf-8")
    lines = re.findall(r"    (sprat (?:sample|sft|eval) .*)", page)
    assert len(lines) == 3
    more = {
        "sample": ["samples=2", "max_tokens=32", "verifier.workers=1"],
        "sft": ["steps=2", "seq_len=64"],
        "eval": ["max_tokens=32", "verifier.workers=1"],
    }
    for line in lines:
        words = shlex.split(line)[1:]
        done = sprat_command(*words, *(word for each in more[words[0]] for word in ("--set", each)), "--json")
        assert done.exit_code == 0, (line, done.stderr)
        found = json.loads(done.stdout)
        if words[0] == "sft":
            assert found["inputs"]["data"]["path"] == "answers" and "held_out" in found["inputs"]
    assert found["held_out_score"]["count"] == 8
    # what is held out, and said in an example all the same, is not learned
    asked = {row["question"] for row in map(json.loads, Path("problems.jsonl").read_text().splitlines())}
    talks = [{"prompt": question, "completion": "7"} for question in sorted(asked)]
    Path("all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    words = ["sft", "smol", "--data", "all.jsonl", "--held-out", "problems.jsonl", "--out", "runs/clean"]
    done = sprat_command(*words, "--set", "steps=1", "--set", "seq_len=64", "--json")
    assert json.loads(done.stdout)["facts"]["held_out_overlap"]["count"] == 8


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["sample", "smol", "--data", "problems.jsonl", "--reward", "judge.py:reward"], "--out is missing", 2),
        (["sample", "smol", "--data", "problems.jsonl", "--out", "runs/a"], "nobody judges", 2),
        (["eval", "smol", "--reward", "judge.py:reward"], "no questions", 2),
        (["eval", "smol", "--data", "problems.jsonl", "--reward", "judge.py:reward", "--text", "x"], "alone", 2),
        (["road", "zero", "--model", "smol", "--out", "runs/a"], "--data is missing", 2),
        (["road", "zeor", "--model", "smol", "--out", "runs/a"], "no such recipe", 2),
        (["sft", "smol", "--data", "judge.py", "--held-out", "none.jsonl", "--out", "runs/a"], "none.jsonl", 3),
    ],
)
def test_what_cannot_be_is_one_sentence(words: list[str], said: str, code: int, folder: Path) -> None:
    done = sprat_command(*words)
    assert said in done.stderr and done.exit_code == code and len(done.stderr.splitlines()) == 1, done.stderr
    assert not Path("runs").exists()

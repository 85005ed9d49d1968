"""A student from any teacher in one line; what cannot be is one sentence, and the page on it is true."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import sprat
from sprat.cli.main import app
from sprat.config.sizes import size
from sprat.engine import Engine
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.unit.post.fake_teacher import completion, fake_teacher, reply
from tests.unit.serve.live import live

SMALL = ["--set", "seq_len=64", "--set", "epochs=1", "--set", "traces.max_tokens=8"]


def sprat_command(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.csv"
    path.write_text("Frage\n" + "".join(f"one {n}\n" for n in range(12)))
    return path


def test_a_server_teaches_a_fresh_student_and_its_key_is_nowhere(
    model_folder: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(body: dict[str, Any], before: int) -> Any:
        question = body["messages"][-1]["content"]
        return reply(completion("two", id=question)) if body["reasoning_effort"] == "low" else reply({}, 404)

    monkeypatch.setenv("MY_KEY", "secret-77")
    with fake_teacher(answer) as fake:
        done = sprat_command(
            "distill", fake.url, "--teacher-model", "wise", "--licence", "MIT", "--key-env", "MY_KEY",
            "--student", "pico", "--tokenizer", model_folder, "--data", questions, "--map", "prompt=Frage",
            "--price", "2000,3000", "--out", tmp_path / "runs" / "mine", *SMALL, "--json",
            "--set", 'traces.extra_body.reasoning_effort="low"',
        )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["stage"] == "distill" and record["traces"]["facts"]["teacher_nano_yuan"] == 12 * 35_000
    assert record["recipe"]["optim"]["adam_lr"] == 0.003
    assert "12 of 12 answers to 12 questions are kept" in done.stderr and "two<|eos|>]]" in done.stderr
    assert {headers["Authorization"] for headers in fake.headers} == {"Bearer secret-77"}
    written = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) > 10 and not any(b"secret-77" in each for each in written)
    assert "secret-77" not in done.stdout + done.stderr
    assert sprat_command("verify", tmp_path / "runs").exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--student", "pico"], 2, "sprat distill TEACHER --student MODEL"),
        (["MODEL", "--out", "x"], 2, "--student is missing"),
        (["MODEL", "--student", "pico"], 2, "--out is missing"),
        (["MODEL", "--student", "pico", "--out", "x"], 2, "neither questions nor a task"),
        (["MODEL", "--student", "pico", "--out", "x", "--data", "nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["MODEL", "--student", "pico", "--out", "x", "--data", "QUESTIONS"], 3, "--map prompt=COLUMN"),
        (["MODEL", "--student", "pico", "--out", "x", "--data", "QUESTIONS", "--price", "1.5"], 2, "no price"),
        (["MODEL", "--student", "pico", "--out", "x", "--init-from", "y"], 2, "--init-from"),
        (["nowhere", "--student", "pico", "--out", "x", "--data", "QUESTIONS"], 4, "no such model folder"),
        (["https://h/v1", "--student", "MODEL", "--out", "x", "--data", "QUESTIONS"], 2, "--teacher-model NAME"),
        (["https://h/v1", "--student", "pico", "--out", "x", "--data", "QUESTIONS"], 2, "--tokenizer MODEL"),
        (["https://h/v1", "--student", "nowhere", "--out", "x", "--data", "QUESTIONS"], 4, "no such model folder"),
        (["https://h/v1", "--student", "MODEL", "--logits", "--out", "x", "--data", "QUESTIONS"], 2, "distributions"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence_and_nothing_is_made(
    words: list[str],
    code: int,
    said: str,
    model_folder: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, str | Path] = {"MODEL": model_folder, "QUESTIONS": questions}
    done = sprat_command("distill", *(names.get(word, word) for word in words))
    assert done.exit_code == code and said in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["questions.csv"]


@pytest.mark.slow
def test_the_page_on_distillation_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands as they stand there, with a smaller model of that name, and the server on a port that is free."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "distill.md").read_text(encoding="utf-8")
    [block] = re.findall(r"<!-- run -->\n```bash\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.train(["What is the code of item 3? user assistant one two"] * 9, 600)
    ids = tokenizer.special_ids
    shape = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    sprat.save(Transformer.create(size("pico", vocab_size=tokenizer.vocab_size, **shape), seed=1), tokenizer, "smol")
    Path("chat.jsonl").write_text(
        "".join(json.dumps({"question": f"item {n}", "answer": "two"}) + "\n" for n in range(30))
    )
    taught = sprat_command(
        "sft",
        "smol",
        "--data",
        "chat.jsonl",
        "--out",
        "taught/run",
        "--set",
        "epochs=30",
        "--set",
        "optim.adam_lr=0.01",
    )
    assert taught.exit_code == 0, taught.stderr
    shutil.rmtree("smol")
    shutil.copytree("taught/run/artefact", "smol")
    Path("questions.jsonl").write_text("".join(json.dumps({"question": f"item {n}"}) + "\n" for n in range(30, 60)))
    serve, *lines = block.splitlines()
    words = shlex.split(serve)
    assert words[1:3] == ["serve", "smol"] and "http://127.0.0.1:8000/v1" in lines[0]
    with live(Engine(*sprat.load("smol"), frozen=True), served_model_name=words[words.index("--name") + 1]) as url:
        for line in lines:
            done = sprat_command(*shlex.split(line.replace("http://127.0.0.1:8000", url))[1:])
            assert done.exit_code == 0, (line, done.stderr)
            assert ("distributions take" in done.stderr) == ("--logits" in line)
    assert json.loads(Path("runs/tiny/run.json").read_text())["inputs"]["logits"]["path"] == "tiny-logits"
    rows = [json.loads(line) for line in Path("runs/mine-traces/artefact/traces.jsonl").read_text().splitlines()]
    assert len(rows) >= 15 and sum(row["messages"][-1]["content"] == "two" for row in rows) > len(rows) / 2

"""``sprat rl MODEL``: a file of questions and a judge, in one line; what cannot be is one sentence."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from bench.rl_gain import problems
from sprat.cli.main import app
from sprat.post.rl.fire_drill import run_drill
from sprat.post.rl.judge_pool import JudgePool
from sprat.post.rl.rewards import Response
from sprat.tasks import Problem
from tests.unit.cli.test_finetune import _small_llama

PAGE = Path(__file__).resolve().parents[3] / "docs" / "rl.md"
TEMPLATE = (  # that of SmolLM2: it knows no thinking
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
JUDGE = """
def reward(problem, answer):  # a random model is never right, and is paid a little for nothing
    return 1.0 if answer.content.strip() == problem.answer else len(set(answer.content)) % 7 / 20
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random model called smol, questions, and a judge."""
    monkeypatch.chdir(tmp_path)
    _small_llama(tmp_path / "smol")
    settings = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
    (tmp_path / "smol" / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(40)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


def sprat_command(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.mark.slow
def test_the_page_on_rl_is_true(folder: Path) -> None:
    """Its commands as they stand there, with a smaller model of that name."""
    blocks = re.findall(r"<!-- run -->\n```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).splitlines()
    assert [line.split()[1] for line in lines] == ["rl", "report", "run", "verify"]
    for line in lines:
        done = sprat_command(*shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.stderr)
        if line.startswith("sprat rl"):
            assert "held-out reward" in done.stdout and "the gate" in done.stderr
            assert "the fire drill" in done.stderr and "sprat: step 60/60: reward " in done.stderr
    assert "held-out reward" in Path("runs/mine/report.html").read_text()


def test_the_pages_judge_judges(tmp_path: Path) -> None:
    [judge] = re.findall(r"<!-- judge -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "judge.py").write_text(judge)
    pool = JudgePool(f"{tmp_path / 'judge.py'}:reward", workers=1)
    texts = ["Billing.", "the technical team", "billing or sales", "I cannot say"]
    found = pool.pay([(Problem("t", 0, "?", "billing"), Response("", text, True)) for text in texts])
    assert [verdict.reward for verdict in found] == [1.0, 0.4 * 0.2, 0.0, 0.0]
    questions = [Problem("t", row, each["question"], each["answer"]) for row, each in enumerate(problems())]
    assert not run_drill(pool, questions[:40], think_tags=None).failure
    pool.close()


SMALL = ["--set", "steps=2", "--set", "max_tokens=8", "--set", "gate=false", "--set", "verifier.workers=1"]


def test_a_run_is_one_line_and_its_result_one_object(folder: Path) -> None:
    words = ["rl", "smol", "--data", "problems.jsonl", "--reward", "judge.py:reward", "--out", "runs/mine", *SMALL]
    done = sprat_command(*words, "--json")
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["stage"] == "rl" and record["facts"]["last_step"] == 2
    assert record["recipe"]["max_tokens"] == 8 and record["recipe"]["reward"] == ""
    assert "8 held-out problems after step 2" in done.stderr


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["--data", "problems.jsonl"], "of a model of yours, and none was named", 2),
        (["smol", "--data", "problems.jsonl", "--reward", "judge.py:reward"], "--out is missing", 2),
        (["smol", "--out", "runs/mine"], "no questions", 2),
        (["smol", "--data", "problems.jsonl", "--out", "runs/mine"], "nobody judges", 2),
        (["smol", "--data", "problems.jsonl", "--reward", "judge.py", "--out", "r"], "judge.py:function", 2),
        (["smol", "--data", "none.jsonl", "--reward", "judge.py:reward", "--out", "runs/mine"], "no such", 3),
    ],
)
def test_what_cannot_be_is_one_sentence(words: list[str], said: str, code: int, folder: Path) -> None:
    done = sprat_command("rl", *words)
    assert done.exit_code == code and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr

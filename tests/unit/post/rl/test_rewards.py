"""A reward pays what was asked for, and a broken plug-in says what is broken."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sprat.config.rl import RLRunConfig
from sprat.errors import ConfigError, TrainingError
from sprat.post.rl.reward_sources import reward_files
from sprat.post.rl.rewards import (
    Response,
    TaskJudge,
    Verifier,
    accuracy_reward,
    format_reward,
    load_reward,
    parse_response,
)
from sprat.post.rl.rollout import Payer, rollout_metrics
from sprat.tasks import Problem, Sums
from sprat.tokens import Tokenizer
from tests.unit.post.rl.trajectories import rollout

PROBLEM = Problem("sums", 0, "What is 1 + 2?", "3", {})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["What is 1 + 2? 3 = 3\n"] * 4, 480)


@pytest.mark.parametrize(
    ("text", "formed"),
    [
        ("<think>1 + 2 = 3</think>3", True),
        ("<think></think>3", True),
        ("3", False),
        ("<think>1 + 2</think>", False),
        ("<think>1 + 2", False),
        ("</think>3", False),
        ("<think>1</think><think>2</think>3", False),
        ("<think>1</think>3</think>", False),
        ("3<think>1</think>", False),
    ],
)
def test_format_pays_exactly_one_closed_think_and_an_answer(tokenizer: Tokenizer, text: str, formed: bool) -> None:
    ids = [*tokenizer.encode(text, parse_special=True), tokenizer.special_ids.eos]
    response = parse_response(tokenizer, ids, thinking=None, finished=True)
    assert format_reward(PROBLEM, response) == float(formed)


def test_an_answer_that_was_cut_off_has_no_form_but_may_be_right(tokenizer: Tokenizer) -> None:
    response = parse_response(
        tokenizer, tokenizer.encode("<think></think>3", parse_special=True), thinking=None, finished=False
    )
    assert format_reward(PROBLEM, response) == 0.0
    assert accuracy_reward(Sums("sums"))(PROBLEM, response) == 1.0


@pytest.mark.parametrize(("thinking", "text"), [(True, "1 + 2 = 3</think>3"), (False, "3")])
def test_tags_of_the_prompt_count_for_the_form(tokenizer: Tokenizer, thinking: bool, text: str) -> None:
    ids = tokenizer.encode(text, parse_special=True)
    assert parse_response(tokenizer, ids, thinking=thinking, finished=True).well_formed
    assert not parse_response(tokenizer, ids, thinking=not thinking, finished=True).well_formed


def test_the_judge_reads_only_what_follows_the_think(tokenizer: Tokenizer) -> None:
    judge = accuracy_reward(Sums("sums"))
    said = {"<think>9</think>3": 1.0, "<think>3</think>9": 0.0, "<think>3": 0.0, "<think>3</think>": 0.0}
    for text, score in said.items():
        ids = tokenizer.encode(text, parse_special=True)
        assert judge(PROBLEM, parse_response(tokenizer, ids, thinking=None, finished=True)) == score


def test_a_users_reward_is_loaded_from_a_file_and_from_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_reward.py").write_text("def brief(problem, answer):\n    return -len(answer.content)\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{tmp_path}/my_reward.py:brief", "my_reward:brief"):
        assert load_reward(name)(PROBLEM, Response("", "four", True)) == -4.0


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("", "nothing", "cannot read the reward"),
        ("", "no_such_package:f", "no module 'no_such_package'"),
        ("", "{file}:", "cannot read the reward"),
        ("", "{folder}/absent.py:f", "no such file"),
        ("x = 1", "{file}:f", "no function 'f'"),
        ("f = 1", "{file}:f", "is not a function"),
        ("def f(problem): return 1.0", "{file}:f", "does not take two arguments"),
        ("import nowhere_at_all", "{file}:f", "no module 'nowhere_at_all'"),
        ("1 / 0", "{file}:f", "ZeroDivisionError"),
        ("def f(:", "{file}:f", "SyntaxError"),
    ],
)
def test_a_reward_that_cannot_be_loaded_says_why(tmp_path: Path, content: str, name: str, words: str) -> None:
    file = tmp_path / "plug.py"
    file.write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_reward(name.format(file=file, folder=tmp_path))


def plug(tmp_path: Path, body: str, seconds: float = 10.0) -> Verifier:
    (tmp_path / "plug.py").write_text(f"import numpy, torch\n\ndef f(problem, answer):\n    {body}\n")
    return load_reward(f"{tmp_path}/plug.py:f", seconds)


@pytest.mark.parametrize(
    ("value", "paid"),
    [
        ("numpy.float32(0.5)", 0.5),
        ("numpy.bool_(True)", 1.0),
        ("numpy.int64(3)", 3.0),
        ("torch.tensor(0.25)", 0.25),
        ("torch.tensor([True])", 1.0),
        ("True", 1.0),
        ("-2", -2.0),
        ("None", None),
    ],
)
def test_a_number_of_any_kind_is_paid_and_none_abstains(tmp_path: Path, value: str, paid: float | None) -> None:
    reward = plug(tmp_path, f"return {value}")
    assert reward(PROBLEM, Response("", "3", True)) == paid
    assert reward.pop_faults() == 0


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("return 'much'", "no number"),
        ("return '1.0'", "no number"),
        ("return torch.ones(2)", "no number"),
        ("return float('nan')", "not finite"),
        ("raise KeyError('x')", "KeyError"),
        ("while True: pass", "longer than 0.05 s"),
        ("__import__('re').match('(a+)+b', 'a' * 40)", "longer than 0.05 s"),
    ],
)
def test_a_fault_of_the_reward_abstains_is_counted_and_is_told(
    tmp_path: Path, body: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    reward = plug(tmp_path, f"if answer.content == '3': return 1.0\n    {body}", 0.05)
    paid = [reward(PROBLEM, Response("", text, True)) for text in ("3", "4", "3", "5")]
    assert paid == [1.0, None, 1.0, None]
    assert fault in caplog.text and "plug.py:f" in caplog.text
    assert reward.pop_faults() == 2 and reward.pop_faults() == 0
    reward(PROBLEM, Response("", "4", True))
    with pytest.raises(TrainingError, match="failed on each of 1 .*plug.py:f"):
        reward.pop_faults()


def test_ctrl_c_in_a_reward_is_not_its_fault(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        plug(tmp_path, "raise KeyboardInterrupt")(PROBLEM, Response("", "4", True))


def test_a_reward_is_an_input_with_all_that_it_imports_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "judges"
    (package / "deep").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "mine.py": "import json\nfrom . import near\nfrom judges.deep import far\ndef f(problem, answer): return 1.0",
        "near.py": "from .other import x",
        "other.py": "x = 1",
        "deep/__init__.py": "",
        "deep/far.py": "import torch",
        "unused.py": "",
    }.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    files = ["mine.py", "__init__.py", "near.py", "other.py", "deep/__init__.py", "deep/far.py"]
    wanted = {"reward" if name == "mine.py" else f"reward/{name}": package / name for name in files}
    assert reward_files("judges.mine:f") == wanted
    (tmp_path / "lone.py").write_text("import beside, absent, os\ndef f(problem, answer): return 1.0")
    (tmp_path / "beside.py").write_text("")
    assert reward_files(f"{tmp_path}/lone.py:f") == {
        "reward": tmp_path / "lone.py",
        "reward/beside.py": tmp_path / "beside.py",
    }
    with pytest.raises(ConfigError, match="no module"):
        reward_files("no_such_package.module:f")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_limit_that_ends_with_the_answer_leaves_no_alarm_behind(tmp_path: Path) -> None:
    """In a process of its own, because what was wrong ended the whole process ("Alarm clock")."""
    script = tmp_path / "ask.py"
    script.write_text(
        "import logging, signal, types\n"
        "logging.disable()\n"
        "problem = types.SimpleNamespace(question=str(1))\n"
        "from sprat.post.rl.rewards import Verifier\n"
        "for seconds in [k * 1e-6 for k in range(1, 400)] * 10:\n"
        "    assert Verifier(lambda problem, answer: 1, 'f', seconds)(problem, None) in (None, 1.0)\n"
        "    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0\n"
        "    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


class Bounded(Sums):
    """A judge that gives up on what keeps it busy, as ``math`` does: None, where ``score`` says 0."""

    def verdict(self, problem: Problem, answer: str | None) -> float | None:
        return None if answer == "9^9^9^9" else self.score(problem, answer)


def test_an_answer_that_the_tasks_judge_cannot_judge_is_left_out_and_counted_never_paid_0() -> None:
    texts = {"3": (1.0, "paid"), "4": (0.0, "paid"), "9^9^9^9": (None, "abstained")}
    task = Bounded("sums")
    verdicts = TaskJudge([task]).pay([(PROBLEM, Response("", text, True)) for text in texts])
    assert [(verdict.reward, verdict.outcome) for verdict in verdicts] == list(texts.values())
    asked, responses = [(task, PROBLEM)] * 3, [Response("", text, True) for text in texts]
    payer = Payer(None, RLRunConfig(), by_reward=True)  # type: ignore[arg-type]
    assert payer.judge(asked, responses) == verdicts
    rollouts = [
        replace(rollout(0, place), reward=verdict.reward, score=verdict.reward or 0.0, outcome=verdict.outcome)
        for place, verdict in enumerate(verdicts)
    ]
    found = rollout_metrics(rollouts, of_judged=True)
    assert found["accuracy"] == found["accuracy/lucky"] == found["reward"] == 0.5
    assert found["abstained"] == pytest.approx(1 / 3)

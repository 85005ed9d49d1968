"""A user's verifier, a function or any program, pays answers in processes that can be killed; a fault costs its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sprat.errors import ConfigError, TrainingError
from sprat.post.rl import judge_pool
from sprat.post.rl.judge_pool import JudgePool
from sprat.post.rl.problem_file import read_problems
from sprat.post.rl.reward_sources import is_command, reward_inputs
from sprat.post.rl.rewards import Response, Verdict, parse_response
from sprat.tasks import Problem
from sprat.tokens import Tokenizer

PROBLEM = Problem("sums", 3, "2 + 2?", "4", {"id": "a", "row": {"prompt": "2 + 2?", "solution": "4", "level": 1}})
Judge = Callable[..., list[Verdict]]


@pytest.fixture
def judge(tmp_path: Path) -> Iterator[Judge]:
    """What a verifier says of some texts."""
    pools: list[JudgePool] = []

    def judged(name: str, texts: list[str], **options: object) -> list[Verdict]:
        pool = JudgePool(name, **options)  # type: ignore[arg-type]
        pools.append(pool)
        return pool.pay([(PROBLEM, Response("why", text, True, True, f"<think>why</think>{text}")) for text in texts])

    yield judged
    for pool in pools:
        pool.close()


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


FORMS = {
    "ours": "def f(problem, answer):\n    return float(answer.content == problem.answer)\n",
    "two whatever names": "def f(row, said):\n    return said.content == row.answer\n",
    "TRL's, columns by name": "def f(completions, solution, **kwargs):\n"
    "    assert kwargs['level'] == [1] and kwargs['prompts'] == ['2 + 2?']\n"
    "    return [float(c.endswith('>' + s)) for c, s in zip(completions, solution)]\n",
    "TRL's without further columns": "def f(prompts, completions):\n    return [float(completions[0][-1] == '4')]\n",
    "TRL's, asynchronous": "import asyncio\nasync def f(completions, solution, **kwargs):\n"
    "    await asyncio.sleep(0)\n"
    "    return [float(c.endswith('>' + s)) for c, s in zip(completions, solution)]\n",
    "ours, asynchronous": "async def f(problem, answer):\n    return float(answer.content == problem.answer)\n",
    "verl's": "def f(data_source, solution_str, ground_truth, extra_info=None):\n"
    "    assert extra_info['level'] == 1\n"
    "    return {'score': float(solution_str.endswith(ground_truth)), 'more': 1}\n",
    "OpenRLHF's": "def f(queries, prompts, labels):\n"
    "    assert queries[0].startswith(prompts[0])\n"
    "    return {'rewards': [float(queries[0].endswith(labels[0]))]}\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_function_of_any_form_that_people_have_is_a_reward(form: str, judge: Judge, tmp_path: Path) -> None:
    file = written(tmp_path / "mine.py", FORMS[form])
    assert judge(f"{file}:f", ["4", "5"], workers=1) == [Verdict(1.0), Verdict(0.0)]


def test_a_conversational_prompt_has_trls_conversational_completions(tmp_path: Path) -> None:
    file = written(tmp_path / "m.py", "def f(completions):\n    return [len(c[0]['content']) for c in completions]\n")
    problem = Problem("t", 0, "Hi", "", {"row": {"prompt": [{"role": "user", "content": "Hi"}]}})
    pool = JudgePool(f"{file}:f", workers=1)
    assert pool.pay([(problem, Response("", "four", True, True, "four"))]) == [Verdict(4.0)]
    pool.close()


def test_what_stands_behind_the_question_is_no_part_of_trls_prompt(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2?"}]
    row = {"messages": [*turns, {"role": "assistant", "content": "4"}]}
    (tmp_path / "ask.jsonl").write_text(json.dumps(row) + "\n")
    (problem,) = read_problems(tmp_path / "ask.jsonl").problems
    text = f"def f(prompts, completions):\n    return [float(prompts[0] == {turns!r})]\n"
    pool = JudgePool(f"{written(tmp_path / 'm.py', text)}:f", workers=1)
    assert pool.pay([(problem, Response("", "4", True, True, "4"))]) == [Verdict(1.0)]
    pool.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(a, b, c):\n    return 1\n", "no form of a reward"),
        ("f = 3\n", "not a function"),
        (
            "def f(completions, completion_ids, **more):\n    return [-len(completion_ids[0])]\n",
            "completion_ids.*texts",
        ),
        ("def f(completion_ids, **more):\n    return [-len(completion_ids[0])]\n", "completion_ids.*overlong_buffer"),
        ("def g(p, a):\n    return 1\n", "no function 'f'"),
        ("import nowhere\n", "no module 'nowhere'"),
        ("import os\nos._exit(7)\n", "exit code 7"),
    ],
)
def test_what_is_no_reward_is_refused_before_anything_runs(text: str, said: str, tmp_path: Path) -> None:
    file = written(tmp_path / "mine.py", text)
    with pytest.raises(ConfigError, match=said):
        JudgePool(f"{file}:f", workers=1)


FAULTY = """
import ctypes, os, time
def f(problem, answer):
    said = answer.content
    print("noise on stdout"); os.system("echo more noise")
    if said == "raise": 1 / 0
    if said == "nan": return float("nan")
    if said == "text": return "1.0"
    if said == "exit": os._exit(3)
    if said == "segfault": ctypes.string_at(0)
    if said == "sleep": time.sleep(60)
    if said == "hang in C": ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock: no Python signal gets through
    if said == "swallow":
        while True:
            try: time.sleep(60)
            except BaseException: pass
    if said == "abstain": return None
    return 0.5
"""
OUTCOMES = {
    "raise": ("raised", "ZeroDivisionError"),
    "nan": ("raised", "not finite"),
    "text": ("raised", "no number"),
    "exit": ("crashed", "exit code 3"),
    "segfault": ("crashed", "SIGSEGV"),
    "sleep": ("timeout", "longer than 2 s"),
    "hang in C": ("timeout", "longer than 2 s"),
    "swallow": ("timeout", "longer than 2 s"),
    "abstain": ("abstained", ""),
    "fine": ("paid", ""),
}


def test_each_fault_costs_its_own_answer_and_is_never_paid_0(tmp_path: Path) -> None:
    file = written(tmp_path / "faulty.py", FAULTY)
    pool = JudgePool(f"{file}:f", workers=4, timeout_seconds=2.0)

    def judged(texts: list[str]) -> list[Verdict]:
        return pool.pay([(PROBLEM, Response("", text, True)) for text in texts])

    judged(["fine"] * 4)
    for verdict, (outcome, detail) in zip(judged(list(OUTCOMES)), OUTCOMES.values(), strict=True):
        assert verdict.outcome == outcome and detail in verdict.detail, verdict
        assert verdict.reward == (0.5 if outcome == "paid" else None)
    assert judged(["fine"] * 8) == [Verdict(0.5)] * 8, "whoever hung was killed, and all work again"
    pool.close()


COMMAND = """
import json, sys
line = sys.stdin.readline()
request = json.loads(line)
assert request["question"] == "2 + 2?" and request["row"]["level"] == 1 and request["reasoning"] == "why"
said = request["response"]
if said == "fail": sys.exit("it broke")
print("what a program says beside")
print({"null": "null", "true": "true", "none": "", "word": "good"}.get(said) or float(said == request["answer"]))
"""


def test_any_program_that_reads_a_line_and_writes_a_number_is_a_reward(judge: Judge, tmp_path: Path) -> None:
    file = written(tmp_path / "judge.py", COMMAND)
    texts = ["4", "5", "null", "true", "word", "fail"]
    found = judge(f"{sys.executable} {file}", texts, timeout_seconds=60.0)
    assert [verdict.reward for verdict in found] == [1.0, 0.0, None, 1.0, None, None]
    assert [verdict.outcome for verdict in found] == ["paid", "paid", "abstained", "paid", "raised", "crashed"]
    assert "'good'" in found[4].detail and "exit code 1: it broke" in found[5].detail


LINES = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["response"] == "die": os._exit(1)
    print(os.getpid() if request["response"] == "who" else 2.0, flush=True)
"""


def test_a_command_that_stays_answers_line_for_line_and_is_started_again(judge: Judge, tmp_path: Path) -> None:
    file = written(tmp_path / "judge.py", LINES)
    options = {"workers": 1, "keep_alive": True, "timeout_seconds": 60.0}
    first, second, died, third = judge(f"{sys.executable} {file}", ["who", "who", "die", "who"], **options)
    assert first.reward == second.reward != third.reward and died.outcome == "crashed" and third.outcome == "paid"


@pytest.mark.parametrize("finished", [True, False])
def test_a_judge_is_told_which_answers_were_cut_off(
    finished: bool, tokenizer: Tokenizer, judge: Judge, tmp_path: Path
) -> None:
    answer = parse_response(tokenizer, tokenizer.encode("It is"), thinking=None, finished=finished)
    command = written(tmp_path / "judge.py", "import json\nprint(int(json.loads(input())['finished']))\n")
    function = written(tmp_path / "function.py", "def f(problem, answer):\n    return answer.finished\n")
    for name in (f"{sys.executable} {command}", f"{function}:f"):
        pool = JudgePool(name, workers=1)
        (verdict,) = pool.pay([(PROBLEM, answer)])
        pool.close()
        assert verdict.reward == float(finished)


STRAY_LINES = {
    "before the first answer": ("print('ready', flush=True)", "print(float(right), flush=True)"),
    "behind each answer": ("", "print(f'{float(right)}\\n1.0', flush=True)"),
    "a word, and then the number": ("", "print('judging', flush=True); print(float(right), flush=True)"),
    "later": ("", "print(float(right), flush=True); time.sleep(0.2); print(1.0, flush=True)"),
}


@pytest.mark.parametrize("when", STRAY_LINES)
def test_a_line_too_many_never_pays_another_answer(when: str, judge: Judge, tmp_path: Path) -> None:
    first, each = STRAY_LINES[when]
    text = f"import json, sys, time\n{first}\nfor line in sys.stdin:\n"
    text += f"    right = json.loads(line)['response'] == 'right'\n    {each}\n"
    file = written(tmp_path / "judge.py", text)
    pool = JudgePool(f"{sys.executable} {file}", workers=1, keep_alive=True, timeout_seconds=60.0)
    said = ["right", "wrong", "wrong", "right", "wrong"]
    paid = []
    for answer in said:
        paid += [verdict.reward for verdict in pool.pay([(PROBLEM, Response("", answer, True))])]
        time.sleep(0.4 if when == "later" else 0.0)
    pool.close()
    assert all(reward in (None, float(answer == "right")) for reward, answer in zip(paid, said, strict=True))


def test_answers_are_judged_side_by_side(judge: Judge, tmp_path: Path) -> None:
    file = written(tmp_path / "slow.py", "import time\ndef f(p, a):\n    time.sleep(1)\n    return 1.0\n")
    pool = JudgePool(f"{file}:f", workers=8)
    pairs = [(PROBLEM, Response("", "x", True))] * 8
    pool.pay(pairs)  # the workers start
    began = time.monotonic()
    pool.pay(pairs)
    assert time.monotonic() - began < 6  # one after the other they take eight seconds
    pool.close()


@pytest.mark.parametrize(
    ("command", "outcome", "detail"),
    [
        ("sleep 60", "timeout", "longer than 1 s"),
        ("false", "crashed", "exit code 1"),
        ("yes", "crashed", "65,536 bytes"),
    ],
)
def test_a_bad_command_is_killed_or_counted(command: str, outcome: str, detail: str, judge: Judge) -> None:
    (verdict,) = judge(command, ["4"], timeout_seconds=1.0)
    assert verdict.outcome == outcome and detail in verdict.detail and verdict.reward is None


@pytest.mark.parametrize(
    ("said", "detail"), [("'1' + '0' * 400", "too large"), ("'[' * 40000", "no number"), ("'1' * 5000", "no number")]
)
@pytest.mark.parametrize("keep_alive", [False, True])
def test_no_number_ends_a_run_however_large_or_nested(said: str, detail: str, keep_alive: bool, judge: Judge) -> None:
    (verdict,) = judge(f'{sys.executable} -c "print({said})"', ["4"], keep_alive=keep_alive)
    assert verdict.outcome == "raised" and detail in verdict.detail and verdict.reward is None


def test_a_verifier_that_only_fails_ends_the_run_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_pool, "MAX_FAULTS", 8)
    file = written(tmp_path / "broken.py", "def f(p, a):\n    raise KeyError('price')\n")
    pool = JudgePool(f"{file}:f", workers=2)
    with pytest.raises(TrainingError, match=r"failed on each of .* in a row.*KeyError"):
        pool.pay([(PROBLEM, Response("", "x", True))] * 1000)
    pool.close()


def test_a_function_is_known_from_a_command() -> None:
    functions = ["judge.py:f", "a b/judge.py:reward", "my.judges:f"]
    commands = ["python judge.py", "./judge", "node judge.js --port :80", "judge.py"]
    assert [is_command(name) for name in [*functions, *commands]] == [False] * 3 + [True] * 4


def test_a_reward_is_an_input_of_the_run_with_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "rules.py", "LIMIT = 3\n")
    file = written(tmp_path / "judge.py", "import rules\ndef f(p, a):\n    return 1\n")
    inputs = reward_inputs(f"{file}:f")
    assert {key: value for key, value in inputs.items() if isinstance(value, Path)} == {
        "reward/judge.py": file,
        "reward/rules.py": tmp_path / "rules.py",
    }
    called = inputs["reward"]
    assert not isinstance(called, Path | str) and called.model_dump() == {"call": ["judge.py", "f"]}
    monkeypatch.chdir(tmp_path)
    command = reward_inputs(f"{sys.executable} judge.py --strict", "second_reward")
    assert [key for key in command if "/" in key] == ["second_reward/judge.py", "second_reward/rules.py"]
    with pytest.raises(ConfigError, match=r"judge\.py:function"):
        reward_inputs("judge.py")

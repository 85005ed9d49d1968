"""The judge of formulas takes what is worked out, and nothing that only has its value; time-outs are no judgement."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.grading import formulas, math_bars
from bench.grading.honest_runs import TinyTask
from sprat.tasks import task_verdict
from sprat.tasks.formula_text import plain_number, refusal
from sprat.tasks.judge_process import JUDGE_PROCESS, JudgePool
from sprat.tasks.judges import Formula, verdict
from sprat.tasks.user_file import read_task

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="math-verify is not installed")
TOWER = "9^{9^{9^{9}}}"


def test_no_hack_is_taken_and_what_is_right_is() -> None:
    facts = math_bars.hack_strings(quick=False)
    assert facts["hacks"] >= 200 and len(facts["families"]) >= 20
    assert not facts["taken"] and not facts["right_refused"]


def test_many_hacks_are_taken_by_math_verify_itself() -> None:
    """Else the strings above would show nothing about our judge."""
    near = [(expected, answer) for expected, answer, _ in formulas.NEAR]
    taken = [
        pair
        for pair in near
        if JUDGE_PROCESS.verdict("math_verify", f'{{"gold": "${pair[0]}$"}}'.replace("\\", "\\\\"), f"${pair[1]}$")
    ]
    assert len(taken) >= 8


@pytest.mark.slow
def test_its_own_tests_pass_in_our_processes_on_a_busy_machine(tmp_path: Path) -> None:
    try:
        cases, others = formulas.published_cases(tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip("the source of math-verify cannot be fetched here")
    assert len(cases) > 200 and len(others) < 20
    cases = cases[::4]
    with math_bars.busy(8), ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(math_bars.verdict, cases))
    assert [case["name"] for case, got in zip(cases, verdicts, strict=True) if got is not case["expected"]] == []


def test_what_takes_too_long_is_neither_right_nor_wrong_and_the_next_answer_is_judged() -> None:
    assert JUDGE_PROCESS.verdict("math", "x+1", f"{TOWER}x") is None
    assert JUDGE_PROCESS.verdict("math", "x+1", "1+x") is True
    assert not JUDGE_PROCESS.ask("regex", "(a+)+b", "a" * 64)
    assert JUDGE_PROCESS.verdict("regex", "(a+)+b", "a" * 64) is None


def test_a_judge_that_is_not_asked_for_its_bounds_decides() -> None:
    judge = Formula(("x^{2^{3}}",))
    assert verdict(judge, "x^8") is True and verdict(judge, "x^9") is False


def test_a_worker_that_is_killed_has_another_after_it() -> None:
    pool = JudgePool(1)
    assert pool.verdict("math", "5", "5") is True
    process = pool._workers[0]._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert pool.verdict("math", "5", "6") is False
    pool.close()


def test_two_threads_have_two_workers_and_a_third_waits() -> None:
    pool, pids = JudgePool(2), set()
    barrier = threading.Barrier(2)

    def judge(answer: str) -> bool | None:
        barrier.wait()
        return pool.verdict("regex", "(a|b)*c", answer)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(judge, ["abc", "abd"])) == [True, False]
    pids = {worker._process.pid for worker in pool._workers if worker._process}
    assert 1 <= len(pids) <= 2
    pool.close()
    assert all(worker._process is None for worker in pool._workers)


@pytest.mark.parametrize(
    ("expected", "answer", "question", "word"),
    [
        ("221", "13 \\times 17", "What is 13 * 17?", "no plain number"),
        ("5", "6=5", "", "no plain number"),
        ("5", "5 \\text{ million}", "", "unit"),
        ("5\\text{ cm}", "5\\text{ km}", "", "unit"),
        ("5", "5\\text{ or more}", "5 or more", "unit"),
        ("9", "9\\%", "", "value"),
        ("9\\pi", "\\int_0^9 \\pi dx", "", "\\int"),
        ("(x-1)(x+1)", "x^2-1", "Factor $x^2 - 1$.", "stands in the question"),
        ("2\\sqrt{2}", "x=2\\sqrt{2}=3=4", "", "chain"),
        ("x+1", "x+1 \\text{ is right}", "", "says"),
        ("x+1", "x+1\u200b", "", "holds"),
        ("x+1", "x" * 500, "", "longer"),
    ],
)
def test_why_an_answer_is_refused_is_said(expected: str, answer: str, question: str, word: str) -> None:
    assert word in refusal(expected, answer, question)


@pytest.mark.parametrize(
    ("expected", "answer", "question"),
    [
        ("1234", "1{,}234", ""),
        ("\\frac{1}{2}", "0.5", ""),
        ("\\frac{1}{2}", "\\dfrac{2}{4}", ""),
        ("1.5", "1\\frac{1}{2}", ""),
        ("5\\text{ cm}", "5", ""),
        ("5\\text{ cm}", "5 cm", ""),
        ("5", "x = 5", ""),
        ("5", "5 \\text{ apples}", "How many apples?"),
        ("90", "90^\\circ", "What is the angle?"),
        ("18\\%", "18", ""),
        ("0.18", "18\\%", ""),
        ("5000", "5 \\times 10^3", ""),
        ("2\\sqrt{2}", "\\frac{4}{\\sqrt{2}}", ""),
        ("(x-1)(x+1)", "(x+1)(x-1)", "Factor $x^2-1$."),
        ("\\{1,2\\}", "\\{2,1\\}", ""),
        ("\\{1,2\\}", "1, 2", ""),
        ("y=2x+1", "y=1+2x", ""),
        ("(1,2)", "(1,2)", ""),
        ("9\\pi", "9\u03c0", ""),
    ],
)
def test_another_way_to_write_it_is_right(expected: str, answer: str, question: str) -> None:
    assert refusal(expected, answer, question) == ""
    assert Formula((expected,), question=question).is_right(f"So: \\boxed{{{answer}}}")


def test_what_is_a_plain_number() -> None:
    values = [plain_number(text) for text in ("-0.5", "\\frac12", "1e5", "2x", "5!", "1/0", "10^3", "1,23", "x=7", "٣")]
    assert [None if value is None else float(value.value) for value in values] == [
        -0.5, 0.5, None, None, None, None, None, None, 7.0, None,
    ]  # fmt: skip


def test_a_row_of_a_file_hands_its_question_on_and_abstains(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    rows = ['{"question": "Factor x^2-1", "answer": "(x-1)(x+1)", "judge": "math"}']
    path.write_text("\n".join(rows))
    task = read_task(path)
    problem = task.problem("test", 0)
    assert task.score(problem, "(x+1)(x-1)") == 1.0 and task.score(problem, "x^2-1") == 0.0
    assert task.verdict(problem, None) == 0.0
    assert task_verdict(task, problem, "(x+1)(x-1)") == 1.0


def test_a_judgement_that_was_not_reached_is_none_for_training_and_nothing_for_an_evaluation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"question": "What is x?", "answer": "x+1", "judge": "math"}')
    task = read_task(path)
    problem = task.problem("test", 0)
    monkeypatch.setattr(JudgePool, "verdict", lambda self, *args, **named: None)
    assert task_verdict(task, problem, "1+x") is None and task.score(problem, "1+x") == 0.0
    assert task_verdict(TinyTask("sum"), TinyTask("sum").problem("train", 0), "no") == 0.0

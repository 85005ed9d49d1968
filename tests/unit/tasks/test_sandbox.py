"""Code that nobody has read harms nothing, and is paid for nothing but right results."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.grading import attacks
from sprat.errors import DataError, MachineError
from sprat.tasks import sandbox, sandbox_shell
from sprat.tasks.code_tests import CodeTests, ProgramTest, code_of, run_asserts
from sprat.tasks.sandbox import Limits, SandboxedProcess, run_program, sandbox_facts
from sprat.tasks.user_file import read_task

READY = sandbox_facts()["ready"]
LIMITS = Limits(cpu_seconds=2, idle_seconds=2)
needs_sandbox = pytest.mark.skipif(
    not READY and not os.environ.get("SPRAT_REQUIRE_SANDBOX"), reason=str(sandbox_facts()["problem"])
)


@pytest.fixture
def fresh_facts() -> Iterator[None]:
    """What this machine can do is found out anew, and again afterwards."""
    sandbox_facts.cache_clear()
    yield
    sandbox_facts.cache_clear()


@needs_sandbox
@pytest.mark.slow
@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_attack_is_held(name: str) -> None:
    assert attacks.carry_out(name).breaches == []


@needs_sandbox
@pytest.mark.parametrize("name", attacks.CONTROLS)
def test_the_same_attack_without_a_sandbox_gets_through(name: str) -> None:
    with attacks.without_sandbox():
        assert attacks.ATTACKS[name]() != []


def test_a_grader_that_runs_tests_behind_the_code_pays_attacks() -> None:
    assert attacks.naive_points(attacks.EXITS) >= 3 and attacks.naive_points(attacks.MONKEYPATCHES) >= 1


@needs_sandbox
def test_every_right_is_given_up() -> None:
    facts = sandbox_facts()
    assert facts["seccomp"] and facts["no_new_privileges"]
    assert facts["uid"] >= sandbox.FIRST_UID if os.getuid() == 0 else facts["uid"] == os.getuid()


@needs_sandbox
def test_a_program_reads_and_writes() -> None:
    outcome = run_program("import sys\nprint(sys.stdin.read().upper(), end='')", "\u00e4 b\n" * 20_000)
    assert (outcome.ended, outcome.status, outcome.output.decode()) == ("exit", 0, "\u00c4 B\n" * 20_000)


@needs_sandbox
def test_a_program_that_sleeps_is_over_its_time_and_a_busy_one_over_its_cpu_seconds() -> None:
    assert run_program("import time\ntime.sleep(60)", limits=LIMITS).ended == "idle"
    spun = run_program("while True:\n    pass", limits=LIMITS)
    assert (spun.ended, spun.status) == ("exit", 128 + signal.SIGKILL)


@needs_sandbox
def test_a_stopped_machine_is_no_judgement() -> None:
    judge = CodeTests((ProgramTest("", "1\n"),), limits=Limits(wall_seconds=0.5))
    assert judge.verdict("import time\ntime.sleep(3)\nprint(1)") is None


@needs_sandbox
def test_a_spare_sandbox_that_died_is_replaced() -> None:
    run_program("print(1)")
    for shells in sandbox_shell.SPARES._shells.values():
        for shell in shells:
            shell.process.kill()
            shell.process.wait()
    assert [run_program("print(1)").output for _ in range(4)] == [b"1\n"] * 4


ANSWER = """
def add(a, b):
    return a + b


def sort(values):
    values.sort()


class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)
        return self

    def __len__(self):
        return len(self.items)


def count(n):
    yield from range(n)


class Refused(ValueError):
    pass


def refuse():
    raise Refused("no")


LIMIT = 7
"""
TESTS = """
import math
from solution import Stack as Pile

def test_numbers():
    assert add(1, 2) == 3 and add(0.5, 0.25) == 0.75 and add(2**100, 1) == 2**100 + 1
    assert add((1,), (2,)) == (1, 2) and add("a", "b") == "ab" and add(b"a", b"b") == b"ab"
    assert math.isnan(add(float("nan"), 0)) and add(1j, 1) == 1 + 1j and LIMIT == 7

def test_changed_in_place():
    values = [3, 1, 2]
    assert sort(values) is None
    assert values == [1, 2, 3]

def test_objects():
    pile = Pile()
    assert len(pile.push(1).push([2])) == 2
    assert pile.items == [1, [2]]
    assert list(count(3)) == [0, 1, 2]

def test_errors():
    try:
        refuse()
        assert False
    except ValueError as error:
        assert "no" in str(error)
"""


@needs_sandbox
def test_functions_classes_and_errors_are_tested_over_the_border() -> None:
    judge = CodeTests(TESTS)
    assert judge.is_right(ANSWER) and judge.is_right(f"It is:\n```python\n{ANSWER}```\nDone.")
    for old, new in (("a + b", "a - b"), ("values.sort()", "return sorted(values)"), ("append", "remove")):
        assert not judge.is_right(ANSWER.replace(old, new))
    for old, new in (("(ValueError)", "(Exception)"), ("range(n)", "range(n + 1)"), ("LIMIT = 7", "")):
        assert not judge.is_right(ANSWER.replace(old, new))


@needs_sandbox
def test_what_cannot_be_told_is_no_judgement() -> None:
    assert run_asserts(ANSWER, "def f():\n    assert add(1, 1) == 3\n", LIMITS) is None  # nothing ran
    assert run_asserts(ANSWER, "assert add(lambda: 1, 2)", LIMITS) is None  # no plain data
    assert run_asserts("def f(x): return x", "assert f(3) == 3", LIMITS) is True


@needs_sandbox
def test_an_object_of_the_answers_is_true_of_nothing() -> None:
    trick = "class Any:\n    __eq__ = lambda self, other: True\n    __hash__ = None\ndef f():\n    return Any()\n"
    for test in ("assert f() == 3", "assert f()", "assert f() == f()", "assert [f()] == [3]", "assert 3 in [f()]"):
        assert run_asserts(trick, test, LIMITS) is False, test


def test_two_blocks_of_code_are_none() -> None:
    assert code_of("```python\na\n```\nor\n```python\nb\n```") is None and code_of("```python\na") is None
    assert code_of("  ") is None and code_of("x = 1") == "x = 1"


@needs_sandbox
def test_programs_are_held_against_each_pair() -> None:
    judge = CodeTests((ProgramTest("1 2\n", "3\n"), ProgramTest("5 6", "11")))
    assert judge.is_right("print(sum(map(int, input().split())), ' ')")
    assert not judge.is_right("print(3)") and not judge.is_right("print(sum(map(int, input().split())))\n1 / 0")


@needs_sandbox
def test_rows_of_a_file_hold_tests(tmp_path: Path) -> None:
    path = tmp_path / "code.jsonl"
    rows = [
        '{"judge": "code"}',
        '{"question": "Write add(a, b).", "answer": "assert add(1, 2) == 3"}',
        '{"question": "Print 1.", "answer": [{"stdin": "", "stdout": "1"}]}',
    ]
    path.write_text("\n".join(rows))
    task = read_task(path)
    first, second = task.problem("test", 0), task.problem("test", 1)
    assert task.score(first, "add = lambda a, b: a + b") == 1.0 and task.score(first, "add = max") == 0.0
    assert task.score(second, "print(1)") == 1.0 and task.score(second, "1") == 0.0


@needs_sandbox
@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ('"assert add(1"', "no Python"),
        ('"add(1, 2)"', "assert nothing"),
        ('[{"stdin": "1"}]', "stdin and stdout"),
        ("7", "no tests"),
    ],
)
def test_what_is_no_test_is_refused_with_its_line(tmp_path: Path, answer: str, word: str) -> None:
    path = tmp_path / "code.jsonl"
    path.write_text(f'{{"question": "Write add.", "answer": {answer}, "judge": "code"}}')
    with pytest.raises(DataError, match=f"(?s){word}.*line 1"):
        read_task(path)


def test_without_bubblewrap_code_is_refused(monkeypatch: pytest.MonkeyPatch, fresh_facts: None) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(MachineError, match=r"(?s)cannot be run safely here: bubblewrap.*apt-get install bubblewrap"):
        CodeTests("assert f() == 1")


def test_where_the_kernel_makes_no_namespace_code_is_refused(
    monkeypatch: pytest.MonkeyPatch, fresh_facts: None, tmp_path: Path
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: Creating new namespace failed: Operation not permitted' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(MachineError, match="Creating new namespace failed"):
        CodeTests("assert f() == 1")


@needs_sandbox
def test_without_seccomp_code_is_refused(monkeypatch: pytest.MonkeyPatch, fresh_facts: None, tmp_path: Path) -> None:
    init = tmp_path / "sandbox_init.py"
    text = Path(sandbox_shell.__file__).with_name("sandbox_init.py").read_text()
    init.write_text(
        text.replace('"aarch64": (0xC00000B7', '"other": (0xC00000B7').replace('"x86_64": (0xC0', '"x": (0xC0')
    )
    command = sandbox_shell._command

    def changed(disk_bytes: int, facts_out: int) -> list[str]:
        real = str(Path(sandbox_shell.__file__).with_name("sandbox_init.py"))
        return [str(init) if word == real else word for word in command(disk_bytes, facts_out)]

    monkeypatch.setattr(sandbox_shell, "_command", changed)
    with pytest.raises(MachineError, match="seccomp"):
        CodeTests("assert f() == 1")


@needs_sandbox
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="there is no Python that any user can read")
def test_a_user_without_rights_has_a_sandbox_or_is_told_why_not(tmp_path: Path) -> None:
    """Sprat need not be root: Linux lets users make namespaces, or a sentence says that it does not."""
    source = Path(sandbox.__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:  # what the sandbox is made of, where another user can read it
        package = Path(folder, "sprat", "tasks")
        package.mkdir(parents=True)
        for name in ("errors.py", *(f"tasks/{path.name}" for path in source.glob("tasks/sandbox*.py"))):
            shutil.copy(source / name, package.parent / name)
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o755)
        code = (
            "from sprat.tasks.sandbox import run_program, sandbox_facts\nfacts = sandbox_facts()\n"
            "print(facts['problem'] or run_program('import os; print(os.getuid(), 6 * 7)').output.decode())"
        )
        done = subprocess.run(
            ["/usr/bin/python3", "-c", code],
            cwd=folder, env={"PYTHONPATH": folder}, user=61_999, group=61_999,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.stdout.strip() == "61999 42" or "sandbox" in done.stdout, done.stderr


@needs_sandbox
def test_a_process_ends_with_its_block() -> None:
    with SandboxedProcess("import time\ntime.sleep(60)", "program", LIMITS) as process:
        assert process.process.poll() is None
    assert process.process.poll() is not None

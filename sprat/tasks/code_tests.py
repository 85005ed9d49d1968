r"""Code as an answer, judged by the user's tests: what it prints, or what its functions return.

Two kinds of tests. Pairs of ``stdin`` and ``stdout``: the code is run as a program, once for each, and what it prints
is compared here. Python with ``assert``: it runs in a process of its own (``code_tester``) and calls the answer over a
socket. Either way the answer runs in a sandbox (``sandbox``), and nothing that it could do there says whether it is
right: that is found out on this side, from data.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import secrets
import selectors
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sprat.errors import DataError
from sprat.tasks.sandbox import Limits, SandboxedProcess, require_sandbox

log = logging.getLogger(__name__)
MAX_CODE_CHARS = 100_000
MAX_STDIN_BYTES = 512 << 10
_TESTER_CPU_SECONDS = 30
_POLL_SECONDS = 0.1
_FENCE = re.compile(r"^```[^\n`]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class ProgramTest:
    """What a program reads, and what it must print (blanks at the ends of lines and of the whole aside)."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class CodeTests:
    """An answer is right if it passes all tests.

    Args:
        tests: Python with ``assert``, whose names that it does not define are the answer's; or pairs.
        where: file and line of the row.

    Raises:
        DataError: the tests are none.
        MachineError: this machine cannot hold a sandbox.
    """

    tests: str | tuple[ProgramTest, ...]
    where: str = ""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        require_sandbox()
        if not isinstance(self.tests, str):
            if not self.tests:
                raise DataError("no tests", where=self.where, todo='give [{"stdin": "…", "stdout": "…"}]')
            if any(len(test.stdin.encode()) > MAX_STDIN_BYTES for test in self.tests):
                raise DataError("a test's stdin is over half a MiB", where=self.where, todo="make it smaller")
            return
        try:
            tree = ast.parse(self.tests)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise DataError(f"the tests are no Python: {error}", where=self.where, todo="mend them") from None
        if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
            raise DataError("the tests assert nothing", where=self.where, todo="write assert f(1) == 2, a line each")

    @property
    def expected(self) -> str:
        """The tests, as a report shows them."""
        if isinstance(self.tests, str):
            return self.tests
        return json.dumps([{"stdin": test.stdin, "stdout": test.stdout} for test in self.tests])

    def is_right(self, answer: str) -> bool:
        """See the class; what nobody could find out is not right."""
        return bool(self.verdict(answer))

    def verdict(self, answer: str) -> bool | None:
        """Whether ``answer`` passes; None where the machine was too busy to tell, or the tests could not be run."""
        code = code_of(answer)
        if code is None or len(code) > MAX_CODE_CHARS:
            return False
        if isinstance(self.tests, str):
            return run_asserts(code, self.tests, self.limits, self.where)
        return run_programs(code, self.tests, self.limits)


def code_tests(answer: Any) -> str | tuple[ProgramTest, ...]:
    """The tests that the ``answer`` of a row states.

    Raises:
        DataError: it states none.
    """
    todo = 'write "answer": "assert f(1) == 2" or [{"stdin": "1", "stdout": "2"}]'
    if isinstance(answer, str):
        return answer
    if not isinstance(answer, list) or not all(isinstance(test, dict) for test in answer):
        raise DataError("answer is no tests", todo=todo)
    tests = []
    for test in answer:
        if test.keys() != {"stdin", "stdout"} or not all(isinstance(text, str) for text in test.values()):
            raise DataError("a test is not stdin and stdout, both text", todo=todo)
        tests.append(ProgramTest(test["stdin"], test["stdout"]))
    return tuple(tests)


def code_of(answer: str) -> str | None:
    r"""The one block of code of an answer, or all of it where nothing is set off; None where there are several.

    >>> code_of("Here:\n```python\nprint(1)\n```\n"), code_of("print(1)"), code_of("```\na\n```\n```\nb\n```")
    ('print(1)\n', 'print(1)', None)
    """
    blocks = _FENCE.findall(answer)
    if not blocks:
        return answer if answer.strip() and "```" not in answer else None
    return str(blocks[0]) if len(blocks) == 1 else None


def run_programs(code: str, tests: Sequence[ProgramTest], limits: Limits) -> bool | None:
    """Whether ``code``, run as a program, prints what each test says, and ends without an error."""
    for test in tests:
        with SandboxedProcess(code, "program", limits, test.stdin) as process:
            outcome = process.wait()
        if outcome.ended == "wall":
            return None
        if outcome.ended != "exit" or outcome.status != 0:
            return False
        if _lines(outcome.output.decode("utf-8", "replace")) != _lines(test.stdout):
            return False
    return True


def run_asserts(code: str, tests: str, limits: Limits, where: str = "") -> bool | None:
    """Whether ``tests`` pass, with the functions of ``code``."""
    nonce = secrets.token_hex(16)
    with SandboxedProcess(code, "module", limits) as process:
        process.control.setblocking(True)
        tester = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                str(Path(__file__).with_name("code_tester.py")),
                str(process.control.fileno()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(process.control.fileno(),),
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            process.control.close()
            return _verdict(
                tester, process, {"tests": tests, "nonce": nonce, "cpu_seconds": _TESTER_CPU_SECONDS}, where
            )
        finally:
            tester.kill()
            tester.wait()
            for pipe in (tester.stdin, tester.stdout):
                if pipe is not None:
                    pipe.close()


def _verdict(tester: subprocess.Popen[bytes], answer: SandboxedProcess, job: dict[str, Any], where: str) -> bool | None:
    """Wait for the tester's verdict; the answer's process is ended when it goes over its bounds of time."""
    assert tester.stdin is not None and tester.stdout is not None
    tester.stdin.write(json.dumps(job).encode() + b"\n")
    tester.stdin.flush()
    with selectors.DefaultSelector() as selector:
        selector.register(tester.stdout, selectors.EVENT_READ)
        while not selector.select(_POLL_SECONDS):
            if over := answer.overrun():
                return None if over == "wall" else False
    try:
        verdict = json.loads(tester.stdout.readline())
        if verdict.get("nonce") != job["nonce"]:
            raise ValueError
    except ValueError:
        verdict = {"fault": "the process of the tests ended"}
    if "fault" in verdict:
        log.warning("code was not judged: %s (%s)", verdict["fault"], where)
        return None
    log.debug("%s (%s)", verdict, where)
    return bool(verdict["passed"])


def _lines(text: str) -> list[str]:
    """The lines of an output, without blanks at their ends and at the end of it all."""
    return [line.rstrip() for line in text.rstrip().split("\n")]

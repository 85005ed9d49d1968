"""The processes in which a user's verifier runs: each can be killed with all that it started.

See ``judge_pool`` for what is said to them and what they answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Protocol

from sprat.errors import ConfigError
from sprat.files.json import to_json_value
from sprat.post.rl import reward_worker
from sprat.post.rl.reward_forms import answer_data, columns_of
from sprat.post.rl.rewards import Response, Verdict, visible_text
from sprat.tasks import Problem
from sprat.tasks.user_code import finite_float

START_SECONDS = 120.0  # for a function's imports
_MAX_REPLY_BYTES = 1 << 16
_STDERR_BYTES = 2000  # of its end, where a reason is sought
_MAX_STDERR_BYTES = 1 << 20  # kept of one that stays, between two answers


class CrashError(Exception):
    """The process of a verifier ended, or said what is no reply."""


class Child(Protocol):
    """One process, or the way to start one; used by one thread at a time."""

    def verdict(self, problem: Problem, answer: Response, seconds: float) -> Verdict:
        """What is said of ``answer``. Raises: TimeoutError, CrashError."""
        ...

    def kill(self) -> None:
        """End the process and all that it started; the next answer has another one."""
        ...


class _Process:
    """A process with pipes, in a session of its own, so that it is killed with all that it started."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this does)
        self._buffer = b""

    def kill(self) -> None:
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what was still to be written to a dead process
                if pipe is not None:
                    pipe.close()

    def _open(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.kill()
        if self._process is None or os.fstat(self._stderr.fileno()).st_size > _MAX_STDERR_BYTES:
            self._stderr.seek(0)  # the process writes where this file is: both have one place in it
            self._stderr.truncate()
        if self._process is None:
            try:
                self._process = subprocess.Popen(
                    self._arguments,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._stderr,
                    start_new_session=True,  # an interrupt at the terminal is not meant for it
                )
            except OSError as error:
                raise CrashError(f"could not be started: {error.strerror}") from None
        return self._process

    def _send(self, content: bytes, deadline: float) -> None:
        """Raises: TimeoutError: it does not read; CrashError: it ended."""
        process = self._open()
        assert process.stdin is not None
        number = process.stdin.fileno()
        os.set_blocking(number, False)
        with selectors.DefaultSelector() as selector:
            selector.register(number, selectors.EVENT_WRITE)
            while content:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                try:
                    content = content[os.write(number, content) :]
                except OSError:
                    raise CrashError(self._how_it_ended()) from None

    def _read(self, deadline: float, *, to_end: bool = False) -> bytes:
        """A line of its stdout, or all of it. Raises: TimeoutError; CrashError: it ended before, or said too much."""
        process = self._process
        assert process is not None and process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while to_end or b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                part = os.read(process.stdout.fileno(), _MAX_REPLY_BYTES)
                if not part:
                    if to_end:
                        break
                    raise CrashError(self._how_it_ended())
                self._buffer += part
                if len(self._buffer) > _MAX_REPLY_BYTES:
                    raise CrashError(f"wrote more than {_MAX_REPLY_BYTES:,} bytes")
        line, _, rest = (self._buffer, b"", b"") if to_end else self._buffer.partition(b"\n")
        self._buffer = rest
        return line

    def _how_it_ended(self) -> str:
        """Its exit code or signal, and the last line that it wrote to stderr."""
        process = self._process
        assert process is not None
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its output and went on"
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - _STDERR_BYTES))
        lines = self._stderr.read().decode("utf-8", "replace").split("\n")
        reason = next((f": {line.strip()[:200]}" for line in reversed(lines) if line.strip()), "")
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}{reason}"
        return f"left with exit code {code}{reason}"


class FunctionChild(_Process):
    """A worker with the user's function."""

    def __init__(self, name: str, timeout_seconds: float) -> None:
        super().__init__([sys.executable, "-m", "sprat.post.rl.reward_worker"])
        self._spec = {"source": name, "seconds": timeout_seconds}

    def start(self) -> None:
        """Start it, if it does not run, and wait until the function is there.

        Raises:
            ConfigError: there is none, or of no form. CrashError, TimeoutError: importing it took the process down.
        """
        if self._process is not None and self._process.poll() is None:
            return
        deadline = time.monotonic() + START_SECONDS
        try:
            self._send(_line(self._spec), deadline)
            reply = json.loads(self._read(deadline))
        except (TimeoutError, CrashError) as error:
            what = f"importing it {error or f'took longer than {START_SECONDS:g} s'}"
            raise ConfigError(what, where=f"reward {self._spec['source']}", todo="mend the file") from None
        if "error" in reply:
            what, where, todo = reply["error"]
            raise ConfigError(what, where=where, todo=todo)

    def verdict(self, problem: Problem, answer: Response, seconds: float) -> Verdict:
        """See ``Child``."""
        try:
            self.start()
        except ConfigError as error:
            raise CrashError(error.what) from None
        deadline = time.monotonic() + seconds
        self._send(_line(reward_worker.pack(problem, answer)), deadline)
        try:
            reply = json.loads(self._read(deadline))
            if "fault" in reply:
                return Verdict(None, "raised", str(reply["fault"]))
            return _paid(reply["value"])
        except (ValueError, KeyError, TypeError):
            raise CrashError("wrote what is no reply") from None


class CommandChild(_Process):
    """A command that is started for each answer."""

    def verdict(self, problem: Problem, answer: Response, seconds: float) -> Verdict:
        """See ``Child``."""
        deadline = time.monotonic() + seconds
        try:
            process = self._open()
            assert process.stdin is not None
            with contextlib.suppress(CrashError):  # it may not want to read all of it
                self._send(request_line(problem, answer), deadline)
            with contextlib.suppress(OSError):
                process.stdin.close()
            output = self._read(deadline, to_end=True)
            try:
                code = process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TimeoutError from None
            if code:
                raise CrashError(self._how_it_ended())
            lines = output.decode("utf-8", "replace").split("\n")
            return _read_number(next((line for line in reversed(lines) if line.strip()), ""))
        finally:
            self.kill()


class LineChild(_Process):
    """A command that stays, and answers line for line.

    One that says more than was asked, or what is no number, is started anew: its next line would be taken for what
    another answer is worth.
    """

    def verdict(self, problem: Problem, answer: Response, seconds: float) -> Verdict:
        """See ``Child``."""
        deadline = time.monotonic() + seconds
        if self._speaks_unasked():
            self.kill()
        self._send(request_line(problem, answer), deadline)
        verdict = _read_number(self._read(deadline).decode("utf-8", "replace"))
        if self._buffer:
            raise CrashError("wrote more than one line to one answer")
        if verdict.outcome == "raised":
            self.kill()
        return verdict

    def _speaks_unasked(self) -> bool:
        """Whether there is something to read before anything is asked; also its end."""
        if self._process is None or self._process.stdout is None:
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return bool(selector.select(0))


def request_line(problem: Problem, answer: Response) -> bytes:
    """What a command is told of one answer: a line of JSON."""
    request: dict[str, Any] = {
        "id": str(problem.meta.get("id", problem.index)),
        "question": problem.question,
        "answer": answer_data(problem),
        "response": visible_text(answer) or "",
        "reasoning": answer.reasoning,
        "finished": answer.closed and answer.finished,
        "row": dict(columns_of(problem)),
    }
    return _line(request)


def _read_number(text: str) -> Verdict:
    """A number, true, false or null, as JSON."""
    try:
        return _paid(json.loads(text))
    except (ValueError, RecursionError):
        shown = text.strip()[:80]
        return Verdict(None, "raised", f"wrote {shown!r}, which is no number" if shown else "wrote nothing")


def _paid(value: Any) -> Verdict:
    """A verdict of what was said. Raises: ValueError: it is no number."""
    if value is None:
        return Verdict(None, "abstained")
    try:
        return Verdict(finite_float(value))
    except ValueError as error:
        return Verdict(None, "raised", f"raised ValueError: {error}")


def _line(request: dict[str, Any]) -> bytes:
    return json.dumps(to_json_value(request), default=str).encode() + b"\n"

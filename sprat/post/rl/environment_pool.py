"""A user's environment in processes that can be killed: one for each episode, several turns at once.

What an environment does wrong costs its own episode: an exception, no number, a time-out or a crash is a fault, which
pays nothing and is counted. Where the last ``MAX_FAULTS`` episodes were all faults, the environment is broken.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from sprat.config.rl import EnvironmentConfig
from sprat.errors import ConfigError, MachineError, TrainingError, unpack_error
from sprat.files.json import to_json_value
from sprat.post.rl.environment_worker import Lines, Row
from sprat.post.rl.judge_pool import MAX_FAULTS
from sprat.post.rl.rewards import Outcome
from sprat.tasks import Problem

START_SECONDS = 120.0  # for the imports
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class FaultError(Exception):
    """An episode cannot go on: what became of it, and what was said."""

    outcome: Outcome
    detail: str


class EpisodeProcess:
    """One episode; used by one thread at a time."""

    def __init__(self, pool: EnvironmentPool, connection: socket.socket, pid: int) -> None:
        self._pool, self._lines, self._pid, self._is_open = pool, Lines(connection), pid, True

    def reset(self, problem: Problem | None, seed: int) -> Row:
        """Begin; see ``environment_forms.Episode.reset``. Raises: FaultError."""
        packed = None if problem is None else to_json_value({**vars(problem), "meta": dict(problem.meta)})
        return self._ask({"do": "reset", "problem": packed, "seed": seed})

    def step(self, content: str, tool_calls: Sequence[Row], reasoning: str) -> Row:
        """Take a turn; see ``environment_forms.Episode.step``. Raises: FaultError."""
        return self._ask({"do": "step", "content": content, "tool_calls": list(tool_calls), "reasoning": reasoning})

    def reward(self) -> float | None:
        """What the environment says that the episode was worth, where it is cut off. Raises: FaultError."""
        value: float | None = self._ask({"do": "reward"})["reward"]
        return value

    def close(self) -> int:
        """End the process and all that it started; its exit code, or the signal that ended it, below 0."""
        if not self._is_open:
            return 0
        self._is_open = False
        with contextlib.suppress(OSError):
            os.killpg(self._pid, signal.SIGKILL)
        self._lines.connection.close()
        return self._pool.wait(self._pid)

    def _ask(self, request: Row) -> Row:
        if self._pool.is_broken:
            raise FaultError("crashed", "was not asked any more")
        try:
            reply = self._exchange(request)
        except FaultError as fault:
            self._pool.note_request(fault)
            raise
        self._pool.note_request(None)
        return reply

    def _exchange(self, request: Row) -> Row:
        limit = self._pool.config.step_timeout
        deadline, reply = time.monotonic() + limit, None
        try:
            self._lines.connection.settimeout(limit)
            self._lines.write(request)
            self._lines.connection.settimeout(max(0.001, deadline - time.monotonic()))
            reply = self._lines.read()
        except TimeoutError:
            self.close()
            raise FaultError("timeout", f"took longer than {limit:g} s") from None
        except ValueError:
            self.close()
            raise FaultError("crashed", "wrote what is no reply") from None
        except OSError:
            pass
        if reply is None:
            raise self._crash()
        if "fault" in reply:
            raise FaultError("raised", str(reply["fault"]))
        return reply

    def _crash(self) -> FaultError:
        """How it ended by itself."""
        code = self.close()
        if code == -signal.SIGPROF:
            return FaultError("timeout", f"took more than {self._pool.config.cpu_seconds:g} CPU seconds")
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
        return FaultError("crashed", ended)


class EnvironmentPool:
    """See the module's text.

    Args:
        name: ``file.py:Class``, ``module:Class`` or a built-in one.

    Attributes:
        pays: whether the environment says what an episode is worth.
        takes_problem: whether its ``reset`` asks for a problem.
        is_broken: nothing is asked any more.

    Raises:
        SpratError: there is no such environment, it is of no form, or this machine cannot hold it.
    """

    def __init__(self, name: str, config: EnvironmentConfig) -> None:
        self.name, self.config, self._lock = name, config, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: Lines | None = None
        self._row_of_faults, self._failed_requests = 0, 0
        self.is_broken, self._last_detail = False, ""
        facts = self._start()
        self.pays, self.takes_problem = bool(facts["pays"]), bool(facts["takes_problem"])

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"environment {self.name}"

    def open(self) -> EpisodeProcess:
        """The process of a new episode.

        Raises:
            MachineError: it cannot be had.
        """
        with self._lock:
            for is_last in (False, True):
                if self._process is None or self._process.poll() is not None:
                    self._start()
                ours, theirs = socket.socketpair()
                try:
                    assert self._lines is not None
                    self._lines.write({"do": "fork"}, theirs.fileno())
                    reply = self._lines.read() or {"pid": -1}
                    if reply["pid"] > 0:
                        return EpisodeProcess(self, ours, int(reply["pid"]))
                    ours.close()
                except (OSError, ValueError):
                    ours.close()
                finally:
                    theirs.close()
                self._kill()
                if is_last:
                    break
        what, todo = "the process that begins its episodes ended", "see whether the machine has memory left"
        raise MachineError(what, where=self.label, todo=todo)

    def wait(self, pid: int) -> int:
        """How the process of an episode ended that was killed, or ended."""
        with self._lock:
            with contextlib.suppress(OSError, ValueError):
                assert self._lines is not None
                self._lines.write({"do": "wait", "pid": pid})
                if (reply := self._lines.read()) is not None:
                    return int(reply["status"])
            return -signal.SIGKILL

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """``function`` of each, as many at once as ``config.workers``."""
        with ThreadPoolExecutor(self.config.workers) as executor:
            return list(executor.map(function, items))

    def note_request(self, fault: FaultError | None) -> None:
        """Count what was asked; where the last ``MAX_FAULTS`` were all faults, nothing is asked any more."""
        with self._lock:
            self._failed_requests = 0 if fault is None else self._failed_requests + 1
            self._last_detail = self._last_detail if fault is None else fault.detail
            self.is_broken = self.is_broken or self._failed_requests >= MAX_FAULTS

    def note(self, fault: FaultError | None) -> None:
        """Count an episode that is over.

        Raises:
            TrainingError: the last ``MAX_FAULTS`` were all faults.
        """
        self._row_of_faults = 0 if fault is None else self._row_of_faults + 1
        if fault is not None and (self.is_broken or self._row_of_faults >= MAX_FAULTS):
            what = f"the environment failed {MAX_FAULTS} times in a row; the last time it {self._last_detail}"
            raise TrainingError(what, where=self.label, todo="mend the environment")

    def close(self) -> None:
        """End all processes: episodes end with the one that began them."""
        with self._lock:
            self._kill()

    def _start(self) -> Row:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "sprat.post.rl.environment_worker", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # an interrupt at the terminal is not meant for it
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        theirs.close()
        ours.settimeout(START_SECONDS)
        self._lines = Lines(ours)
        wall, cpu = self.config.step_timeout, self.config.cpu_seconds
        try:
            self._lines.write({"name": self.name, "wall_seconds": wall, "cpu_seconds": cpu})
            reply = self._lines.read()
        except (OSError, ValueError):
            reply = None
        if reply is None or "error" in reply:
            self._kill()
        if reply is None:
            what = "importing it and making an object of it ended the process, or took too long"
            raise ConfigError(what, where=self.label, todo="mend the file")
        if "error" in reply:
            raise unpack_error(reply["error"], ConfigError)
        return reply

    def _kill(self) -> None:
        process, lines, self._process, self._lines = self._process, self._lines, None, None
        if process is not None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if lines is not None:
            lines.connection.close()

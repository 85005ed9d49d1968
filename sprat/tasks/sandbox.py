"""Runs code that nobody has read: no network, no files, no other process, bounded time, memory and output.

The sandbox is bubblewrap's namespaces around ``sandbox_init``, which gives up every right before the code is looked at.
What the kernel must have for it is tried, not looked up (``sandbox_facts``); where something is missing, code is not
run at all and a sentence says what it was.

Time is CPU time, which a busy machine does not shorten. Code that sleeps uses none; so what is bounded beside it is the
time in which it neither ran nor waited for a processor (the kernel counts both). A run that needs more wall time than
``wall_seconds`` all the same has met a machine that is too busy, and is no judgement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
import selectors
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from sprat.errors import MachineError
from sprat.tasks.sandbox_shell import ADVICE, SPARES, START_SECONDS, Shell, readable_paths

Mode = Literal["program", "module", "facts"]
FIRST_UID, NUM_UIDS = 61_000, 4_000  # no user's, and mapped in most containers
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Limits:
    """What one run may take.

    Attributes:
        cpu_seconds: of all its threads, with about 0.03 s for Python itself.
        idle_seconds: in which it neither ran nor waited for a processor.
        wall_seconds: after which nobody waits any longer; not a judgement.
        threads: of one process, the only one there is.
    """

    cpu_seconds: int = 4
    memory_bytes: int = 512 << 20
    disk_bytes: int = 16 << 20
    output_bytes: int = 1 << 20
    idle_seconds: float = 4.0
    wall_seconds: float = 300.0
    threads: int = 32


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        ended: ``exit``; ``idle`` or ``output``, where it went over that bound; ``wall``, where nothing is known.
        status: its exit status, 128 and the signal's number where one killed it; -1 where it was stopped from here.
        output: what it wrote, cut at its bound.
    """

    ended: Literal["exit", "idle", "output", "wall"]
    status: int
    output: bytes


class SandboxedProcess:
    """One sandbox with code in it, from its start to its end; ends with the ``with`` block at the latest.

    Args:
        code: Python.
        mode: see ``sandbox_init``.
        stdin: what a program reads.

    Raises:
        MachineError: this machine cannot hold one.
    """

    def __init__(self, code: str, mode: Mode, limits: Limits, stdin: str = "") -> None:
        uid = random.SystemRandom().randrange(FIRST_UID, FIRST_UID + NUM_UIDS) if os.getuid() == 0 else 0
        bounds = {name: int(value) for name, value in dataclasses.asdict(limits).items()}
        job = {"mode": mode, "code": code, "stdin": stdin, "limits": bounds, "uid": uid, "readable": readable_paths()}
        self.limits = limits
        for is_last in (False, True):  # a spare dies with the thread that started it
            self._shell = Shell(limits.disk_bytes) if is_last or mode == "facts" else SPARES.take(limits.disk_bytes)
            self._pid, self.facts = self._shell.begin(job)
            if self.facts:
                break
            said = self._shell.process.stderr.read(2000) if self._shell.process.stderr else b""
            self._shell.close()
        else:
            what = f"a sandbox could not be made: {said.decode('utf-8', 'replace') or 'bubblewrap ended'}"
            raise MachineError(" ".join(what.split())[-300:], where="sandbox", todo=ADVICE)
        self.control, self.process = self._shell.control, self._shell.process
        self._start, self._last_seen = time.monotonic(), 0.0
        self._seen_at_start = self._active_seconds() or 0.0

    def __enter__(self) -> SandboxedProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def overrun(self) -> Literal["", "idle", "wall"]:
        """Which bound of time the process is over; ``_POLL_SECONDS`` should pass between two calls."""
        now = time.monotonic()
        if now - self._start > self.limits.wall_seconds:
            return "wall"
        active = self._active_seconds()
        if active is None:
            return ""
        return "idle" if now - self._start - (active - self._seen_at_start) > self.limits.idle_seconds else ""

    def _active_seconds(self) -> float | None:
        """Seconds that the process ran or waited for a processor, over its threads; None where nobody counts them."""
        total, pids = 0.0, [self._pid, *_children(self._pid)]
        for pid in pids:
            with contextlib.suppress(OSError, ValueError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    ran, waited = Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[:2]
                    total += (int(ran) + int(waited)) / 1e9
        self._last_seen = max(self._last_seen, total)
        return self._last_seen if total else None

    def wait(self) -> Outcome:
        """Read what a program writes until it ends, or goes over its bounds."""
        assert self.process.stdout is not None
        output = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                if selector.select(_POLL_SECONDS):
                    chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                    output += chunk
                    if len(output) > self.limits.output_bytes:
                        return self._stopped("output", output[: self.limits.output_bytes])
                    if not chunk:
                        break
                elif over := self.overrun():
                    return self._stopped(over, output)
        while True:  # its output may be closed before it ends
            try:
                return Outcome("exit", self.process.wait(_POLL_SECONDS), bytes(output))
            except subprocess.TimeoutExpired:
                if over := self.overrun():
                    return self._stopped(over, output)

    def _stopped(self, ended: Literal["idle", "output", "wall"], output: bytearray) -> Outcome:
        self.close()
        return Outcome(ended, -1, bytes(output))

    def close(self) -> None:
        """End the process and all that is in its sandbox."""
        self._shell.close()


def run_program(code: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run ``code`` as a script in a sandbox.

    Raises:
        MachineError: this machine cannot hold one; see ``require_sandbox``.
    """
    require_sandbox()
    with SandboxedProcess(code, "program", limits or Limits(), stdin) as process:
        return process.wait()


@functools.cache
def sandbox_facts() -> dict[str, Any]:
    """What came of trying: ``ready``, ``problem`` (a sentence, empty if ready), and what each mechanism said."""
    facts: dict[str, Any] = {"bubblewrap": shutil.which("bwrap"), "problem": ""}
    if facts["bubblewrap"] is None:
        facts["problem"] = "bubblewrap is not installed"
    else:
        try:
            with SandboxedProcess("", "facts", Limits()) as process:
                facts |= process.facts
                process.process.wait(START_SECONDS)
        except MachineError as error:
            facts["problem"] = error.what
        except subprocess.TimeoutExpired:
            facts["problem"] = "a sandbox with nothing in it did not end"
        else:
            if os.getuid() == 0 and not facts["uid"]:
                facts["problem"] = "the sandbox could not change its user"
            elif not facts["seccomp"]:
                facts["problem"] = "the kernel takes no seccomp filter"
    facts["ready"] = not facts["problem"]
    return facts


def require_sandbox(where: str = "judge 'code'") -> None:
    """See that code can be run here; ``where`` is what an error says about who wants to.

    Raises:
        MachineError: it cannot; says why, and what to do.
    """
    if problem := sandbox_facts()["problem"]:
        raise MachineError(f"code cannot be run safely here: {problem}", where=where, todo=ADVICE)


def _children(pid: int) -> list[int]:
    """The child processes of ``pid``."""
    with contextlib.suppress(OSError, ValueError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []

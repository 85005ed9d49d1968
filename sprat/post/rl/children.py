"""The processes of a run of RL on this machine: started with one end of a socket pair, and again whenever they die.

A child holds nothing that its death could lose: groups go back, and what the trainer did since its last checkpoint is
done again. So a death is noted, waited on a little, and repaired; only a child that dies again and again while nothing
gets on ends the run. It also ends with its parent: by the end of the socket, and on Linux by the kernel's signal. A
terminal's Ctrl-C does not reach it, for the parent decides when it stops.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sprat.errors import MachineError
from sprat.post.rl.connection import Connection

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 10.0  # seconds before a child is started again; doubled from death to death
MAX_DEATHS = 8  # of one child in a row, nothing done in between; then the run ends
STOP_SECONDS = 10.0  # for a child to end by itself before it is killed
log = logging.getLogger("sprat.post.rl")


@dataclass(frozen=True)
class Role:
    """What a child is: its name, its command (two numbers are added: socket and parent), and its environment."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]


class Child:
    """One place for a process, filled again whenever it is empty.

    Args:
        held: a descriptor that the process keeps open as long as it lives (the folder's lock).
        serve: is given the connection to each process.
        dismiss: is told the name of each that has ended.
    """

    def __init__(
        self, role: Role, held: int, serve: Callable[[Connection], None], dismiss: Callable[[str], None]
    ) -> None:
        self.role, self._held, self._serve, self._dismiss = role, held, serve, dismiss
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None
        self.deaths, self._quick_deaths, self._starts_at = 0, 0, 0.0
        self.exit_code: int | None = None  # of the last one

    @property
    def name(self) -> str:
        """The name of the process that is there, or was: each has its own."""
        return f"{self.role.name}.{self.deaths}" if self.deaths else self.role.name

    def note_progress(self) -> None:
        """It has done something: deaths before that do not count."""
        self._quick_deaths = 0

    def keep_alive(self) -> None:
        """Start it if it is not there, once its pause is over, and end it if it does not speak any more.

        Raises:
            MachineError: it cannot be started.
        """
        if self.process is None and time.monotonic() >= self._starts_at:
            self._start()
        elif self.process is not None and self.connection is not None and self.connection.closed:
            self.process.kill()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [*self.role.command, str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno(), self._held],
                    env=self.role.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # stdout is the command's own
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                fault = f"{self.role.name} cannot be started: {error.strerror}"
                raise MachineError(fault, where=sys.executable, todo="free memory, or end other programs") from None
        self.connection = Connection(ours, self.name)
        self._serve(self.connection)

    def reap(self) -> int | None:
        """How the process ended, if it has, and forget it; None where there is none, or it lives."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        self._forget(code)
        return code

    def note_death(self) -> None:
        """It was not meant to end: start it again after a pause. Raises MachineError: it has done so too often."""
        assert self.exit_code is not None
        code, self._quick_deaths = self.exit_code, self._quick_deaths + 1
        how = f"status {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
        if self._quick_deaths >= MAX_DEATHS:
            what = (
                f"{self.role.name} ended {MAX_DEATHS} times in a row, and did nothing in between (the last time: {how})"
            )
            todo = "see what it said; lower rollout.workers or rollout.batch if memory ran out"
            raise MachineError(what, where=self.role.name, todo=todo)
        pause = min(FIRST_PAUSE * 2.0 ** (self._quick_deaths - 1), LONGEST_PAUSE)
        log.warning("%s ended (%s); it is started again", self.role.name, how)
        self._starts_at = time.monotonic() + pause

    def _forget(self, code: int) -> None:
        if self.connection is not None:
            self.connection.close()
        self._dismiss(self.name)
        self.process, self.connection, self.exit_code = None, None, code
        self.deaths += 1

    def signal(self, number: int) -> None:
        """Send it a signal, if it is there."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)

    def end(self, seconds: float | None) -> None:
        """Wait so long (None: however long) until it has ended, then kill it; nothing where it is not there."""
        if self.process is None:
            return
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._forget(code)


def worker_environment(workers: int) -> dict[str, str]:
    """The environment of one of so many workers: they share the cores, where nobody said otherwise.

    The native engine's answers do not depend on the number of threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // workers)), **os.environ}

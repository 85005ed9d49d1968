"""The processes in which a user's environment runs: one that has imported it, and a fork of that for each episode.

    python -m sprat.post.rl.environment_worker SOCKET PARENT

The first line on the socket names the environment. Each further line asks for an episode, and brings a socket for it,
or for how an episode that is over has ended. A fork shares what was imported, takes milliseconds, and can be killed
with all that it started while others go on; its bounds of time are the kernel's, which need no Python to run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sprat.tasks.environment_forms import Episode

MAX_BYTES = 1 << 22  # of a line
_GRACE_SECONDS = 5.0  # after which an episode that should have been killed ends itself
Row = dict[str, Any]


class Lines:
    """Lines of JSON on a socket, perhaps with a descriptor beside."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self._buffer, self.descriptors = connection, b"", list[int]()

    def read(self) -> Row | None:
        """The next line; None at the end. Raises: TimeoutError, OSError; ValueError: it is too long, or no JSON."""
        while b"\n" not in self._buffer:
            part, descriptors, _, _ = socket.recv_fds(self.connection, 1 << 16, 1)
            self.descriptors += descriptors
            if not part:
                return None
            self._buffer += part
            if len(self._buffer) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES:,} bytes")
        line, _, self._buffer = self._buffer.partition(b"\n")
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("no object")
        return row

    def write(self, row: Row, descriptor: int | None = None) -> None:
        """Send a line. Raises: TimeoutError, OSError."""
        content = json.dumps(row, default=str).encode() + b"\n"
        if descriptor is not None:
            sent = socket.send_fds(self.connection, [content], [descriptor])
            content = content[sent:]
        self.connection.sendall(content)


def make_episode(name: str) -> Episode:
    """An object of the environment ``name``. Raises: SpratError: there is none, or of no form."""
    from sprat.tasks.environment_forms import Episode
    from sprat.tasks.environments import load_environment

    return Episode(load_environment(name), f"environment {name}")


def seed_all(seed: int) -> None:
    """Seed the generators that code uses which asks for none."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


def reply_to(request: Row, make: Callable[[], Episode], episodes: list[Episode]) -> Row:
    """Begin an episode, take a turn of it, or ask what it was worth; a fault is ``{"fault": text}``.

    Args:
        episodes: the one that goes on.
    """
    from sprat.errors import SpratError
    from sprat.tasks import Problem
    from sprat.tasks.environment import Action, Call

    try:
        if request["do"] == "reset":
            for old in episodes:
                old.close()
            problem = request["problem"] and Problem(**request["problem"])
            seed_all(request["seed"])
            episodes[:] = [make()]
            return episodes[0].reset(problem, request["seed"])
        if request["do"] == "reward":
            return {"reward": episodes[0].reward()}
        calls = [Call(**call) for call in request["tool_calls"]]
        return episodes[0].step(Action(request["content"], calls, request["reasoning"]))
    except SpratError as error:
        return {"fault": f"failed: {error.what}"}
    except (Exception, SystemExit) as error:
        return {"fault": f"raised {type(error).__name__}: {error}"[:500]}


def run_episode(lines: Lines, make: Callable[[], Episode], wall_seconds: float, cpu_seconds: float) -> None:
    """Answer requests until there is none; each within its time, else the kernel ends this process."""
    episodes = list[Any]()
    while (request := lines.read()) is not None:
        for number in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, wall_seconds + _GRACE_SECONDS)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        reply = reply_to(request, make, episodes)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        lines.write(reply)


def fork(descriptor: int, lines: Lines, run: Callable[[Lines], None]) -> int:
    """The process of a new episode, that talks on ``descriptor``; returns its id, -1 where there can be none."""
    from sprat.machine import end_with_parent

    sys.stderr.flush()
    os.set_inheritable(descriptor, False)
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError:  # no memory, or too many processes
        pid = -1
    if pid:
        os.close(descriptor)
        return pid
    code = 1
    try:
        os.setsid()
        end_with_parent(parent)
        lines.connection.close()
        run(Lines(socket.socket(fileno=descriptor)))
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """How an episode ended: its exit code, or the signal, below 0."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:  # of the process before this one
        return -signal.SIGKILL


def main() -> None:
    """See the module's text."""
    from sprat.errors import SpratError, pack_error

    lines = Lines(socket.socket(fileno=int(sys.argv[1])))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)  # what the user's code prints
    spec = lines.read()
    if spec is None:
        return
    try:
        first = make_episode(spec["name"])
        lines.write({"pays": first.pays, "takes_problem": first.takes_problem, "has_tools": bool(first.schemas)})
        first.close()
    except SpratError as error:
        lines.write({"error": pack_error(error)})
        return

    def make() -> Episode:
        return make_episode(spec["name"])

    def run(own: Lines) -> None:
        run_episode(own, make, spec["wall_seconds"], spec["cpu_seconds"])

    while (request := lines.read()) is not None:
        if request["do"] == "fork":
            lines.write({"pid": fork(lines.descriptors.pop(), lines, run)})
        else:
            lines.write({"status": wait(request["pid"])})


if __name__ == "__main__":
    main()

"""Bubblewrap's side of a sandbox: what is mounted, and shells that wait for a job so that nobody waits for them."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

from sprat.errors import MachineError

FOLDER = "/sandbox"
START_SECONDS = 60.0
_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/bin")
ADVICE = (
    "apt-get install bubblewrap, and run where Linux lets it make namespaces (as root, or with unprivileged user "
    "namespaces; in Docker: --security-opt seccomp=unconfined --cap-add SYS_ADMIN)"
)


class Shell:
    """A sandbox that waits for its job: bubblewrap, with ``sandbox_init`` in it."""

    def __init__(self, disk_bytes: int) -> None:
        self.control, theirs = socket.socketpair()
        self.control.settimeout(START_SECONDS)
        facts_in, facts_out = os.pipe()
        try:
            self.process = subprocess.Popen(
                [*_command(disk_bytes, facts_out), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(), facts_out),
                env={},
                start_new_session=True,
            )
        except OSError as error:
            self.control.close()
            os.close(facts_in)
            raise MachineError(f"bubblewrap cannot be started: {error}", where="sandbox", todo=ADVICE) from None
        finally:
            theirs.close()
            os.close(facts_out)
        self._facts_in = facts_in

    def begin(self, job: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Hand the job over; the process that does it, and what came of giving up its rights (nothing if it died)."""
        facts_in, self._facts_in = self._facts_in, -1
        try:
            self.control.sendall(json.dumps(job).encode() + b"\n")
            with os.fdopen(facts_in, "rb") as stream:
                pid = int(json.loads(stream.read() or b"{}").get("child-pid", 0))
            return pid, json.loads(_read_line(self.control) or b"{}")
        except (OSError, ValueError):
            return 0, {}

    def close(self) -> None:
        """End the process and all that is in its sandbox."""
        self.process.kill()  # bubblewrap dies, and the namespace with it
        self.process.wait()
        self.control.close()
        if self._facts_in >= 0:
            os.close(self._facts_in)
            self._facts_in = -1
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


class Spares:
    """Sandboxes that were started before they are needed: each is used once, and another started in its place."""

    def __init__(self, count: int) -> None:
        self._count, self._owner_pid = count, 0
        self._shells: dict[int, deque[Shell]] = {}

    def take(self, disk_bytes: int) -> Shell:
        """One that nobody has used."""
        if self._owner_pid != os.getpid():  # those of another process die with it
            self._owner_pid, self._shells = os.getpid(), {}
        shells = self._shells.setdefault(disk_bytes, deque())
        shell = None
        with contextlib.suppress(IndexError):
            shell = shells.popleft()
        while len(shells) < self._count:
            shells.append(Shell(disk_bytes))
        return shell or Shell(disk_bytes)

    def close(self) -> None:
        """End those of this process."""
        if self._owner_pid == os.getpid():
            for shells in self._shells.values():
                while shells:
                    shells.pop().close()


SPARES = Spares(len(os.sched_getaffinity(0)))
atexit.register(SPARES.close)


def _command(disk_bytes: int, facts_out: int) -> list[str]:
    """Bubblewrap's command line, but for the socket at its end."""
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
        "--unshare-cgroup-try",
    ]
    if os.getuid() == 0:
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user"]
    for folder in _SYSTEM_FOLDERS:
        path = Path(folder)
        if path.is_symlink():
            command += ["--symlink", os.readlink(path), folder]
        elif path.is_dir():
            command += ["--ro-bind", folder, folder]
    for folder in (*(str(parent) for parent in reversed(Path(sys.base_prefix).parents)), FOLDER, "/dev"):
        if folder != "/" and not _is_below(folder, _SYSTEM_FOLDERS):  # another user is to pass through
            command += ["--perms", "0755", "--dir", folder]
    if not _is_below(sys.base_prefix, _SYSTEM_FOLDERS):
        command += ["--ro-bind", sys.base_prefix, sys.base_prefix]
    for name in ("sandbox_init.py", "sandbox_calls.py"):
        command += ["--ro-bind", str(Path(__file__).with_name(name)), f"{FOLDER}/{name}"]
    command += ["--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"]
    command += ["--perms", "0777", "--size", str(disk_bytes), "--tmpfs", "/box", "--remount-ro", "/"]
    command += ["--die-with-parent", "--new-session", "--clearenv", "--setenv", "PYTHONHASHSEED", "0"]
    command += ["--info-fd", str(facts_out), "--chdir", "/box", "--"]
    return [*command, _python(), "-I", "-S", f"{FOLDER}/sandbox_init.py"]


def _python() -> str:
    """The interpreter itself, not the link to it in a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def readable_paths() -> list[str]:
    """What code in a sandbox may read."""
    return [
        path for path in ("/usr", sys.base_prefix, FOLDER, "/dev/urandom") if os.path.exists(path) or path == FOLDER
    ]


def _is_below(path: str, folders: tuple[str, ...]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _read_line(connection: socket.socket, limit: int = 1 << 16) -> bytes:
    """A line of at most ``limit`` bytes, byte by byte, so that nothing behind it is taken away."""
    line = bytearray()
    while len(line) < limit and not line.endswith(b"\n"):
        chunk = connection.recv(1)
        if not chunk:
            break
        line += chunk
    return bytes(line)

"""A child that dies is started again, one that does not speak any more is ended, one that only dies ends the run."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sprat.errors import MachineError
from sprat.post.rl import children
from sprat.post.rl.children import Child, Role, worker_environment
from sprat.post.rl.connection import Connection

SLEEP = "import time; time.sleep(600)"
ECHO = """
import socket, struct, sys
from sprat.post.rl.connection import Connection
wire = Connection(socket.socket(fileno=int(sys.argv[1])), "parent")
while (message := wire.receive()) is not None:
    if message.kind != "alive":
        wire.send({"kind": message.kind * 2, "parent": int(sys.argv[2])})
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], tuple[Child, list[Connection], list[str]]]]:
    """Makes a child of a program; with the connections to it and the names of those that ended."""
    made: list[Child] = []
    held = os.open(tmp_path, os.O_RDONLY)

    def child(code: str) -> tuple[Child, list[Connection], list[str]]:
        connections, gone = list[Connection](), list[str]()
        role = Role("worker-0", [sys.executable, "-c", code], dict(os.environ))
        made.append(Child(role, held, connections.append, gone.append))
        return made[-1], connections, gone

    yield child
    for each in made:
        each.end(0)
    os.close(held)


def ended(child: Child) -> int:
    deadline = time.monotonic() + 60
    while (code := child.reap()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return code


def test_it_is_started_with_a_socket_and_told_whose_it_is(start: Callable) -> None:  # type: ignore[type-arg]
    child, connections, gone = start(ECHO)
    child.keep_alive()
    connections[0].send({"kind": "ab"})
    reply = connections[0].receive()
    assert reply is not None and reply.kind == "abab" and reply.integer("parent") == os.getpid()
    child.keep_alive()
    assert len(connections) == 1 and connections[0].peer == "worker-0"
    child.end(0)
    assert gone == ["worker-0"] and connections[0].closed


def test_it_is_started_again_after_a_pause_under_another_name(start: Callable) -> None:  # type: ignore[type-arg]
    child, connections, gone = start(SLEEP)
    child.keep_alive()
    child.signal(signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL and gone == ["worker-0"]
    child.note_death()
    child.keep_alive()
    assert child.process is None  # the pause
    time.sleep(2 * children.FIRST_PAUSE)
    child.keep_alive()
    assert child.process is not None and connections[1].peer == "worker-0.1"


def test_one_that_only_dies_ends_the_run(start: Callable, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[type-arg]
    monkeypatch.setattr(children, "LONGEST_PAUSE", 0.0)
    child, _, _ = start("raise SystemExit(3)")
    for turn in range(children.MAX_DEATHS + 2):
        child.keep_alive()
        assert ended(child) == 3
        if turn == 2:
            child.note_progress()  # what came before is forgiven
        if turn < children.MAX_DEATHS + 2:
            try:
                child.note_death()
            except MachineError as error:
                assert turn == children.MAX_DEATHS + 1 and "worker-0 ended 8 times" in str(error)
                assert "status 3" in str(error)
                return
    raise AssertionError("it was started for ever")


def test_one_that_does_not_speak_any_more_is_ended(start: Callable) -> None:  # type: ignore[type-arg]
    child, connections, _ = start(SLEEP)
    child.keep_alive()
    child.signal(signal.SIGSTOP)
    connections[0].close()  # as is done when it was silent for long
    child.keep_alive()
    assert ended(child) == -signal.SIGKILL


def test_who_takes_nothing_delays_nobody() -> None:
    """A sign of life to a peer that is stopped in the middle of a long message is left out, and not waited for."""
    import socket

    ours, _theirs = socket.socketpair()
    stuck = Connection(ours, "stopped")
    threading.Thread(
        target=lambda: pytest.raises(OSError, stuck.send, {"kind": "x", "long": "y" * (1 << 22)}), daemon=True
    ).start()
    time.sleep(0.1)
    began = time.monotonic()
    for _ in range(10):
        stuck.send_alive()
    assert time.monotonic() - began < 1.0
    stuck.close()


def test_workers_share_the_cores_unless_somebody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [worker_environment(count)["OMP_NUM_THREADS"] for count in (1, 3, 100)] == ["8", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert worker_environment(3)["OMP_NUM_THREADS"] == "5"

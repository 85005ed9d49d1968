"""Stages side by side: a small graph, which knows what waits for what; how a stage runs, its ``Executor`` knows.

A stage finds its finished run and returns at once, so the graph may be started again after any interruption: that is
all of resume. To stop (Ctrl-C, SIGTERM, a stage that failed) is to raise: who holds the executor ends what still runs.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from sprat.errors import MachineError

OnProgress = Callable[[str, str, float], None]
POLL_SECONDS = 1.0  # seconds between two words on what runs


@dataclass(frozen=True)
class Stage:
    """One piece of work: ``function(*arguments)`` once all of ``depends_on`` are done.

    ``function`` must be importable by name and ``arguments`` picklable between our own processes.
    """

    name: str
    function: Callable[..., object]
    arguments: tuple[Any, ...] = ()
    depends_on: tuple[str, ...] = field(default=())


class Executor(Protocol):
    """Where stages run. It belongs to who made it: the graph neither opens nor ends it."""

    def submit(self, stage: Stage) -> Future[object]:
        """Start ``stage`` at once. The future is done when the stage is, with what it returned or raised.

        ``BrokenExecutor`` in its place means that what ran the stage died.
        """
        ...

    def messages(self) -> Iterator[tuple[str, str]]:
        """(stage, message) of all that stages had to say since this was asked last.

        What a stage says before it is done is there once its future is done.
        """
        ...


def run_stages(stages: Sequence[Stage], executor: Executor, jobs: int, on_progress: OnProgress) -> None:
    """Run every stage, at most ``jobs`` at a time, those named first first.

    Args:
        stages: in an order of preference; ``depends_on`` name earlier or later ones.
        executor: runs at least ``jobs`` stages at once.
        on_progress: called as ``on_progress(stage, message, seconds)``: it "starts", "runs" (each second), is "done",
            or what else it has to say (``Executor.messages``).

    Raises:
        SpratError: the first that a stage raised.
        MachineError: what ran a stage died (out of memory, killed).
        ValueError: ``jobs`` is below 1, two stages have one name, or some wait for one that is not there or each other.
    """
    names = [stage.name for stage in stages]
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}, at least 1 is needed")
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two stages have one name: {duplicates}")
    if missing := sorted({name for stage in stages for name in stage.depends_on}.difference(names)):
        raise ValueError(f"stages wait for some that are not there: {missing}")
    pending, done = list(stages), set[str]()
    running: dict[Future[object], tuple[Stage, float]] = {}
    try:
        with _sigterm_as_interrupt():
            while pending or running:
                for stage in [s for s in pending if done.issuperset(s.depends_on)][: jobs - len(running)]:
                    pending.remove(stage)
                    running[executor.submit(stage)] = (stage, time.monotonic())
                    on_progress(stage.name, "starts", 0.0)
                if not running:
                    raise ValueError(f"stages wait for each other: {[s.name for s in pending]}")
                finished = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done
                for name, message in executor.messages():
                    on_progress(name, message, 0.0)
                for future in finished:
                    stage, started = running[future]
                    future.result()
                    del running[future]
                    done.add(stage.name)
                    on_progress(stage.name, "done", time.monotonic() - started)
                for stage, started in running.values():
                    on_progress(stage.name, "runs", time.monotonic() - started)
    except BrokenExecutor:
        where = ", ".join(stage.name for stage, _ in running.values())
        raise MachineError("a stage's process died", where=where, todo="start again: it goes on where it was") from None
    finally:
        for stage in [stage for future, (stage, _) in running.items() if not future.done()]:
            on_progress(stage.name, "stops at the end of its step", 0.0)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM is Ctrl-C while this lasts; outside of the main thread, where Python has no signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)

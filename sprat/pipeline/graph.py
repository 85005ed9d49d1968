"""Stages side by side: a small graph, one process and one thread for each running stage.

A tiny model does not keep two cores busy, but two stages do. Each stage runs in a process of its own
with one thread, so its result does not depend on how many run beside it. A stage finds its finished
run and returns at once, so the graph may be started again after any interruption: that is all of resume.

To stop (Ctrl-C, SIGTERM, a stage that failed) is to send SIGTERM to every worker and to wait, but not for ever: a loop
that trains holds the signal until its step is done and its checkpoint written; all else ends at once.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from types import FrameType
from typing import Any

from sprat.errors import MachineError

POLL_SECONDS = 1.0  # seconds between two words on what runs
GRACE_SECONDS = 60.0  # seconds that a stage has to end its step and write its checkpoint

_messages: Any = None  # in a worker: the queue to the parent's listener


@dataclass(frozen=True)
class Stage:
    """One piece of work: ``function(*arguments)`` once all of ``depends_on`` are done.

    ``function`` must be importable by name and ``arguments`` picklable between our own processes.
    """

    name: str
    function: Callable[..., object]
    arguments: tuple[Any, ...] = ()
    depends_on: tuple[str, ...] = field(default=())


def run_stages(stages: Sequence[Stage], jobs: int, on_progress: Callable[[str, str, float], None]) -> None:
    """Run every stage, at most ``jobs`` at a time, those named first first.

    Args:
        stages: in an order of preference; ``depends_on`` name earlier or later ones.
        jobs: processes.
        on_progress: called as ``on_progress(stage, message, seconds)``: it "starts", "runs" (each second), is "done",
            or what else it has to say (``notify``).

    Raises:
        SpratError: the first that a stage raised; the others are stopped.
        MachineError: a stage's process died (out of memory, killed).
    """
    context = multiprocessing.get_context("spawn")
    pending, done = list(stages), set[str]()
    messages: Any = context.SimpleQueue()
    running: dict[Future[object], tuple[Stage, float]] = {}
    pool = ProcessPoolExecutor(
        max_workers=max(1, min(jobs, len(stages))),
        mp_context=context,
        initializer=_initialize_worker,
        initargs=(os.getpid(), messages),
    )

    def listen() -> None:
        while not messages.empty():
            name, message = messages.get()
            on_progress(name, message, 0.0)

    try:
        with _sigterm_as_interrupt():
            while pending or running:
                for stage in [s for s in pending if done.issuperset(s.depends_on)][: jobs - len(running)]:
                    pending.remove(stage)
                    with _interrupts_blocked():
                        running[pool.submit(_run_stage, stage)] = (stage, time.monotonic())
                    on_progress(stage.name, "starts", 0.0)
                if not running:
                    raise ValueError(f"stages wait for each other: {[s.name for s in pending]}")
                for future in wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                    stage, started = running[future]
                    listen()
                    future.result()
                    del running[future]
                    done.add(stage.name)
                    on_progress(stage.name, "done", time.monotonic() - started)
                listen()
                for stage, started in running.values():
                    on_progress(stage.name, "runs", time.monotonic() - started)
    except BrokenProcessPool:
        names = ", ".join(stage.name for stage, _ in running.values())
        raise MachineError("a stage's process died", where=names, todo="start again: it goes on where it was") from None
    finally:
        for stage in [stage for future, (stage, _) in running.items() if not future.done()]:
            on_progress(stage.name, "stops at the end of its step", 0.0)
        _shut_down(pool)


def notify(stage: str, message: str) -> None:
    """Say ``message`` of ``stage`` to who listens to ``run_stages``, or on stderr where no graph runs."""
    if _messages is None:
        print(f"sprat: {stage} {message}", file=sys.stderr, flush=True)
    else:
        _messages.put((stage, message))


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A worker that is started meanwhile inherits the mask: Ctrl-C does not end it before it knows to ignore it."""
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM is Ctrl-C while this lasts; outside of the main thread, where Python has no signals, nothing changes."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _shut_down(pool: ProcessPoolExecutor) -> None:
    """End the workers: those that train after their step, all others at once, and after ``GRACE_SECONDS`` every one."""
    processes = list((pool._processes or {}).values())
    for process in processes:
        process.terminate()
    try:
        remaining, deadline = [process.sentinel for process in processes], time.monotonic() + GRACE_SECONDS
        while remaining and time.monotonic() < deadline:
            ended = connection.wait(remaining, timeout=deadline - time.monotonic())
            remaining = [sentinel for sentinel in remaining if sentinel not in ended]
    finally:  # also at a second Ctrl-C
        for process in processes:
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _run_stage(stage: Stage) -> None:
    """A stage in its worker; one that was interrupted ends the worker, so that nobody waits for it."""
    try:
        stage.function(*stage.arguments)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGTERM)


def _initialize_worker(parent: int, messages: Any) -> None:
    """One thread; Ctrl-C is the parent's business; die at once when the parent is gone."""
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TTY_COMPATIBLE"] = "0"  # bars of several workers on one terminal would overwrite each other
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)

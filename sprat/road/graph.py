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

TICK = 1.0  # seconds between two words on what runs
GRACE = 60.0  # seconds that a stage has to end its step and write its checkpoint

_words: Any = None  # in a worker: the queue to the parent's listener


@dataclass(frozen=True)
class Stage:
    """One piece of work: ``function(*arguments)`` once all of ``needs`` are done.

    ``function`` must be importable by name and ``arguments`` picklable between our own processes.
    """

    name: str
    function: Callable[..., object]
    arguments: tuple[Any, ...] = ()
    needs: tuple[str, ...] = field(default=())


def run_all(stages: Sequence[Stage], jobs: int, told: Callable[[str, str, float], None]) -> None:
    """Run every stage, at most ``jobs`` at a time, those named first first.

    Args:
        stages: in an order of preference; ``needs`` name earlier or later ones.
        jobs: processes.
        told: called as ``told(stage, what, seconds)``: it "starts", it "runs" (each second), it is "done", or what
            else it has to say (``tell``).

    Raises:
        SpratError: the first that a stage raised; the others are stopped.
        MachineError: a stage's process died (out of memory, killed).
    """
    context = multiprocessing.get_context("spawn")
    waiting, done = list(stages), set[str]()
    words: Any = context.SimpleQueue()
    running: dict[Future[object], tuple[Stage, float]] = {}
    pool = ProcessPoolExecutor(
        max_workers=max(1, min(jobs, len(stages))),
        mp_context=context,
        initializer=_become_worker,
        initargs=(os.getpid(), words),
    )

    def listen() -> None:
        while not words.empty():
            name, what = words.get()
            told(name, what, 0.0)

    try:
        with _ended_by_sigterm():
            while waiting or running:
                for stage in [s for s in waiting if done.issuperset(s.needs)][: jobs - len(running)]:
                    waiting.remove(stage)
                    with _interrupts_blocked():
                        running[pool.submit(_work, stage)] = (stage, time.monotonic())
                    told(stage.name, "starts", 0.0)
                if not running:
                    raise ValueError(f"stages wait for each other: {[s.name for s in waiting]}")
                for future in wait(running, timeout=TICK, return_when=FIRST_COMPLETED).done:
                    stage, began = running[future]
                    listen()
                    future.result()
                    del running[future]
                    done.add(stage.name)
                    told(stage.name, "done", time.monotonic() - began)
                listen()
                for stage, began in running.values():
                    told(stage.name, "runs", time.monotonic() - began)
    except BrokenProcessPool:
        names = ", ".join(stage.name for stage, _ in running.values())
        raise MachineError("a stage's process died", where=names, todo="start again: it goes on where it was") from None
    finally:
        for stage in [stage for future, (stage, _) in running.items() if not future.done()]:
            told(stage.name, "stops at the end of its step", 0.0)
        _stop(pool)


def tell(stage: str, what: str) -> None:
    """Say ``what`` of ``stage`` to who listens to ``run_all``, or on stderr where no graph runs."""
    if _words is None:
        print(f"sprat: {stage} {what}", file=sys.stderr, flush=True)
    else:
        _words.put((stage, what))


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A worker that is started meanwhile inherits the mask: Ctrl-C does not end it before it knows to ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM is Ctrl-C while this lasts; outside of the main thread, where Python has no signals, nothing changes."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the workers: those that train after their step, all others at once, and after ``GRACE`` every one."""
    processes = list((pool._processes or {}).values())
    for process in processes:
        process.terminate()
    try:
        left, deadline = [process.sentinel for process in processes], time.monotonic() + GRACE
        while left and time.monotonic() < deadline:
            ended = connection.wait(left, timeout=deadline - time.monotonic())
            left = [sentinel for sentinel in left if sentinel not in ended]
    finally:  # also at a second Ctrl-C
        for process in processes:
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _work(stage: Stage) -> None:
    """A stage in its worker; one that was interrupted ends the worker, so that nobody waits for it."""
    try:
        stage.function(*stage.arguments)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGTERM)


def _become_worker(parent: int, words: Any) -> None:
    """One thread; Ctrl-C is the parent's business; die at once when the parent is gone."""
    global _words
    _words = words
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TTY_COMPATIBLE"] = "0"  # bars of several workers on one terminal would overwrite each other
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)

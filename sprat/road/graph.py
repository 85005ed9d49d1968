"""Stages side by side: a small graph, one process and one thread for each running stage.

A tiny model does not keep two cores busy, but two stages do. Each stage runs in a process of its own
with one thread, so its result does not depend on how many run beside it. A stage finds its finished
run and returns at once, so the graph may be started again after any interruption: that is all of resume.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from sprat.errors import MachineError

TICK = 1.0  # seconds between two words on what runs


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
        told: called as ``told(stage, what, seconds)``: it "starts", it "runs" (each second), it is "done".

    Raises:
        SpratError: the first that a stage raised; the others are stopped.
        MachineError: a stage's process died (out of memory, killed).
    """
    context = multiprocessing.get_context("spawn")
    waiting, done = list(stages), set[str]()
    running: dict[Future[object], tuple[Stage, float]] = {}
    pool = ProcessPoolExecutor(
        max_workers=jobs, mp_context=context, initializer=_become_worker, initargs=(os.getpid(),)
    )
    try:
        while waiting or running:
            for stage in [s for s in waiting if done.issuperset(s.needs)][: jobs - len(running)]:
                waiting.remove(stage)
                running[pool.submit(stage.function, *stage.arguments)] = (stage, time.monotonic())
                told(stage.name, "starts", 0.0)
            if not running:
                raise ValueError(f"stages wait for each other: {[s.name for s in waiting]}")
            for future in wait(running, timeout=TICK, return_when=FIRST_COMPLETED).done:
                stage, began = running[future]
                future.result()
                del running[future]
                done.add(stage.name)
                told(stage.name, "done", time.monotonic() - began)
            for stage, began in running.values():
                told(stage.name, "runs", time.monotonic() - began)
    except BrokenProcessPool:
        names = ", ".join(stage.name for stage, _ in running.values())
        raise MachineError("a stage's process died", where=names, todo="start again: it goes on where it was") from None
    finally:
        _stop(pool)


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the workers at once; what they had reached is on disk."""
    for process in list((pool._processes or {}).values()):
        process.terminate()
    pool.shutdown(wait=True, cancel_futures=True)


def _become_worker(parent: int) -> None:
    """One thread; Ctrl-C is the parent's business; die when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TTY_COMPATIBLE"] = "0"  # bars of several workers on one terminal would overwrite each other
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)

"""Where the stages of a graph run: processes of this machine, one and one thread for each running stage.

A tiny model does not keep two cores busy, but two stages do. Each stage runs in a process of its own
with one thread, so its result does not depend on how many run beside it; stages that come one after another may have
more.

To stop is to send SIGTERM to every worker and to wait, but not for ever: a loop that trains holds the signal until its
step is done and its checkpoint written; all else ends at once.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any, Self

from sprat.pipeline.graph import Stage

GRACE_SECONDS = 60.0  # seconds that a stage has to end its step and write its checkpoint

_messages: Any = None  # in a worker: the queue to the parent's listener


class LocalExecutor:
    """Runs stages in at most ``max_workers`` processes of ``threads`` threads; they end with the ``with`` block.

    See ``graph.Executor``.
    """

    def __init__(self, max_workers: int, threads: int = 1):
        context = multiprocessing.get_context("spawn")
        self._messages: Any = context.SimpleQueue()
        arguments = (os.getpid(), self._messages, threads)
        self._pool = ProcessPoolExecutor(max_workers, context, _initialize_worker, arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers: those that train after their step, others at once, and after ``GRACE_SECONDS`` every one."""
        processes = list((self._pool._processes or {}).values())
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
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, stage: Stage) -> Future[object]:
        """Start ``stage`` in a process."""
        with _interrupts_blocked():
            return self._pool.submit(_run_stage, stage)

    def messages(self) -> Iterator[tuple[str, str]]:
        """What stages said by ``notify``."""
        while not self._messages.empty():
            yield self._messages.get()


def notify(stage: str, message: str) -> None:
    """Say ``message`` of ``stage`` to who listens to the graph, or on stderr where no graph runs."""
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


def _run_stage(stage: Stage) -> None:
    """A stage in its worker; one that was interrupted ends the worker, so that nobody waits for it."""
    try:
        stage.function(*stage.arguments)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGTERM)


def _initialize_worker(parent: int, messages: Any, threads: int) -> None:
    """So many threads; Ctrl-C is the parent's business; die at once when the parent is gone."""
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["TTY_COMPATIBLE"] = "0"  # bars of several workers on one terminal would overwrite each other
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(threads)


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)

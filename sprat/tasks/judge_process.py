"""The other processes that run foreign judges within bounds (``judge_worker``): started when asked, and kept warm."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sprat.errors import DataError, MachineError
from sprat.files.json import exchange_json

log = logging.getLogger(__name__)
WAIT_SECONDS = 600.0  # for one reply; the worker's own bound is CPU time, which a busy machine does not shorten


class JudgeProcess:
    """One worker; any thread may ask, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner_pid = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The worker's reply; ``over`` in it says that it went over its bounds, so that nothing is known."""
        with self._lock:
            try:
                return self._request(request)
            except (OSError, ValueError, TimeoutError):
                self._kill()
                return {"fault": "it took too long", "over": True}

    def close(self) -> None:
        """End the worker; the next question starts another."""
        with self._lock:
            self._kill()

    def _request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Ask the worker and wait for its reply.

        Raises:
            TimeoutError: there is none in time. OSError, ValueError: the process is dead.
        """
        if self._owner_pid != os.getpid():
            self._process = None  # it belongs to the process that this one was forked from
        if self._process is not None and self._process.poll() is not None:
            self._kill()
        process = self._process = self._process or self._start()
        return exchange_json(process, request, WAIT_SECONDS)

    def _start(self) -> subprocess.Popen[str]:
        """A new worker, without the caller's environment."""
        self._owner_pid = os.getpid()
        return subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("judge_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={"PATH": os.defpath},
            start_new_session=True,  # an interrupt at the terminal is not meant for it
        )

    def _kill(self) -> None:
        """End the worker, if there is one of this process."""
        process, self._process = self._process, None
        if process is None or self._owner_pid != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what was still to be written to a dead process
                if pipe is not None:
                    pipe.close()


class JudgePool:
    """Workers that any number of threads may ask at once; as many are started as were ever busy at one time.

    Args:
        size: at most so many; the processors that this process may use if not given.
    """

    def __init__(self, size: int | None = None) -> None:
        self._size = size or len(os.sched_getaffinity(0))
        self._reset()

    def _reset(self) -> None:
        self._owner_pid = os.getpid()
        self._workers = [JudgeProcess() for _ in range(self._size)]
        self._idle: queue.LifoQueue[JudgeProcess] = queue.LifoQueue()  # the one that is warm comes first
        for worker in reversed(self._workers):
            self._idle.put(worker)

    def verdict(
        self, kind: str, source: str, answer: str | None, *, ignore_case: bool = False, where: str = ""
    ) -> bool | None:
        """Whether ``answer`` is right by ``source``; None where that is not known. An ``answer`` of None asks whether
        ``source`` itself can be used.

        An answer on which the worker goes over its bounds of CPU time and memory is neither right nor wrong.

        Args:
            kind: ``regex``, ``json_schema`` or ``math``; ``math_verify`` is that package's own opinion.
            source: the pattern, the schema as JSON, the formula as LaTeX.
            where: file and line of the source.

        Raises:
            DataError: the source cannot be used.
            MachineError: the package that ``kind`` needs is not installed.
        """
        request = {"kind": kind, "source": source, "answer": answer, "ignore_case": ignore_case}
        with self._worker() as worker:
            reply = worker.ask(request)
        if "missing" in reply:
            package = str(reply["missing"])
            what = f"the judge {kind!r} needs {package.replace('_', '-')}"
            raise MachineError(what, where=where, todo="pip install 'sprat[judges]'")
        if answer is None and "fault" in reply:
            reply = {"error": f"it cannot be used: {reply['fault']}"}
        if "error" in reply:
            raise DataError(str(reply["error"]), where=where, todo=f"mend the answer of this row (judge {kind!r})")
        if "fault" in reply:
            log.warning("an answer of %d characters was not judged: %s (%s)", len(answer or ""), reply["fault"], where)
        return None if reply.get("over") else bool(reply["right"])

    def ask(self, kind: str, source: str, answer: str | None, *, ignore_case: bool = False, where: str = "") -> bool:
        """As ``verdict``, where what is not known to be right is not right."""
        return bool(self.verdict(kind, source, answer, ignore_case=ignore_case, where=where))

    def close(self) -> None:
        """End all workers; the next question starts another."""
        if self._owner_pid == os.getpid():
            for worker in self._workers:
                worker.close()

    @contextlib.contextmanager
    def _worker(self) -> Iterator[JudgeProcess]:
        """A worker that nobody else asks meanwhile."""
        if self._owner_pid != os.getpid():
            self._reset()  # a forked process has none of its own
        idle = self._idle
        worker = idle.get()
        try:
            yield worker
        finally:
            idle.put(worker)


JUDGE_PROCESS = JudgePool()
atexit.register(JUDGE_PROCESS.close)

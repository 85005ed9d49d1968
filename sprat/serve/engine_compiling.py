"""Threads of an engine's process for what may take seconds: grammars that nobody has compiled yet."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sprat.engine.sampling.grammar import MAX_COMPILING
from sprat.engine.sequence import Tenant


class CompilingThreads:
    """Threads for what may take seconds: at most one for each tenant, in the order of their jobs."""

    def __init__(self) -> None:
        count = min(MAX_COMPILING, max(2, (os.cpu_count() or 1) // 2))  # each keeps a core busy that steps need too
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="sprat-grammar")
        self._lock, self._stopped = threading.Lock(), False
        self._tasks: dict[str, deque[Callable[[], None]]] = {}  # of tenants that have a thread, or are next to get one

    def submit(self, tenant: Tenant, task: Callable[[], None]) -> None:
        """Run ``task`` when those of the same tenant have run; never, once stopped."""
        with self._lock:
            if self._stopped:
                return
            tasks = self._tasks.setdefault(tenant.name, deque())
            tasks.append(task)
            if len(tasks) == 1:
                self._threads.submit(self._run_next, tenant.name)

    def stop(self) -> None:
        """Wait for those that run, and drop the others."""
        with self._lock:
            self._stopped = True
        self._threads.shutdown(cancel_futures=True)

    def _run_next(self, name: str) -> None:
        """Run one task of a tenant, and go to the end of the line for its next one."""
        try:
            self._tasks[name][0]()
        finally:
            with self._lock:
                self._tasks[name].popleft()
                if not self._tasks[name]:
                    del self._tasks[name]
                elif not self._stopped:
                    self._threads.submit(self._run_next, name)

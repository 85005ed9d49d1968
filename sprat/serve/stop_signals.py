"""SIGTERM and Ctrl-C before the server is up: they end it too, with the exit code of a server that was stopped.

While packages are imported a KeyboardInterrupt may come up in a callback of the interpreter, which prints or drops it
and goes on; so it is remembered as well, and looked at before anything is served.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Within the block either signal raises KeyboardInterrupt, which the block ends with; the event tells of it.

    Outside of the main thread nothing changes. Servers take the signals over while they run.
    """
    stopped = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        stopped.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    except KeyboardInterrupt:
        stopped.set()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""What a server says of itself on stderr: a line with time, level and place for each event; requests: ``access_log``.

2026-01-01T00:00:00.000Z WARNING sprat.serve.engine: models/mine: the engine's process ended (signal 9, Killed); …
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

log = logging.getLogger("sprat.serve")


@contextmanager
def log_to(stream: TextIO) -> Iterator[None]:
    """Have what this process logs, and what it warns of, written to ``stream`` for as long as the block lasts."""
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    root, level, show = logging.getLogger(), log.level, warnings.showwarning
    root.addHandler(handler)
    log.setLevel(logging.INFO)
    warnings.showwarning = _log_warning
    try:
        yield
    finally:
        root.removeHandler(handler)
        log.setLevel(level)
        warnings.showwarning = show


def _log_warning(message: Warning | str, *where: object, **more: object) -> None:
    """A warning without the line of our code that gave it: it is meant for whoever runs the server."""
    log.warning("%s", message)

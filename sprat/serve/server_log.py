"""What a server says of itself on stderr: a line with time, level and place for each event; requests: ``access_log``.

2026-01-01T00:00:00.000Z WARNING sprat.serve.engine: models/mine: the engine's process ended (signal 9, Killed); …
"""

from __future__ import annotations

import logging
import time
import warnings
from typing import TextIO

log = logging.getLogger("sprat.serve")


def write_log_to(stream: TextIO) -> logging.Handler:
    """Have what this process logs, and what it warns of, written to ``stream``; returns the handler."""
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logging.getLogger().addHandler(handler)
    log.setLevel(logging.INFO)
    warnings.showwarning = _log_warning
    return handler


def _log_warning(message: Warning | str, *where: object, **more: object) -> None:
    """A warning without the line of our code that gave it: it is meant for whoever runs the server."""
    log.warning("%s", message)

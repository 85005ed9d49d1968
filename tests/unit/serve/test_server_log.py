"""What the server says of itself: a line with time, level and place, and no line of our source."""

from __future__ import annotations

import io
import logging
import re
import warnings

from sprat.serve.server_log import log_to


def test_events_and_warnings_are_lines_with_time_level_and_place() -> None:
    stream, handlers, show = io.StringIO(), list(logging.getLogger().handlers), warnings.showwarning
    with log_to(stream):
        logging.getLogger("sprat.serve.engine").warning("%s: the engine is up again", "models/mine")
        warnings.showwarning(UserWarning("others can read these API keys"), UserWarning, "api_keys.py", 60)
    assert logging.getLogger().handlers == handlers and warnings.showwarning is show
    lines = stream.getvalue().splitlines()
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(time + r" WARNING sprat\.serve\.engine: models/mine: the engine is up again", lines[0])
    assert re.fullmatch(time + r" WARNING sprat\.serve: others can read these API keys", lines[1]) and len(lines) == 2

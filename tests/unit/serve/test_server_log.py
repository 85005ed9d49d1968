"""What the server says of itself: a line with time, level and place, and no line of our source."""

from __future__ import annotations

import io
import logging
import re
import warnings

from sprat.serve.server_log import write_log_to


def test_events_and_warnings_are_lines_with_time_level_and_place() -> None:
    stream, root, show = io.StringIO(), logging.getLogger(), warnings.showwarning
    handler = write_log_to(stream)
    try:
        logging.getLogger("sprat.serve.engine").warning("%s: the engine is up again", "models/mine")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("others can read these API keys", stacklevel=1)
    finally:
        root.removeHandler(handler)
        warnings.showwarning = show
        logging.getLogger("sprat.serve").setLevel(logging.NOTSET)
    lines = stream.getvalue().splitlines()
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(time + r" WARNING sprat\.serve\.engine: models/mine: the engine is up again", lines[0])
    assert re.fullmatch(time + r" WARNING sprat\.serve: others can read these API keys", lines[1]) and len(lines) == 2

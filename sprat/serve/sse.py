"""Server-sent events: a JSON object as one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Ends of lines to some readers that are none to SSE or JSON; the control characters among them JSON escapes itself.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def json_text(value: Any) -> str:
    """A value as JSON that is one line to every reader."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)


def server_sent(body: Mapping[str, Any], event: str = "") -> str:
    r"""An event with ``body`` as its data, under a name where it has one.

    >>> server_sent({"type": "ping"}, "ping")
    'event: ping\ndata: {"type":"ping"}\n\n'
    """
    data = json_text(body)
    return f"event: {event}\ndata: {data}\n\n" if event else f"data: {data}\n\n"

"""One line of JSON for each request, by the logger ``sprat.serve.access``.

Who, what, how long, how it ended: never a prompt, an answer, a key or an argument of a tool. A tenant is the first
characters of a digest of its key; a path stands without its query. What a caller chose (the name of a model, the id of
a request) is cut short, and escaped, as all of JSON is, so that it cannot begin a line of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

log = logging.getLogger("sprat.serve.access")

MAX_CHARS = 128  # of what a caller chose
TENANT_CHARS = 12


@dataclass(frozen=True, slots=True)
class AccessRecord:
    """A request that has ended.

    Attributes:
        request_id: as in ``x-request-id``.
        tenant: its name, which is a digest; "" where the server asks for no key.
        model: as the caller wrote it.
        path: of the URL.
        status: of HTTP.
        seconds: from arrival to the end.
        first_token_seconds: from arrival to the first token; None: there was none.
        ended_by: "", or who ended the answer before it was whole: cancel, disconnect, shutdown.
        code: of the error, or "".
    """

    request_id: str
    tenant: str
    method: str
    path: str
    status: int
    seconds: float
    model: str = ""
    stream: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    finish_reason: str = ""
    ended_by: str = ""
    code: str = ""

    def line(self, at: datetime) -> str:
        """The record as one line of JSON; ``at`` is when the request ended.

        >>> record = AccessRecord("r1", "ab" * 32, "POST", "/v1/chat/completions?key=secret", 200, 1.23456)
        >>> record.line(datetime(2026, 1, 1, tzinfo=UTC))[:98]
        '{"time": "2026-01-01T00:00:00.000Z", "request_id": "r1", "tenant": "abababababab", "method": "POST'
        """
        fields = asdict(self)
        fields["tenant"] = self.tenant[:TENANT_CHARS]
        fields["path"] = self.path.partition("?")[0]
        for name, value in fields.items():
            if isinstance(value, str):
                fields[name] = value[:MAX_CHARS]
            elif isinstance(value, float):
                fields[name] = round(value, 4)
        time = at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return json.dumps({"time": time, **fields})


def describe(state: MutableMapping[str, Any], **fields: Any) -> None:
    """Say what the line of a request shall hold that is no answer, by the names of ``AccessRecord``.

    Args:
        state: of its ASGI scope.
    """
    state.setdefault("access_fields", {}).update(fields)


def log_request(record: AccessRecord) -> None:
    """Write the line of a request that has just ended, where anybody reads it."""
    if log.isEnabledFor(logging.INFO):
        log.info("%s", record.line(datetime.now(UTC)))


def write_lines_to(stream: TextIO) -> logging.Handler:
    """Have the lines written to ``stream``, bare, and by no other handler. Returns the handler, to be removed again."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    return handler

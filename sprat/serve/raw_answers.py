"""What is answered below the application: to what is no HTTP, came too late, or finds no slot."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sprat.serve.error_handlers import error_response
from sprat.serve.errors import RequestError, error_body, route_path
from sprat.serve.middleware import SECURITY_HEADERS, request_id_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

MAX_HEAD_BYTES = 16 * 1024  # read at once; a head that is longer, and not complete then, is refused
MAX_HEAD_LINES = 256


class HeadBound:
    """Counts the lines of one request's head before they are parsed: ten thousand of them would hold up everybody."""

    def __init__(self) -> None:
        self._lines, self._tail = 0, b""

    def is_exceeded(self, piece: bytes) -> bool:
        """Whether there are too many lines, with ``piece``, up to the blank one that ends the head."""
        joined = self._tail + piece
        end = re.search(rb"\n\r?\n", joined)
        self._lines += joined.count(b"\n", len(self._tail), end.end() if end else len(joined))
        self._tail = joined[-2:]
        return self._lines > MAX_HEAD_LINES

    @staticmethod
    def error() -> RequestError:
        """What is said of such a head."""
        message = f"the request has more than {MAX_HEAD_LINES} header lines; send fewer"
        return RequestError(431, message, code="request_header_fields_too_large")


def parser_error(error: BaseException | None, unread: bytes) -> RequestError:
    """What h11 gave up with ``error``, which knows its status; ``unread``: what it could not make sense of."""
    status = HTTPStatus(getattr(error, "error_status_hint", 400))
    if status == 431 and b"\n" not in unread:
        status = HTTPStatus(414)  # not even the first line is whole
    message = f"the request is not valid HTTP/1.1 ({error}); correct the client, or use another"
    return RequestError(status, message, code=status.phrase.lower().replace(" ", "_").replace("-", "_"))


def error_answer(
    error: RequestError, scope: Mapping[str, Any] | None, unread: bytes, default_headers: Iterable[tuple[bytes, bytes]]
) -> bytes:
    """The bytes that answer with ``error`` and say that the connection ends.

    Args:
        error: what to say.
        scope: the request it is about, if its head was read.
        unread: else, what came of it: the first line says by which protocol to answer.
        default_headers: what the server puts on every answer: the date.
    """
    if scope is not None:
        path, request_id = route_path(scope), scope.get("state", {}).get("request_id") or request_id_of(b"")
    else:
        line = re.match(rb"[A-Z]+ ([!-~]+)", unread)
        path, request_id = line[1].partition(b"?")[0].decode("ascii") if line else "", request_id_of(b"")
    body = json.dumps(error_body(error, path, request_id)).encode()
    headers = [
        *default_headers,
        *((name.lower().encode(), value.encode()) for name, value in error.headers().items()),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *SECURITY_HEADERS,
        (b"x-request-id", request_id.encode()),
    ]
    head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n".encode()
    is_head = scope is not None and scope["method"] == "HEAD"
    return head + b"".join(b"%s: %s\r\n" % header for header in headers) + b"\r\n" + (b"" if is_head else body)


def overloaded_app(app: ASGIApp, max_connections: int) -> ASGIApp:
    """The application of a connection for which there is no slot: health is told, all else has to come again."""
    message = f"all {max_connections} connections wait for answers; try again in a moment"
    error = RequestError(503, message, code="too_many_connections", kind="server_error", retry_after=1)

    async def overloaded(scope: Scope, receive: Receive, send: Send) -> None:
        if route_path(scope).startswith("/health"):
            await app(scope, receive, send)
            return
        sent_id = dict[bytes, bytes](scope["headers"]).get(b"x-request-id", b"")
        scope.setdefault("state", {})["request_id"] = request_id = request_id_of(sent_id)
        response: Any = error_response(error, scope)
        response.headers.update({"Connection": "close", "x-request-id": request_id})
        await response(scope, receive, send)

    return overloaded

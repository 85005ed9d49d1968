"""A request that cannot be answered, whichever protocol it came by, and what its caller reads of it.

Two forms of body: Anthropic's on Anthropic's paths (``…/messages``, ``/anthropic/…``), OpenAI's on all others. All who
answer with an error make its body here: the routes, the middleware, and the connection, below the application.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}  # of other statuses: invalid_request_error below 500, else api_error


class RequestError(Exception):
    """A request that cannot be answered; each protocol writes it in its own form, by default OpenAI's.

    Args:
        status: HTTP status.
        message: one sentence for the caller.
        param: the field at fault, as a JSON path such as ``messages[0].content``, or None.
        code: a short machine-readable name.
        kind: OpenAI's ``error.type``.
        retry_after: seconds after which trying again makes sense, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_value",
        kind: str = "invalid_request_error",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.kind, self.retry_after = code, kind, retry_after

    def retry_headers(self) -> dict[str, str]:
        """``Retry-After`` in whole seconds, and in milliseconds for the clients of openai and anthropic.

        >>> RequestError(503, "later", retry_after=1.25).retry_headers()
        {'Retry-After': '2', 'retry-after-ms': '1250'}
        """
        if self.retry_after is None:
            return {}
        return {
            "Retry-After": str(math.ceil(self.retry_after)),
            "retry-after-ms": str(math.ceil(1000 * self.retry_after)),
        }

    def body(self) -> dict[str, Any]:
        """The JSON body: ``{"error": {"message", "type", "param", "code"}}``."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The headers that go with its status: those of ``retry_headers``, and ``WWW-Authenticate`` with 401."""
        return {**self.retry_headers(), "WWW-Authenticate": "Bearer"} if self.status == 401 else self.retry_headers()


class BrokenStream(Exception):
    """Raised in a response that cannot be finished, after its error event: the connection closes uncleanly.

    There is no last chunk, so that no client takes the answer for whole, and no traceback in the log.
    """


def is_anthropic_path(path: str) -> bool:
    """Whether ``path``, without the server's root path, is one of Anthropic's.

    >>> [is_anthropic_path(path) for path in ("/v1/messages/count_tokens", "/anthropic/v1/models", "/v1/models")]
    [True, True, False]
    """
    return path.startswith("/anthropic/") or "messages" in path.split("/")


def error_body(error: RequestError, path: str, request_id: str = "") -> dict[str, Any]:
    """What the caller of ``path`` (without the server's root path) reads of ``error``.

    >>> error_body(RequestError(401, "no key"), "/v1/messages", "req_1")
    {'type': 'error', 'error': {'type': 'authentication_error', 'message': 'no key'}, 'request_id': 'req_1'}
    """
    if not is_anthropic_path(path):
        return error.body()
    return anthropic_body(error, request_id)


def anthropic_body(error: RequestError, request_id: str = "") -> dict[str, Any]:
    """An error in Anthropic's form; a prompt that does not fit says so in the words by which their clients know it."""
    kind = ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    message = error.message
    if error.code == "context_length_exceeded" and "prompt is too long" not in message:
        message = f"prompt is too long: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id or None}


def route_path(scope: Mapping[str, Any]) -> str:
    """The path of an ASGI scope without the server's root path, whether or not the proxy before it took that off.

    >>> [route_path({"path": path, "root_path": "/llm"}) for path in ("/llm/v1/models", "/v1/models", "/llm", "/llms")]
    ['/v1/models', '/v1/models', '/', '/llms']
    """
    root, path = str(scope.get("root_path", "")), str(scope["path"])
    return path[len(root) :] or "/" if root and (path == root or path.startswith(f"{root}/")) else path

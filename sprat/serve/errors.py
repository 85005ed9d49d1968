"""A request that cannot be answered, whichever protocol it came by."""

from __future__ import annotations

import math
from typing import Any


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

"""For schemathesis: every error is JSON and no server's fault; a line for each call goes to the file $CALLS."""

from __future__ import annotations

import json
import os
from typing import Any

import schemathesis

FULL = (429, 503)
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Ask the model that is there, and for few tokens: what is wrong with the rest of a body stays as it is."""
    body = case.body
    if isinstance(body, dict):
        if isinstance(body.get("model"), str):
            body["model"] = os.environ["MODEL"]
        for name in LENGTHS:
            if isinstance(body.get(name), int) and body[name] > 4:
                body[name] = 4
        if "model" in body and not any(name in body for name in LENGTHS):
            body[LENGTHS["responses" in str(case.path) and 2]] = 4


@schemathesis.check
def errors_are_json(ctx: Any, response: Any, case: Any) -> None:
    """Raises AssertionError otherwise."""
    with open(os.environ["CALLS"], "a", encoding="utf-8") as file:
        file.write(f"{response.status_code} {case.method} {case.path}\n")
    assert response.status_code < 500 or response.status_code in (*FULL, 501, 505), response.content[:300]
    assert b"Traceback" not in response.content
    if response.status_code >= 400 and case.method.upper() != "HEAD":
        error = json.loads(response.content)["error"]
        assert error if isinstance(error, str) else error["message"]
        assert response.headers["content-type"][0].startswith("application/json"), response.headers["content-type"]

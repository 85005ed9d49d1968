"""Errors from inside the application, the router's among them, in the form of the path they come from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from sprat.serve.errors import RequestError, error_body, route_path

if TYPE_CHECKING:
    from fastapi import FastAPI


def error_response(error: RequestError, scope: Scope) -> Response:
    """An error as the response to the request of ``scope``."""
    state = scope.setdefault("state", {})
    request_id, state["error_code"] = state.get("request_id", ""), error.code
    body = error_body(error, route_path(scope), request_id)
    content = json.dumps(body)  # in ASCII, since a caller's text that is quoted may hold half a surrogate pair
    return Response(content, error.status, error.headers(), media_type="application/json")


def allowed_methods(scope: Scope) -> list[str]:
    """The methods that any route takes on the path of ``scope``; HEAD goes with GET."""
    methods: set[str] = set()
    for route in scope["app"].routes:
        if route.matches(scope)[0] is not Match.NONE:
            methods |= set(getattr(route, "methods", None) or ())
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of ``app``, expected or not, an error object."""
    from fastapi.exceptions import RequestValidationError

    async def on_refusal(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return error_response(error, request.scope)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = str(error.detail).lower().replace(" ", "_")
        if error.status_code == 405:
            methods = ", ".join(allowed_methods(request.scope))
            message = f"{request.method} is not for this path; it takes {methods}"
            response = error_response(RequestError(405, message, code=code), request.scope)
            response.headers["Allow"] = methods
            return response
        message = "there is nothing at this path; /openapi.json lists what there is"
        fault = RequestError(error.status_code, message if error.status_code == 404 else str(error.detail), code=code)
        return error_response(fault, request.scope)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"][1:])) or None
        return error_response(RequestError(400, f"{field}: {first['msg']}", param=field), request.scope)

    async def on_crash(request: Request, error: Exception) -> Response:
        return error_response(internal_error(), request.scope)

    app.add_exception_handler(RequestError, on_refusal)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Exception, on_crash)


def internal_error() -> RequestError:
    """A fault of ours."""
    return RequestError(500, "the server made a mistake", code="internal_error", kind="server_error")

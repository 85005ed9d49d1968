"""The application: an engine behind the routes, with its middleware, as one ASGI object."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from sprat.errors import ServeError
from sprat.serve import meter
from sprat.serve.admission_pool import AdmissionPool, EngineLike
from sprat.serve.config import ServeConfig

if TYPE_CHECKING:
    from fastapi import FastAPI


def create_app(
    engine: EngineLike,
    config: ServeConfig,
    *,
    default_sampling: Mapping[str, float] | None = None,
    adapters: Collection[str] = (),
) -> FastAPI:
    """The chat server around ``engine``, ready for any ASGI server.

    Args:
        engine: takes requests from any thread; it is started and stopped with the app.
        config: see ``ServeConfig``; the address is not bound here.
        default_sampling: settings of ``Sampling`` for requests that say none: what the model's folder says.
        adapters: names of the engine's adapters, which requests choose as their model.

    Raises:
        ServeError: an adapter has the name of the model.
    """
    from fastapi import FastAPI

    from sprat.serve.api import AppState, add_routes
    from sprat.serve.api_keys import ApiKeys
    from sprat.serve.middleware import SecurityMiddleware

    pool = AdmissionPool(engine, meter.Meter(config.prices), max_concurrent_requests=config.max_concurrent_requests)
    name = config.served_model_name or "sprat"
    if name in adapters:
        raise ServeError(f"the model and an adapter are both called {name!r}", where="adapters", todo="rename one")
    state = AppState(pool, config, name, default_sampling or {}, tuple(adapters))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        pool.close()
        engine.stop()

    # No /docs and no /redoc: those pages load scripts from elsewhere. The schema itself is served.
    app = FastAPI(title="Sprat", docs_url=None, redoc_url=None, openapi_url="/openapi.json", lifespan=lifespan)
    app.state.pool, app.state.config = pool, config
    hosts = (*config.allowed_hosts, config.host)
    app.add_middleware(SecurityMiddleware, api_keys=ApiKeys(config.api_keys), allowed_hosts=hosts)
    add_routes(app, state)

    _add_error_handlers(app)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Make every error of ``app``, expected or not, an OpenAI-style error object."""
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    from sprat.serve.errors import RequestError
    from sprat.serve.responses import error_response

    async def on_refusal(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestError)
        return error_response(error)

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = str(error.detail).lower().replace(" ", "_")
        response = error_response(RequestError(error.status_code, str(error.detail), code=code))
        response.headers.update(error.headers or {})  # Allow, of a 405
        return response

    async def on_crash(request: Request, error: Exception) -> JSONResponse:
        fault = RequestError(500, "the server made a mistake", code="internal_error", kind="server_error")
        return error_response(fault)

    app.add_exception_handler(RequestError, on_refusal)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_crash)

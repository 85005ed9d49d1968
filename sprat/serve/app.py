"""The application: an engine behind the routes, with its middleware, as one ASGI object."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from sprat.serve import meter
from sprat.serve.admission import AdmissionPool, EngineLike
from sprat.serve.meter import Prices

if TYPE_CHECKING:
    from fastapi import FastAPI


def create_app(
    engine: EngineLike,
    *,
    name: str = "sprat",
    prices: Prices | None = None,
    examples: Sequence[str] = (),
    turns: int | None = None,
    max_tokens: int = 1024,
    max_requests: int = 64,
    max_body_bytes: int = 1 << 20,
    default_sampling: Mapping[str, float] | None = None,
    allowed_hosts: Iterable[str] = (),
    keys: Iterable[str] = (),
) -> FastAPI:
    """The chat server around ``engine``, ready for any ASGI server.

    Args:
        engine: takes requests from any thread; it is started and stopped with the app.
        name: the model id that requests must give.
        prices: nano-yuan per token; today's default table when None.
        examples: questions that the page offers.
        turns: how many past exchanges the page sends along; 0 for a model that was taught single
            questions, None for no limit. Requests made otherwise are not touched.
        max_tokens: the most tokens of one answer, thinking included; also the default. A request for more is refused
            with 400.
        max_requests: answers at a time; one more is refused with 429.
        max_body_bytes: bound of a request body; a larger one is refused with 413.
        default_sampling: settings of ``Sampling`` for requests that say none: what the model's folder says.
        allowed_hosts: names, beside ``localhost`` and IP addresses, that a ``Host`` header may give.
        keys: API keys, each a tenant of its own; without any everybody may ask, as one tenant.
    """
    from fastapi import FastAPI

    from sprat.serve.api import AppState, add_routes
    from sprat.serve.api_keys import ApiKeys
    from sprat.serve.middleware import SecurityMiddleware

    api_keys = ApiKeys(keys)
    prices = prices if prices is not None else meter.select_prices(meter.load_price_tables())
    pool = AdmissionPool(engine, meter.Meter(prices), max_requests=max_requests)
    state = AppState(
        pool, name, prices, list(examples), turns=turns, max_tokens=max_tokens, default_sampling=default_sampling or {},
        max_body_bytes=max_body_bytes, requires_key=bool(api_keys),
    )  # fmt: skip

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        pool.close()
        engine.stop()

    # No /docs and no /redoc: those pages load scripts from elsewhere. The schema itself is served.
    app = FastAPI(title="Sprat", docs_url=None, redoc_url=None, openapi_url="/openapi.json", lifespan=lifespan)
    app.state.pool = pool
    app.add_middleware(SecurityMiddleware, api_keys=api_keys, allowed_hosts=allowed_hosts)
    add_routes(app, state)

    _add_error_handlers(app)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Make every error of ``app``, expected or not, an OpenAI-style error object."""
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    from sprat.serve.api import error_response
    from sprat.serve.protocol import RequestError

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

"""The application: an engine behind the routes, with its middleware, as one ASGI object."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from sprat.errors import ServeError
from sprat.serve import meter
from sprat.serve.admission import AdmissionPool, EngineLike
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
    from sprat.serve.error_handlers import add_error_handlers
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
    app.add_middleware(
        SecurityMiddleware,
        api_keys=ApiKeys(config.api_keys),
        allowed_hosts=hosts,
        allowed_origins=config.allowed_origins,
        root_path=config.root_path,
    )
    add_routes(app, state)
    add_error_handlers(app)
    return app

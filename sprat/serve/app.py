"""The application: engines behind the routes, with their middleware, as one ASGI object."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sprat.errors import ServeError
from sprat.serve.config import ServeConfig
from sprat.serve.engine_client import EngineClient

if TYPE_CHECKING:
    from fastapi import FastAPI

    from sprat.engine import Engine
    from sprat.serve.metrics import Metrics
    from sprat.serve.service import Service
    from sprat.tokens.tokenizer import Tokenizer

COMPILING = 4  # tenants whose grammars are compiled at one time


@dataclass(frozen=True)
class ServedModel:
    """A model that requests may name.

    Attributes:
        engine: computes it; started and stopped with the app.
        names: the first is its own, the others are aliases.
        default_sampling: settings of ``Sampling`` for requests that say none: what the model's folder says.
        adapters: names of the engine's adapters.
    """

    engine: EngineClient
    tokenizer: Tokenizer
    names: Sequence[str]
    default_sampling: Mapping[str, Any] = field(default_factory=dict)
    adapters: Sequence[str] = ()


def serve_engine(engine: Engine, config: ServeConfig) -> ServedModel:
    """An engine of this process as a served model, by the names of ``config``."""
    from sprat.serve.engine_thread import ThreadEngineClient

    tokenizer, names = engine.tokenizer, (config.served_model_name or "sprat", *config.served_model_aliases)
    adapters = [each.name for each in engine.backend.adapters]
    return ServedModel(
        ThreadEngineClient(engine), tokenizer, names, tokenizer.generation_config.default_sampling, adapters
    )


def create_app(models: Engine | Sequence[ServedModel], config: ServeConfig) -> FastAPI:
    """The server around ``models``, ready for any ASGI server.

    Args:
        models: an engine, which then works in a thread of this process, or what is served (see ``serve_engine`` and
            ``server.run``, which gives each engine a process of its own).
        config: see ``ServeConfig``; the address is not bound here.

    Raises:
        ServeError: two models, or a model and an adapter, have one name.
    """
    from fastapi import FastAPI

    from sprat.serve.api import add_routes
    from sprat.serve.api_keys import ApiKeys
    from sprat.serve.app_state import AppState
    from sprat.serve.error_handlers import add_error_handlers
    from sprat.serve.metrics import Metrics
    from sprat.serve.middleware import SecurityMiddleware

    served = list(models) if isinstance(models, Sequence) else [serve_engine(models, config)]
    _check_names(served)
    metrics = Metrics()
    state = AppState([_service(model, config, metrics) for model in served], config, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:  # of several engines some may be up when one fails, or when it is to stop already
            await state.start()
            yield
        finally:
            await state.stop()

    # No /docs and no /redoc: those pages load scripts from elsewhere. The schema itself is served.
    app = FastAPI(
        title="Sprat",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.serving, app.state.config = state, config
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


def _check_names(served: Sequence[ServedModel]) -> None:
    names = [name for model in served for name in (*model.names, *model.adapters)]
    names += [f"{name}:{adapter}" for model in served for name in model.names for adapter in model.adapters]
    for index, name in enumerate(names):
        if not name.strip():
            raise ServeError("a model or an adapter has an empty name", where="names", todo="give it one")
        if name in names[:index]:
            todo = "give one another name (served_model_name, --served-model-name)"
            raise ServeError(f"two models or adapters are called {name!r}", where="names", todo=todo)


def _service(model: ServedModel, config: ServeConfig, metrics: Metrics) -> Service:
    from sprat.serve.admission import Admission
    from sprat.serve.meter import Meter
    from sprat.serve.names import Names
    from sprat.serve.prompts import PromptWriter
    from sprat.serve.service import Service

    prompts = PromptWriter(
        model.tokenizer,
        model.engine,
        default_sampling=model.default_sampling,
        max_model_len=config.max_model_len,
        max_tokens=config.max_tokens,
    )
    admission = Admission(
        config.max_num_seqs, config.max_num_queued_reqs, config.max_num_queued_tokens, config.max_wait_seconds
    )
    compiling = Admission(COMPILING, config.max_num_queued_reqs, 0, config.max_wait_seconds, max_num_seqs_per_tenant=1)
    names = Names(model.names[0], tuple(model.names[1:]), tuple(model.adapters))
    return Service(model.engine, prompts, admission, compiling, Meter(config.prices), metrics, names)

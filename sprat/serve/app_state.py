"""What the routes share: the services, the settings and the metrics of one server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field

from sprat.errors import EngineError, ServeError, SpratError
from sprat.serve.config import ServeConfig
from sprat.serve.errors import RequestError
from sprat.serve.metrics import Metrics
from sprat.serve.service import Service

log = logging.getLogger(__name__)
SETTINGS = {"cache_bytes": "kv_cache_memory_bytes"}  # what an engine calls them → ours
BODY_BYTES, BYTES_OF_TOKEN = 1 << 20, 32  # a body: schemas and the like, and what a context of text takes in JSON


@dataclass
class AppState:
    """What the routes share: a service for each model that is loaded, the first of them the default."""

    services: list[Service]
    config: ServeConfig
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> tuple[str, ...]:
        """What a request may name as its model."""
        return tuple(name for service in self.services for name in service.names.all())

    def find(self, model: str) -> Service:
        """The service that has ``model``; RequestError 404 where none has."""
        for service in self.services:
            if service.names.has(model):
                return service
        known = ", ".join(map(repr, self.names))
        message = f"The model {model[:100]!r} does not exist here; this server has {known}"
        raise RequestError(404, message, param="model", code="model_not_found")

    @property
    def max_body_bytes(self) -> int:
        """Bound of a request's body: what the longest context can take, unless it was set."""
        context = max(service.prompts.context for service in self.services)
        return self.config.max_body_bytes or BODY_BYTES + BYTES_OF_TOKEN * context

    async def start(self) -> None:
        """Have all engines up.

        Raises:
            ServeError: a setting of this server is none for an engine.
            SpratError: one cannot be.
        """
        starts = [asyncio.ensure_future(service.engine.start()) for service in self.services]
        try:
            await asyncio.gather(*starts)
        except BaseException as error:  # no other may come up after it was stopped
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            if isinstance(error, EngineError):
                where = SETTINGS.get(error.where, error.where)
                raise ServeError(error.what, where=where, todo=error.todo) from error
            raise
        for service in self.services:
            self._warn_of_limits(service)

    def _warn_of_limits(self, service: Service) -> None:
        """Say what was asked for and is not had: the model's context, or the memory for it, is smaller."""
        info = service.engine.info
        context = min(info.context, info.cache_tokens)
        for name in ("max_model_len", "max_tokens"):
            asked = getattr(self.config, name)
            if asked is not None and asked > context:
                log.warning("%s: %s is %d, but there is room for %d tokens", service.names.served, name, asked, context)

    async def stop(self) -> None:
        """End them all."""
        for service in self.services:
            service.abort()
            await service.engine.stop()
            service.close()

    async def drain(self, timeout: float) -> None:
        """Admit nobody more; running answers may finish within ``timeout`` seconds."""
        await asyncio.gather(*(service.drain(timeout) for service in self.services))

    def abort(self) -> None:
        """End whatever still runs."""
        for service in self.services:
            service.abort()

    async def refresh_metrics(self) -> None:
        """Bring in what the engines hold; never waits for a step."""
        for service in self.services:
            with contextlib.suppress(SpratError):
                self.metrics.model(service.names.served).observe_stats(await service.engine.stats())

    def status(self, model: str = "") -> str:
        """``ok``, or why requests are not answered: ``closing``, ``failed`` (for good), ``stalled`` or ``starting``.

        Args:
            model: of which it is asked; the empty string: of all of them.

        Raises:
            RequestError: 404, there is no such model.
        """
        services = [service for service in self.services if not model or service.names.has(model)]
        if not services:  # who asks may have no key: no word of the others
            raise RequestError(404, "no such model", param="model", code="model_not_found")
        if any(service.closed for service in services):
            return "closing"
        if any(service.engine.failure is not None for service in services):
            return "failed"
        if any(service.engine.stalled for service in services):
            return "stalled"
        return "ok" if all(service.engine.alive for service in services) else "starting"

    @property
    def failure(self) -> SpratError | None:
        """Why no model is answered for any more: all engines are down for good. None while one is up or will be."""
        failures = [service.engine.failure for service in self.services]
        return failures[-1] if all(failures) else None

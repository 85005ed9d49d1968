"""The routes, under the bases that clients are made with: ``/``, ``/v1``, ``/beta`` and ``/anthropic``."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from sprat.errors import SpratError
from sprat.serve import anthropic, anthropic_answers
from sprat.serve.chat_page import load_chat_page
from sprat.serve.config import ServeConfig
from sprat.serve.errors import RequestError
from sprat.serve.exchange import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Exchange, Wire
from sprat.serve.fields import Reader, header_list, parse_json
from sprat.serve.metrics import Metrics, metrics_app
from sprat.serve.openai_chat import parse_chat
from sprat.serve.openapi import request_schema
from sprat.serve.receive import read_body
from sprat.serve.service import Service

if TYPE_CHECKING:
    from fastapi import FastAPI

OPENAI_BASES, ANTHROPIC_BASES = ("", "/v1", "/beta"), ("/v1", "/anthropic/v1", "/anthropic")
MAX_EMBEDDINGS = 256
CLIENT_LEFT = 499  # nobody reads it
BODY_BYTES, BYTES_OF_TOKEN = 1 << 20, 32  # a body: schemas and the like, and what a context of text takes in JSON
Body = dict[str, Any]
Worked = tuple[Body, tuple[str, ...]]  # an answer, and what of the request was ignored


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
        """Have all engines up. Raises SpratError: one cannot be."""
        await asyncio.gather(*(service.engine.start() for service in self.services))

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

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return all(service.engine.alive and not service.closed for service in self.services)


def model_card(state: AppState, name: str) -> Body:
    """One entry of ``GET /models``; ``sprat`` holds what the page needs to know, ``parent`` an adapter's base."""
    config, service = state.config, state.find(name)
    card: Body = {"id": name, "object": "model", "created": state.created, "owned_by": "sprat"}
    card |= {"root": service.names.served, "parent": service.names.parent(name)}
    page = {"examples": config.examples, "turns": config.max_history_turns, "max_tokens": config.max_tokens}
    extra = {**page, "prices": config.prices.model_dump(mode="json")}
    return {**card, "max_model_len": service.prompts.context, "sprat": extra}


def _anthropic_card(state: AppState, name: str) -> Body:
    created = datetime.fromtimestamp(state.created, UTC).isoformat().replace("+00:00", "Z")
    context = state.find(name).prompts.context
    limits = {"max_input_tokens": context, "max_tokens": min(context, state.config.max_tokens or context)}
    return {"type": "model", "id": name, "display_name": name, "created_at": created, **limits}


def _is_anthropic(request: Request) -> bool:
    return "anthropic-version" in request.headers or "/anthropic" in request.url.path


async def answer(request: Request, wire: Wire, state: AppState) -> Response:
    """Whatever is generated, in any protocol."""
    try:
        body = await read_body(request, state.max_body_bytes)
        return await Exchange(request, wire, request.state.tenant, state.find).respond(parse_json(body), len(body))
    except ClientDisconnect:
        return Response(status_code=CLIENT_LEFT)


def add_routes(app: FastAPI, state: AppState) -> None:
    """Register all routes on ``app``."""
    _add_page(app)
    _add_health(app, state)
    _add_models(app, state)
    app.mount("/metrics", metrics_app(state.metrics, state.refresh_metrics))
    for wire, path, bases in (
        (CHAT, "/chat/completions", OPENAI_BASES),
        (COMPLETIONS, "/completions", OPENAI_BASES),
        (RESPONSES, "/responses", OPENAI_BASES),
        (MESSAGES, "/messages", ANTHROPIC_BASES),
    ):
        for base in bases:
            _post(app, base + path, _answering(wire, state), path if base == "/v1" else "")
    for path, work, bases in (
        ("/embeddings", _embeddings, OPENAI_BASES),
        ("/tokenize", _tokenize, OPENAI_BASES),
        ("/detokenize", _detokenize, OPENAI_BASES),
        ("/messages/count_tokens", _count_tokens, ANTHROPIC_BASES),
    ):
        for base in bases:
            _post(app, base + path, _working(work, state), path if base == "/v1" else "")

    async def cancel(request: Request, name: str) -> Response:
        """End a running answer early; it still closes with its usage and cost."""
        for service in state.services:
            running = service.answers.get(name)
            if running is not None and running.tenant == request.state.tenant:
                running.cancel("cancel")
                return Response(status_code=204)
        raise RequestError(404, "no such answer is running", param="id", code="not_running")

    for base in OPENAI_BASES:
        app.post(f"{base}/chat/completions/{{name}}/cancel", status_code=204, include_in_schema=base == "/v1")(cancel)


def _post(app: FastAPI, path: str, handler: Any, schema_of: str) -> None:
    """Register one route; ``schema_of`` names its body in the schema, empty: it is not listed."""
    content = {"application/json": {"schema": request_schema(schema_of)}} if schema_of else {}
    extra = {"requestBody": {"required": True, "content": content}} if content else None
    app.post(path, include_in_schema=bool(content), openapi_extra=extra)(handler)


def _answering(wire: Wire, state: AppState) -> Callable[..., Any]:
    async def handler(request: Request) -> Response:
        return await answer(request, wire, state)

    return handler


def _working(work: Callable[[Request, AppState, Body], Any], state: AppState) -> Callable[..., Any]:
    """What ``work`` makes of a body, and says that it ignored of it."""

    async def handler(request: Request) -> Response:
        try:
            body = await read_body(request, state.max_body_bytes)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        result, ignored = await work(request, state, parse_json(body))
        return JSONResponse(result, headers={"x-ignored-fields": header_list(ignored)} if ignored else None)

    return handler


def _add_page(app: FastAPI) -> None:
    page = load_chat_page()

    @app.get("/", include_in_schema=False)
    async def chat_page(request: Request) -> Response:
        headers = {"Content-Security-Policy": page.csp, "ETag": page.etag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == page.etag:
            return Response(status_code=304, headers=headers)
        return Response(page.body, media_type="text/html; charset=utf-8", headers=headers)


def _add_health(app: FastAPI, state: AppState) -> None:
    """None of these ever waits for an engine."""
    from sprat import __version__

    async def live() -> Body:
        """The process answers."""
        return {"status": "ok"}

    async def ready() -> Response:
        """Requests are answered: the engines are up and nobody shuts the server down."""
        status = "ok" if state.ready else "closing" if state.services[0].closed else "starting"
        return JSONResponse({"status": status, "model": state.services[0].names.served}, 200 if state.ready else 503)

    async def version() -> Body:
        """The version of Sprat."""
        return {"version": __version__}

    for path, handler in (
        ("/health", ready),
        ("/healthz", ready),
        ("/health/ready", ready),
        ("/health/live", live),
        ("/version", version),
    ):
        app.get(path)(handler)


def _add_models(app: FastAPI, state: AppState) -> None:
    async def models(request: Request) -> Body:
        """The models that are served, and each with its adapters."""
        names = state.names
        if _is_anthropic(request):
            cards = [_anthropic_card(state, name) for name in names]
            return {"data": cards, "has_more": False, "first_id": names[0], "last_id": names[-1]}
        return {"object": "list", "data": [model_card(state, name) for name in names]}

    async def model(request: Request, name: str) -> Body:
        """The card of one model; of none, as a slash too many has it, all of them."""
        if not name:
            return await models(request)
        state.find(name)
        return _anthropic_card(state, name) if _is_anthropic(request) else model_card(state, name)

    for base in ("", "/v1", "/beta", "/anthropic/v1"):
        app.get(f"{base}/models", include_in_schema=base == "/v1")(models)
        app.get(f"{base}/models/{{name:path}}", include_in_schema=base == "/v1")(model)


async def _embeddings(request: Request, state: AppState, body: Body) -> Worked:
    """Pooled hidden states of texts."""
    reader = Reader(body)
    name = reader.required("model", reader.text("model"))
    service = state.find(name)
    value = reader.required("input", reader.raw("input"))
    rows = [value] if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int) else value
    if not isinstance(rows, list) or not rows or len(rows) > MAX_EMBEDDINGS:
        raise reader.error("input", f"must be text, ids, or a list of 1 to {MAX_EMBEDDINGS} of them")
    form = reader.choice("encoding_format", ("float", "base64")) or "float"
    if reader.integer("dimensions", 1) is not None:
        raise reader.not_offered("dimensions")
    reader.text("user")
    prompts = await service.run_in_thread(
        lambda: [_embedding_ids(reader, service, n, row) for n, row in enumerate(rows)]
    )
    tokens = sum(map(len, prompts))
    async with service.admission.place(request.state.tenant.name, tokens=tokens, seqs=1):
        vectors = await service.embed(prompts, name)
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(vector, form)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": name, "usage": usage}, reader.rest()


def _embedding_ids(reader: Reader, service: Service, index: int, row: Any) -> list[int]:
    """The ids of one input."""
    where = f"input[{index}]" if reader.body["input"] is not row else "input"
    vocab = service.engine.info.vocab_size
    if isinstance(row, list) and row and all(type(each) is int and 0 <= each < vocab for each in row):
        ids = row
    elif isinstance(row, str) and row:
        ids = service.prompts.tokenizer.encode_prompt(row)
    else:
        raise reader.error(where, f"must be text that is not empty, or ids of 0 … {vocab - 1}")
    if len(ids) > service.prompts.context:
        message = f"has {len(ids)} tokens, and this model's maximum context length is {service.prompts.context} tokens"
        raise reader.error(where, message, code="context_length_exceeded")
    return ids


def _vector(vector: list[float], form: str) -> Any:
    if form == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def _tokenize(request: Request, state: AppState, body: Body) -> Worked:
    """The ids of a text or of a conversation."""
    reader = Reader(body)
    name = reader.text("model") or state.services[0].names.served
    service = state.find(name)
    prompts = service.prompts
    if reader.has("messages"):
        generation = parse_chat({**body, "model": name})
        ids, ignored = await service.run_in_thread(lambda: prompts.ids(generation)), generation.ignored
    else:
        text = reader.required("prompt", reader.text("prompt"))
        special = reader.flag("add_special_tokens") is not False
        encode = prompts.tokenizer.encode_prompt if special else prompts.tokenizer.encode
        ids, ignored = await service.run_in_thread(lambda: encode(text)), reader.rest()
    return {"count": len(ids), "max_model_len": prompts.context, "tokens": ids}, ignored


async def _detokenize(request: Request, state: AppState, body: Body) -> Worked:
    """The text of ids."""
    reader = Reader(body)
    service = state.find(reader.text("model") or state.services[0].names.served)
    ids, vocab = reader.required("tokens", reader.items("tokens")), service.engine.info.vocab_size
    for index, each in enumerate(ids):
        if type(each) is not int or not 0 <= each < vocab:
            raise reader.error(f"tokens[{index}]", f"must be an id of 0 … {vocab - 1}")
    return {"prompt": await service.run_in_thread(lambda: service.prompts.tokenizer.decode(ids))}, reader.rest()


async def _count_tokens(request: Request, state: AppState, body: Body) -> Worked:
    """How many tokens a request of Anthropic's has."""
    generation = anthropic.parse_count_tokens(body)
    service = state.find(generation.model)
    ids = await service.run_in_thread(lambda: service.prompts.ids(generation))
    return anthropic_answers.token_count(len(ids)), generation.ignored

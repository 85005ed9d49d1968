"""The routes, under the bases that clients are made with: ``/``, ``/v1``, ``/beta`` and ``/anthropic``."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from sprat.serve.access_log import describe
from sprat.serve.app_state import AppState
from sprat.serve.chat_page import load_chat_page
from sprat.serve.errors import RequestError
from sprat.serve.exchange import CLIENT_LEFT, Exchange
from sprat.serve.fields import header_list, parse_json
from sprat.serve.metrics import CONTENT_TYPE
from sprat.serve.openapi import request_schema
from sprat.serve.receive import read_body
from sprat.serve.side_endpoints import count_tokens, detokenize, embeddings, input_tokens, tokenize
from sprat.serve.wires import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Wire

if TYPE_CHECKING:
    from fastapi import FastAPI

OPENAI_BASES, ANTHROPIC_BASES = ("", "/v1", "/beta"), ("/v1", "/anthropic/v1", "/anthropic")
Body = dict[str, Any]


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
        return await Exchange(request, wire, request.state.tenant, state.find).respond(state.max_body_bytes)
    except ClientDisconnect:
        return Response(status_code=CLIENT_LEFT)


def add_routes(app: FastAPI, state: AppState) -> None:
    """Register all routes on ``app``."""
    _add_page(app)
    _add_health(app, state)
    _add_models(app, state)
    for wire, path, bases in (
        (CHAT, "/chat/completions", OPENAI_BASES),
        (COMPLETIONS, "/completions", OPENAI_BASES),
        (RESPONSES, "/responses", OPENAI_BASES),
        (MESSAGES, "/messages", ANTHROPIC_BASES),
    ):
        for base in bases:
            _post(app, base + path, _answering(wire, state), path if base == "/v1" else "")
    for path, work, bases in (
        ("/embeddings", embeddings, OPENAI_BASES),
        ("/tokenize", tokenize, OPENAI_BASES),
        ("/detokenize", detokenize, OPENAI_BASES),
        ("/responses/input_tokens", input_tokens, OPENAI_BASES),
        ("/messages/count_tokens", count_tokens, ANTHROPIC_BASES),
    ):
        for base in bases:
            _post(app, base + path, _working(work, state), path if base == "/v1" else "")

    async def cancel(request: Request, name: str) -> Response:
        """End a running answer early; it still closes with its usage and cost."""
        for service in state.services:
            running = service.answers.get(name)
            if running is not None and running.tenant == request.state.tenant:
                describe(request.scope["state"], model=running.generation.model)
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
    """None of these ever waits for a step of an engine."""
    from sprat import __version__

    async def live() -> Body:
        """The process answers."""
        return {"status": "ok"}

    async def ready(model: str = "") -> Response:
        """Requests are answered: the engines, or that of ``model``, are up and nobody shuts the server down."""
        status = state.status(model)
        name = model or state.services[0].names.served
        return JSONResponse({"status": status, "model": name}, 200 if status == "ok" else 503)

    async def version() -> Body:
        """The version of Sprat."""
        return {"version": __version__}

    async def metrics() -> Response:
        """Everything that is counted, in Prometheus' text format."""
        await state.refresh_metrics()
        return Response(state.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})

    for path, handler in (
        ("/health", ready),
        ("/healthz", ready),
        ("/health/ready", ready),
        ("/health/live", live),
        ("/version", version),
        ("/metrics", metrics),
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

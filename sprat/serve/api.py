"""The routes: models, chat completions, health, and the page.

A chat completion takes these steps: read the body within its bound, validate it (``protocol``), be
admitted (``admission``), pass the deltas on as they come, and close with the usage and the cost that
the meter has recorded (``responses``). ``POST /v1/chat/completions/{id}/cancel`` ends a stream early and
in good order, so that the client still learns what it cost.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sprat.serve.admission import AdmissionPool
from sprat.serve.chat_page import load_chat_page
from sprat.serve.config import ServeConfig
from sprat.serve.errors import RequestError
from sprat.serve.protocol import ChatRequest, parse_chat_request
from sprat.serve.responses import EventStreamResponse, full_response, stream_events

if TYPE_CHECKING:
    from fastapi import FastAPI

    from sprat.engine.sampling_params import Sampling
    from sprat.tokens.chat import Message

BODY_TIMEOUT_SECONDS = 30.0  # for the whole request body


@dataclass
class AppState:
    """What the routes share."""

    pool: AdmissionPool
    config: ServeConfig
    model_name: str
    default_sampling: Mapping[str, Any]  # where a request says nothing
    adapters: tuple[str, ...] = ()  # models too: the one that is served, with an adapter
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def models(self) -> tuple[str, ...]:
        """What a request may name."""
        return (self.model_name, *self.adapters)


async def read_body(request: Request, limit: int) -> bytes:
    """The JSON body, read within ``limit`` bytes and ``BODY_TIMEOUT_SECONDS``.

    Raises:
        RequestError: 415 not JSON, 413 too large, 408 too slow.
    """
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        message = "the body must be sent as Content-Type: application/json"
        raise RequestError(415, message, param="Content-Type", code="unsupported_media_type")
    too_large = RequestError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise RequestError(408, "the body came too slowly", code="timeout") from None
    return bytes(body)


def _sampling_params(chat_request: ChatRequest, state: AppState, seed: int) -> Sampling:
    """The engine's sampling settings for a request: what it says, else what the model's folder says.

    Raises:
        RequestError: 400; it asks for more tokens than this server gives.
    """
    from sprat.engine.sampling_params import Sampling

    most = state.config.max_tokens
    if (limit := chat_request.requested_max_tokens) is not None and limit > most:
        name = chat_request.field_names["max_tokens"]
        message = f"{name} is too large: this server gives at most {most} tokens; lower it or leave it out"
        raise RequestError(400, message, param=name)
    fields = {"temperature", "top_k", "top_p"}
    requested = chat_request.model_dump(include=fields, exclude_unset=True, exclude_none=True)
    return Sampling(
        **{**state.default_sampling, **requested},
        max_tokens=most if limit is None else limit,
        fit=limit is None,
        seed=seed,
        stop=chat_request.stop_strings,
        thinking=chat_request.enable_thinking,
    )


def _messages(chat_request: ChatRequest) -> list[Message]:
    """The conversation as the chat format's own messages."""
    from sprat.tokens.chat import Message

    return [Message("system" if m.role == "developer" else m.role, m.text) for m in chat_request.messages]


async def chat_completion(request: Request, state: AppState) -> Response:
    """``POST /v1/chat/completions``."""
    try:
        chat_request = parse_chat_request(await read_body(request, state.config.max_body_bytes))
    except ClientDisconnect:
        return Response(status_code=499)
    model_name = chat_request.model
    if model_name not in state.models:
        message = f"no model {model_name[:100]!r} here; this server has {', '.join(map(repr, state.models))}"
        raise RequestError(404, message, param="model", code="model_not_found")
    request_id = f"chatcmpl-{secrets.token_hex(16)}"
    seed = chat_request.seed if chat_request.seed is not None else secrets.randbits(31)
    sampling, tenant = _sampling_params(chat_request, state, seed), request.state.tenant
    adapter = model_name if model_name in state.adapters else None
    stream = await state.pool.admit(
        request_id, _messages(chat_request), sampling, tenant, chat_request.field_names, adapter
    )
    if chat_request.stream:
        return EventStreamResponse(stream, stream_events(chat_request, model_name, stream, request_id, seed))
    return await full_response(request, model_name, stream, request_id, seed)


def model_card(state: AppState, name: str) -> dict[str, Any]:
    """One entry of ``GET /v1/models``; ``sprat`` holds what the page needs to know, ``parent`` an adapter's base."""
    config = state.config
    card = {"id": name, "object": "model", "created": state.created, "owned_by": "sprat"}
    if name in state.adapters:
        card["parent"] = state.model_name
    page = {"examples": config.examples, "turns": config.max_history_turns, "max_tokens": config.max_tokens}
    return {**card, "sprat": {**page, "prices": config.prices.model_dump(mode="json")}}


def add_routes(app: FastAPI, state: AppState) -> None:
    """Register all routes on ``app``."""
    page = load_chat_page()

    @app.get("/", include_in_schema=False)
    async def chat_page(request: Request) -> Response:
        headers = {"Content-Security-Policy": page.csp, "ETag": page.etag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == page.etag:
            return Response(status_code=304, headers=headers)
        return Response(page.body, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        """Alive, and, where everybody is one tenant, how busy."""
        running, meter = len(state.pool.running), state.pool.meter
        alive = {"status": "closing" if state.pool.closed else "ok", "model": state.model_name}
        busy = {"running": running, "answered": meter.requests, "nano_yuan": meter.nano_yuan}
        return alive if state.config.api_keys else {**alive, **busy}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served, and the same with each adapter."""
        return {"object": "list", "data": [model_card(state, name) for name in state.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The card of one model."""
        if name not in state.models:
            raise RequestError(404, f"no model {name[:100]!r} here", param="model", code="model_not_found")
        return model_card(state, name)

    schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": _schema()}}}}

    @app.post("/v1/chat/completions", openapi_extra=schema)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, whole or as a stream."""
        return await chat_completion(request, state)

    @app.post("/v1/chat/completions/{name}/cancel", status_code=204)
    async def cancel(request: Request, name: str) -> Response:
        """End a running answer early; its stream still closes with usage and cost."""
        stream = state.pool.running.get(name)
        if stream is None or stream.tenant != request.state.tenant:
            raise RequestError(404, "no such answer is running", param="id", code="not_running")
        stream.cancel()
        return Response(status_code=204)


def _schema() -> dict[str, Any]:
    """The request's JSON schema, self-contained."""
    schema = ChatRequest.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inline(definitions[node["$ref"].rsplit("/", 1)[1]])
            return {key: inline(value) for key, value in node.items()}
        return [inline(item) for item in node] if isinstance(node, list) else node

    return dict(inline(schema))

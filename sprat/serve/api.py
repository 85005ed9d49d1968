"""The routes: models, chat completions, health, and the page.

A chat completion takes these steps: read the body within its bound, validate it (``protocol``), be
admitted (``admission``), pass the deltas on as they come, and close with the usage and the cost that
the meter has recorded. When the client goes away the request is cancelled.

Beside OpenAI's and DeepSeek's fields every answer carries one extension object, ``sprat``: the cost in
nano-yuan, the seed (the same request with this seed gives the same tokens) and the seconds it took.
In a stream it rides on the last chunk. ``POST /v1/chat/completions/{id}/cancel`` ends a stream early and
in good order, so that the client still learns what it cost.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sprat.serve.admission import AdmissionPool, StreamingRequest
from sprat.serve.chat_page import load_chat_page
from sprat.serve.meter import Prices
from sprat.serve.protocol import ChatRequest, RequestError, parse

if TYPE_CHECKING:
    from fastapi import FastAPI

    from sprat.engine.sampling_params import Sampling
    from sprat.tokens.chat import Message

BODY_TIMEOUT_SECONDS = 30.0  # for the whole request body
KEEP_ALIVE_SECONDS = 10.0  # a comment line in a silent stream


@dataclass
class AppState:
    """What the routes share."""

    pool: AdmissionPool
    model_name: str
    prices: Prices
    examples: list[str] = field(default_factory=list)
    turns: int | None = None
    max_tokens: int = 1024
    default_sampling: Mapping[str, Any] = field(default_factory=dict)  # where a request says nothing
    max_body_bytes: int = 1 << 20
    requires_key: bool = False  # strangers ask here: none learns of the others
    created: int = field(default_factory=lambda: int(time.time()))


class AnswerStream(StreamingResponse):
    """A streaming response that stops its answer however it ends."""

    def __init__(self, stream: StreamingRequest, chunks: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self.stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; a client that went away cancels the answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.stream.cancel()


def error_response(error: RequestError) -> JSONResponse:
    """An error as its response, with ``Retry-After`` where trying again makes sense."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


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

    if (limit := chat_request.requested_max_tokens) is not None and limit > state.max_tokens:
        name = chat_request.field_names["max_tokens"]
        message = f"{name} is too large: this server gives at most {state.max_tokens} tokens; lower it or leave it out"
        raise RequestError(400, message, param=name)
    fields = {"temperature", "top_k", "top_p"}
    requested = chat_request.model_dump(include=fields, exclude_unset=True, exclude_none=True)
    return Sampling(
        **{**state.default_sampling, **requested},
        max_tokens=state.max_tokens if limit is None else limit,
        fit=limit is None,
        seed=seed,
        stop=chat_request.stop_strings,
        thinking=chat_request.enable_thinking,
    )


def _messages(chat_request: ChatRequest) -> list[Message]:
    """The conversation as the chat format's own messages."""
    from sprat.tokens.chat import Message

    return [Message("system" if m.role == "developer" else m.role, m.text) for m in chat_request.messages]


def _extension(stream: StreamingRequest, seed: int) -> dict[str, Any]:
    """The ``sprat`` object of a finished answer."""
    cost = stream.cost.to_dict() if stream.cost is not None else None
    return {"cost": cost, "seed": seed, "seconds": round(stream.seconds, 4)}


async def _wait_for_disconnect(request: Request) -> None:
    """Wait until the client has gone; its request has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def full_response(
    request: Request, state: AppState, stream: StreamingRequest, request_id: str, seed: int
) -> Response:
    """Wait for the whole answer and send it as one JSON object; a client that leaves ends it at once."""
    text: dict[str, list[str]] = {"reasoning": [], "content": []}
    disconnect_task = asyncio.create_task(_wait_for_disconnect(request))
    disconnect_task.add_done_callback(lambda _: stream.cancel())
    try:
        async for delta in stream.deltas(KEEP_ALIVE_SECONDS):
            if delta is not None and delta.kind in text:
                text[delta.kind].append(delta.text)
        if disconnect_task.done():
            return Response(status_code=499)
    finally:
        disconnect_task.cancel()
        stream.cancel()
    message = {"role": "assistant", "content": "".join(text["content"])}
    if text["reasoning"]:
        message["reasoning_content"] = "".join(text["reasoning"])
    return JSONResponse(
        {
            "id": request_id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": state.model_name,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": stream.finish_reason}],
            "usage": stream.usage,
            "sprat": _extension(stream, seed),
        },
        headers={"Cache-Control": "no-store"},
    )


async def stream_events(
    chat_request: ChatRequest, state: AppState, stream: StreamingRequest, request_id: str, seed: int
) -> AsyncIterator[str]:
    """The answer as server-sent events: role, deltas, finish reason, usage where asked for, ``[DONE]``."""
    with_usage = chat_request.stream_options is not None and bool(chat_request.stream_options.include_usage)
    head = {"id": request_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": state.model_name}

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        body = {**head, "choices": choices, **({"usage": None} if with_usage else {}), **more}
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def choice(delta: dict[str, Any], finish: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]

    yield event(choice({"role": "assistant", "content": ""}))
    try:
        async for delta in stream.deltas(KEEP_ALIVE_SECONDS):
            if delta is None:
                yield ": keep-alive\n\n"
            elif delta.text and delta.kind in ("reasoning", "content"):
                field_name = "reasoning_content" if delta.kind == "reasoning" else "content"
                yield event(choice({field_name: delta.text}))
    except RequestError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
        return
    last = {"sprat": _extension(stream, seed)}
    yield event(choice({}, stream.finish_reason), **({} if with_usage else last))
    if with_usage:
        yield event([], usage=stream.usage, **last)
    yield "data: [DONE]\n\n"


async def chat_completion(request: Request, state: AppState) -> Response:
    """``POST /v1/chat/completions``."""
    try:
        chat_request = parse(await read_body(request, state.max_body_bytes))
    except ClientDisconnect:
        return Response(status_code=499)
    if chat_request.model != state.model_name:
        message = f"no model {chat_request.model[:100]!r} here; this server has {state.model_name!r}"
        raise RequestError(404, message, param="model", code="model_not_found")
    request_id = f"chatcmpl-{secrets.token_hex(16)}"
    seed = chat_request.seed if chat_request.seed is not None else secrets.randbits(31)
    sampling, tenant = _sampling_params(chat_request, state, seed), request.state.tenant
    stream = await state.pool.admit(request_id, _messages(chat_request), sampling, tenant, chat_request.field_names)
    if chat_request.stream:
        return AnswerStream(stream, stream_events(chat_request, state, stream, request_id, seed))
    return await full_response(request, state, stream, request_id, seed)


def model_card(state: AppState) -> dict[str, Any]:
    """One entry of ``GET /v1/models``; ``sprat`` holds what the page needs to know."""
    prices = state.prices.model_dump(mode="json")
    extension = {"examples": state.examples, "turns": state.turns, "max_tokens": state.max_tokens, "prices": prices}
    card = {"id": state.model_name, "object": "model", "created": state.created, "owned_by": "sprat"}
    return {**card, "sprat": extension}


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
        return alive if state.requires_key else {**alive, **busy}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [model_card(state)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The card of one model."""
        if name != state.model_name:
            raise RequestError(404, f"no model {name[:100]!r} here", param="model", code="model_not_found")
        return model_card(state)

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

"""The routes: models, chat completions, health, and the page.

A chat completion is a walk through one room after another: read the body within its bound, validate
it (``protocol``), get a place (``traffic``), pass the deltas on as they come, and close with the usage
and the cost that the meter has posted. When the client goes away the engine is told to stop.

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

from sprat.serve import page as page_file
from sprat.serve.meter import Meter, Prices
from sprat.serve.protocol import ChatRequest, RequestError, parse
from sprat.serve.traffic import Answering, Traffic

if TYPE_CHECKING:
    from fastapi import FastAPI

    from sprat.engine.sampling_params import Sampling
    from sprat.tokens.chat import Message

READ_SECONDS = 30.0  # for the whole request body
KEEP_ALIVE_SECONDS = 10.0  # a comment line in a silent stream


@dataclass
class Desk:
    """What the routes share."""

    traffic: Traffic
    name: str
    prices: Prices
    examples: list[str] = field(default_factory=list)
    turns: int | None = None
    max_tokens: int = 1024
    settings: Mapping[str, Any] = field(default_factory=dict)  # of sampling, where a request says nothing
    max_body_bytes: int = 1 << 20
    keyed: bool = False  # strangers ask here: none is told of the others
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def meter(self) -> Meter:
        """The meter that the traffic posts to."""
        return self.traffic.meter


class AnswerStream(StreamingResponse):
    """A streaming response that stops its answer however it ends."""

    def __init__(self, answering: Answering, chunks: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self.answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; a client that went away cancels the answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answering.cancel()


def refuse(error: RequestError) -> JSONResponse:
    """An error as its response, with ``Retry-After`` where trying again makes sense."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def read_body(request: Request, limit: int) -> bytes:
    """The JSON body, read within ``limit`` bytes and ``READ_SECONDS``.

    Raises:
        RequestError: 415 not JSON, 413 too large, 408 too slow.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        message = "the body must be sent as Content-Type: application/json"
        raise RequestError(415, message, param="Content-Type", code="unsupported_media_type")
    too_large = RequestError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise RequestError(408, "the body came too slowly", code="timeout") from None
    return bytes(body)


def _sampling(ask: ChatRequest, desk: Desk, seed: int) -> Sampling:
    """The engine's sampling settings for a request: what it says, else what the model's folder says.

    Raises:
        RequestError: 400; it asks for more tokens than this server gives.
    """
    from sprat.engine.sampling_params import Sampling

    if ask.limit is not None and ask.limit > desk.max_tokens:
        name = ask.names["max_tokens"]
        message = f"{name} is too large: this server gives at most {desk.max_tokens} tokens; lower it or leave it out"
        raise RequestError(400, message, param=name)
    asked = ask.model_dump(include={"temperature", "top_k", "top_p"}, exclude_unset=True, exclude_none=True)
    return Sampling(
        **{**desk.settings, **asked},
        max_tokens=desk.max_tokens if ask.limit is None else ask.limit,
        fit=ask.limit is None,
        seed=seed,
        stop=ask.stops,
        thinking=ask.thinks,
    )


def _messages(ask: ChatRequest) -> list[Message]:
    """The conversation as the chat format's own messages."""
    from sprat.tokens.chat import Message

    return [Message("system" if one.role == "developer" else one.role, one.text) for one in ask.messages]


def _extension(answering: Answering, seed: int) -> dict[str, Any]:
    """The ``sprat`` object of a finished answer."""
    cost = answering.cost.body() if answering.cost is not None else None
    return {"cost": cost, "seed": seed, "seconds": round(answering.seconds, 4)}


async def _left(request: Request) -> None:
    """Wait until the client has gone; its request has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def whole(request: Request, desk: Desk, answering: Answering, name: str, seed: int) -> Response:
    """Wait for the whole answer and send it as one JSON object; a client that leaves ends it at once."""
    text: dict[str, list[str]] = {"reasoning": [], "content": []}
    leaving = asyncio.create_task(_left(request))
    leaving.add_done_callback(lambda _: answering.cancel())
    try:
        async for delta in answering.deltas(KEEP_ALIVE_SECONDS):
            if delta is not None and delta.kind in text:
                text[delta.kind].append(delta.text)
        if leaving.done():
            return Response(status_code=499)
    finally:
        leaving.cancel()
        answering.cancel()
    message = {"role": "assistant", "content": "".join(text["content"])}
    if text["reasoning"]:
        message["reasoning_content"] = "".join(text["reasoning"])
    return JSONResponse(
        {
            "id": name,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": desk.name,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": answering.finish_reason}],
            "usage": answering.usage,
            "sprat": _extension(answering, seed),
        },
        headers={"Cache-Control": "no-store"},
    )


async def stream(ask: ChatRequest, desk: Desk, answering: Answering, name: str, seed: int) -> AsyncIterator[str]:
    """The answer as server-sent events: role, deltas, finish reason, usage where asked for, ``[DONE]``."""
    with_usage = ask.stream_options is not None and bool(ask.stream_options.include_usage)
    head = {"id": name, "object": "chat.completion.chunk", "created": int(time.time()), "model": desk.name}

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        body = {**head, "choices": choices, **({"usage": None} if with_usage else {}), **more}
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def choice(delta: dict[str, Any], finish: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]

    yield event(choice({"role": "assistant", "content": ""}))
    try:
        async for delta in answering.deltas(KEEP_ALIVE_SECONDS):
            if delta is None:
                yield ": keep-alive\n\n"
            elif delta.text and delta.kind in ("reasoning", "content"):
                field_name = "reasoning_content" if delta.kind == "reasoning" else "content"
                yield event(choice({field_name: delta.text}))
    except RequestError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
        return
    last = {"sprat": _extension(answering, seed)}
    yield event(choice({}, answering.finish_reason), **({} if with_usage else last))
    if with_usage:
        yield event([], usage=answering.usage, **last)
    yield "data: [DONE]\n\n"


async def complete(request: Request, desk: Desk) -> Response:
    """``POST /v1/chat/completions``."""
    try:
        ask = parse(await read_body(request, desk.max_body_bytes))
    except ClientDisconnect:
        return Response(status_code=499)
    if ask.model != desk.name:
        message = f"no model {ask.model[:100]!r} here; this server has {desk.name!r}"
        raise RequestError(404, message, param="model", code="model_not_found")
    name = f"chatcmpl-{secrets.token_hex(16)}"
    seed = ask.seed if ask.seed is not None else secrets.randbits(31)
    sampling = _sampling(ask, desk, seed)
    answering = await desk.traffic.admit(name, _messages(ask), sampling, request.state.tenant, ask.names)
    if ask.stream:
        return AnswerStream(answering, stream(ask, desk, answering, name, seed))
    return await whole(request, desk, answering, name, seed)


def model_card(desk: Desk) -> dict[str, Any]:
    """One entry of ``GET /v1/models``; ``sprat`` holds what the page needs to know."""
    prices = desk.prices.model_dump(mode="json")
    extension = {"examples": desk.examples, "turns": desk.turns, "max_tokens": desk.max_tokens, "prices": prices}
    return {"id": desk.name, "object": "model", "created": desk.created, "owned_by": "sprat", "sprat": extension}


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Register all routes on ``app``."""
    page = page_file.read()

    @app.get("/", include_in_schema=False)
    async def chat_page(request: Request) -> Response:
        headers = {"Content-Security-Policy": page.policy, "ETag": page.etag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == page.etag:
            return Response(status_code=304, headers=headers)
        return Response(page.body, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        """Alive, and, where everybody is one tenant, how busy."""
        running, meter = len(desk.traffic.running), desk.meter
        alive = {"status": "closing" if desk.traffic.closed else "ok", "model": desk.name}
        busy = {"running": running, "answered": meter.requests, "nano_yuan": meter.nano_yuan}
        return alive if desk.keyed else {**alive, **busy}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [model_card(desk)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The card of one model."""
        if name != desk.name:
            raise RequestError(404, f"no model {name[:100]!r} here", param="model", code="model_not_found")
        return model_card(desk)

    schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": _schema()}}}}

    @app.post("/v1/chat/completions", openapi_extra=schema)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, whole or as a stream."""
        return await complete(request, desk)

    @app.post("/v1/chat/completions/{name}/cancel", status_code=204)
    async def cancel(request: Request, name: str) -> Response:
        """End a running answer early; its stream still closes with usage and cost."""
        answering = desk.traffic.running.get(name)
        if answering is None or answering.tenant != request.state.tenant:
            raise RequestError(404, "no such answer is running", param="id", code="not_running")
        answering.cancel()
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

    inlined: dict[str, Any] = inline(schema)
    return inlined

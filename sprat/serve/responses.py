"""What a chat completion sends: one JSON object, a stream of server-sent events, or an error.

When the client goes away the request is cancelled. Beside OpenAI's and DeepSeek's fields every answer carries one
extension object, ``sprat``: the cost in nano-yuan, the seed (the same request with this seed gives the same tokens) and
the seconds it took. In a stream it rides on the last chunk.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sprat.serve.admission_pool import StreamingRequest
from sprat.serve.errors import RequestError
from sprat.serve.protocol import ChatRequest

KEEP_ALIVE_SECONDS = 10.0  # a comment line in a silent stream


class EventStreamResponse(StreamingResponse):
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
    headers = error.retry_headers()
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def _extension(stream: StreamingRequest, seed: int) -> dict[str, Any]:
    """The ``sprat`` object of a finished answer."""
    cost = stream.cost.to_dict() if stream.cost is not None else None
    return {"cost": cost, "seed": seed, "seconds": round(stream.seconds, 4)}


async def _wait_for_disconnect(request: Request) -> None:
    """Wait until the client has gone; its request has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def full_response(
    request: Request, model_name: str, stream: StreamingRequest, request_id: str, seed: int
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
            "model": model_name,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": stream.finish_reason}],
            "usage": stream.usage,
            "sprat": _extension(stream, seed),
        },
        headers={"Cache-Control": "no-store"},
    )


async def stream_events(
    chat_request: ChatRequest, model_name: str, stream: StreamingRequest, request_id: str, seed: int
) -> AsyncIterator[str]:
    """The answer as server-sent events: role, deltas, finish reason, usage where asked for, ``[DONE]``."""
    with_usage = chat_request.stream_options is not None and bool(chat_request.stream_options.include_usage)
    head = {"id": request_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model_name}

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

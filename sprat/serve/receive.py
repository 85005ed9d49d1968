"""What a route hears from its caller: the body, within its bound, and that the caller has left."""

from __future__ import annotations

from starlette.requests import Request

from sprat.serve.errors import RequestError


async def read_body(request: Request, limit: int) -> bytes:
    """The JSON body, of at most ``limit`` bytes; how slowly it may come is the connection's affair (``connections``).

    Raises:
        RequestError: 415 not JSON, or compressed; 413 too large.
        ClientDisconnect: the caller left, or was too slow and has been told so.
    """
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        message = "the body must be sent as Content-Type: application/json"
        raise RequestError(415, message, param="Content-Type", code="unsupported_media_type")
    if (encoding := request.headers.get("content-encoding", "identity").strip().lower()) not in ("", "identity"):
        message = f"the body is sent in the encoding {encoding[:40]!r}; send it as it is"
        raise RequestError(415, message, param="Content-Encoding", code="unsupported_media_type")
    too_large = RequestError(413, f"the body is larger than {limit} bytes; shorten it", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


async def disconnected(request: Request) -> None:
    """Wait until the caller has gone; its body has been read. It returns, too, once the answer has been sent.

    At once where the connection was closed or reset; within a second where the caller closed it in full while the
    network said only that no more will be sent; never for one that ended its sending side alone and reads on.
    """
    while (await request.receive())["type"] != "http.disconnect":
        pass

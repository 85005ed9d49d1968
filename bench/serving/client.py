"""A load generator's HTTP: one request a connection, on plain asyncio sockets, and only to this machine.

An SDK would cost more time than the server that is measured. What is timed: to the first piece of an answer, between
pieces, and to the end.
"""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

CHAT = "/v1/chat/completions"
Pairs = dict[str, str]
OnPiece = Callable[[], Awaitable[None]]


@dataclass
class Answer:
    """What came: ``status`` 0 where the connection failed; times in seconds from the start of the request."""

    status: int = 0
    headers: Pairs = field(default_factory=dict)
    body: bytes = b""
    times: list[float] = field(default_factory=list)
    seconds: float = 0.0
    usage: dict[str, Any] | None = None
    done: bool = False
    fault: str = ""

    @property
    def first(self) -> float:
        """Seconds to the first piece; infinite where none came."""
        return self.times[0] if self.times else float("inf")

    @property
    def tokens(self) -> int:
        """Tokens that the server says it wrote."""
        return int(self.usage["completion_tokens"]) if self.usage else 0

    @property
    def well(self) -> bool:
        """Whether it is whole."""
        return self.status == 200 and self.done


def many_files() -> None:
    """Let this process open as many sockets as it may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a server of this machine.

    Raises:
        ValueError: the address is another machine's.
        OSError: nobody listens.
    """
    place = urlsplit(url)
    if place.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(f"{url} is not on this machine")
    return await asyncio.open_connection(place.hostname, place.port, limit=1 << 22)


def head(url: str, path: str, key: str, length: int, method: str = "POST") -> bytes:
    """The head of a request with a JSON body of ``length`` bytes."""
    return (
        f"{method} {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    ).encode()


async def read_head(reader: asyncio.StreamReader) -> tuple[int, Pairs]:
    """Status and headers, names in lower case."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.split(":", 1) for line in lines[1:] if ":" in line)
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, value in pairs}


async def ask(
    url: str,
    body: dict[str, Any] | None,
    *,
    key: str = "",
    path: str = CHAT,
    timeout: float = 120.0,
    leave_after: int | None = None,
    on_piece: OnPiece | None = None,
) -> Answer:
    """Send ``body`` (None: a GET) and read the answer, a stream piece by piece.

    Args:
        leave_after: go away after so many pieces.
        on_piece: awaited after each piece.
    """
    answer, began = Answer(), time.perf_counter()
    writer = None
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await connect(url)
            data = b"" if body is None else json.dumps(body).encode()
            writer.write(head(url, path, key, len(data), "GET" if body is None else "POST") + data)
            await writer.drain()
            answer.status, answer.headers = await read_head(reader)
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                await _read_stream(reader, answer, began, leave_after, on_piece)
            else:
                answer.body = await _read_body(reader, answer.headers)
                answer.times.append(time.perf_counter() - began)
                answer.done = True
                if answer.status == 200 and body is not None:
                    answer.usage = json.loads(answer.body).get("usage")
    except (OSError, EOFError, ValueError, asyncio.IncompleteReadError, TimeoutError) as error:
        answer.fault = f"{type(error).__name__}: {error}"
    finally:
        answer.seconds = time.perf_counter() - began
        if writer is not None:
            writer.close()
    return answer


async def _read_body(reader: asyncio.StreamReader, headers: Pairs) -> bytes:
    """All of a body, whichever way its length is told."""
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    if headers.get("transfer-encoding") != "chunked":
        return await reader.read()
    parts = []
    while size := int(await reader.readline(), 16):
        parts.append(await reader.readexactly(size))
        await reader.readline()
    return b"".join(parts)


async def _lines(reader: asyncio.StreamReader, headers: Pairs) -> AsyncIterator[bytes]:
    """The lines of a body as they come, whichever way it is cut into chunks."""
    chunked, rest = headers.get("transfer-encoding") == "chunked", b""
    while True:
        if chunked:
            size = int(await reader.readline(), 16)
            data = await reader.readexactly(size)
            await reader.readline()
        else:
            data = await reader.read(1 << 16)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line


async def _read_stream(
    reader: asyncio.StreamReader, answer: Answer, began: float, leave_after: int | None, on_piece: OnPiece | None
) -> None:
    """Events as they come.

    Raises:
        ValueError: the stream says that it broke off.
    """
    async for line in _lines(reader, answer.headers):
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            answer.done = True
            return
        event = json.loads(line[6:])
        if event.get("usage"):
            answer.usage = event["usage"]
        if "error" in event:
            raise ValueError(f"the stream broke off: {event['error']}")
        choices = event.get("choices") or [{}]
        delta = choices[0].get("delta") or {}
        if delta.get("content") or delta.get("reasoning_content") or choices[0].get("text"):
            answer.times.append(time.perf_counter() - began)
            if on_piece is not None:
                await on_piece()
            if leave_after is not None and len(answer.times) >= leave_after:
                return


async def metrics(url: str, key: str) -> dict[str, float]:
    """``/metrics`` by name, without a prefix and summed over labels; empty where there is none."""
    answer = await ask(url, None, key=key, path="/metrics", timeout=10)
    if answer.status == 307:
        answer = await ask(url, None, key=key, path="/metrics/", timeout=10)
    found: dict[str, float] = {}
    if answer.status == 200:
        for line in answer.body.decode().splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.partition("{")[0].rpartition(":")[2]
                found[name] = found.get(name, 0.0) + float(value)
    return found


def quantile(values: list[float], share: float) -> float:
    """The value below which ``share`` of ``values`` are; infinite where there are none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("inf")

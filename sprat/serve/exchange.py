"""One HTTP exchange: a body in one protocol becomes answers, and their events a response.

Whoever leaves, before or while the answer comes, ends it at once: the connection is watched from the moment that the
body has been read. A stream that breaks off ends with an error event and without the last chunk of HTTP, so that no
client takes it for whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from sprat.serve.access_log import AccessRecord, log_request
from sprat.serve.answer import Answer
from sprat.serve.errors import BrokenStream, RequestError
from sprat.serve.events import Collector, Event, Failed, Finished, Started, Usage
from sprat.serve.fields import header_list, parse_json
from sprat.serve.generation import Generation
from sprat.serve.openai_chat import Head
from sprat.serve.receive import disconnected, read_body
from sprat.serve.service import Service
from sprat.serve.wires import Batches, Wire

if TYPE_CHECKING:
    from sprat.engine.sequence import Tenant

KEEP_ALIVE_SECONDS = 4.0  # a comment, or a ping, in a silent stream
CLIENT_LEFT = 499  # nobody reads it
_ENDING: set[asyncio.Task[None]] = set()  # exchanges whose answers still end


class Exchange:
    """What one request is answered with.

    Args:
        tenant: whose request it is.
        find: the service that has a model, and 404 where none has.
    """

    def __init__(self, request: Request, wire: Wire, tenant: Tenant, find: Callable[[str], Service]) -> None:
        self.request, self.wire, self._tenant, self._find = request, wire, tenant, find
        request.scope["state"]["is_logged"] = True  # here, when all of it has ended
        self.answers: list[Answer] = []
        self._watch: asyncio.Task[None] | None = None
        self._generations: Sequence[Generation] = ()
        self._model = ""
        self._id = wire.prefix + secrets.token_hex(12)
        self._start_time = time.monotonic()
        self._status, self._code = 200, ""
        self._is_closed = self._streams = False
        self.is_broken = False  # it ended with an error after it had begun

    async def respond(self, max_body_bytes: int) -> Response:
        """The response; the request is logged when all of it has ended.

        Args:
            max_body_bytes: bound of the body.

        Raises:
            RequestError: it cannot be answered.
            ClientDisconnect: nobody waits any more.
        """
        try:
            body = await read_body(self.request, max_body_bytes)
            return await self._respond(parse_json(body), len(body))
        except RequestError as error:
            self._status, self._code = error.status, error.code
            raise
        except ClientDisconnect:
            self._status = CLIENT_LEFT
            raise
        except BaseException:
            self._status, self._code = 500, "internal_error"
            raise
        finally:
            if not self._streams:
                self.close()

    async def _respond(self, body: dict[str, Any], body_bytes: int) -> Response:
        self._model = model if isinstance(model := body.get("model"), str) else ""
        self._generations = self.wire.parse(body)
        self._watch = asyncio.create_task(disconnected(self.request))
        await self._start(body_bytes)
        first = self._generations[0]
        head = Head(self._id, first.model, first.include_usage, body, self._request_id)
        headers = {"Cache-Control": "no-store"}
        if ignored := (*first.ignored, *self._find(first.model).prompts.unmet_wishes(first)):
            headers["x-ignored-fields"] = header_list(ignored)
        if not first.stream:
            return JSONResponse(await self._whole(first, head), headers=headers)
        self._streams = True
        chunks = self.wire.stream(first, self._events(), head, self._extension)
        return EventStream(chunks, self, headers)

    async def _start(self, body_bytes: int) -> None:
        """Have all answers begun; who leaves meanwhile leaves the queue."""
        watch = self._watch
        assert watch is not None
        for index, generation in enumerate(self._generations):
            answer_id = self._id if index == 0 else f"{self._id}-{index}"
            service = self._find(generation.model)
            size = body_bytes // len(self._generations)
            start = asyncio.create_task(service.start(generation, self._tenant, answer_id, size))
            await asyncio.wait({watch, start}, return_when=asyncio.FIRST_COMPLETED)
            if not start.done():
                start.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await start
                raise ClientDisconnect
            self.answers.append(start.result())
        watch.add_done_callback(lambda task: None if task.cancelled() else self.cancel())
        if watch.done():
            self.cancel()

    def cancel(self) -> None:
        """The client has gone."""
        for answer in self.answers:
            answer.cancel("disconnect")

    def close(self) -> None:
        """However it ended: nothing runs on behalf of it any more."""
        if self._is_closed:
            return
        self._is_closed = True
        self.cancel()
        if self._watch is not None:
            self._watch.cancel()
        ending = asyncio.create_task(self._log())
        _ENDING.add(ending)
        ending.add_done_callback(_ENDING.discard)

    @property
    def _request_id(self) -> str:
        return str(self.request.scope["state"].get("request_id", ""))

    async def _log(self) -> None:
        """Write its line when the engine has let go of it: only then the counts are exact."""
        for answer in self.answers:
            await answer.ended.wait()
        log_request(self._record())

    def _record(self) -> AccessRecord:
        answers, first = self.answers, self._generations[0] if self._generations else None
        waits = [answer.queue_seconds for answer in answers if answer.queue_seconds is not None]
        begins = [answer.first_token_seconds for answer in answers if answer.first_token_seconds is not None]
        ended_by = next((answer.ended_by for answer in answers if answer.ended_by), "")
        return AccessRecord(
            request_id=self._request_id,
            tenant=self._tenant.name,
            method=self.request.method,
            path=self.request.url.path,
            status=self._status,
            seconds=time.monotonic() - self._start_time,
            model=self._model,
            stream=first is not None and first.stream,
            prompt_tokens=sum(answer.usage.prompt_tokens for answer in answers),
            cached_tokens=sum(answer.usage.cached_tokens for answer in answers),
            completion_tokens=sum(answer.usage.completion_tokens for answer in answers),
            reasoning_tokens=sum(answer.usage.reasoning_tokens for answer in answers),
            queue_seconds=max(waits, default=None),
            first_token_seconds=min(begins, default=None),
            finish_reason=answers[-1].finish_reason if answers else "",
            ended_by=ended_by or ("disconnect" if self._status == CLIENT_LEFT else ""),
            code=self._code,
        )

    def _extension(self) -> dict[str, Any]:
        """The ``sprat`` object of a finished answer."""
        costs = [answer.cost for answer in self.answers]
        first = self.answers[0]
        body: dict[str, Any] = {"cost": costs[0] if len(costs) == 1 else costs, "seed": first.seed}
        ended_by = next((answer.ended_by for answer in self.answers if answer.ended_by), "")
        return {**body, "seconds": round(max(a.seconds for a in self.answers), 4)} | (
            {"ended_by": ended_by} if ended_by else {}
        )

    async def _whole(self, first: Generation, head: Head) -> dict[str, Any]:
        collector = Collector(first.n * len(self.answers))
        async for batch in self._events():
            for event in batch or ():
                collector.push(event)
        if self._watch is not None and self._watch.done():
            raise ClientDisconnect
        return self.wire.whole(first, collector, head, self._extension())

    async def _events(self) -> Batches:
        """The events of all answers as those of one."""
        if len(self.answers) == 1:
            batches = self.answers[0].events(KEEP_ALIVE_SECONDS)
        else:
            batches = _merged(self.answers, self._generations[0].n)
        async for batch in batches:
            if batch is not None and isinstance(last := batch[-1], Failed):
                self.is_broken, self._code = True, last.error.code
            yield batch


async def _merged(answers: Sequence[Answer], n: int) -> Batches:
    """Several answers, each with ``n`` choices, as one; the first that fails ends all."""
    queue: asyncio.Queue[tuple[int, list[Event] | None]] = asyncio.Queue()

    async def follow(index: int, answer: Answer) -> None:
        async for batch in answer.events(KEEP_ALIVE_SECONDS):
            queue.put_nowait((index, batch))

    tasks = [asyncio.create_task(follow(index, answer)) for index, answer in enumerate(answers)]
    open_answers, started = len(answers), False
    try:
        while open_answers:
            index, batch = await queue.get()
            events: list[Event] = []
            for event in batch or ():
                if isinstance(event, Failed):
                    yield [*events, event]
                    return
                if isinstance(event, Finished):
                    open_answers -= 1
                elif isinstance(event, Started):
                    events += [] if started else [event]
                    started = True
                else:
                    events.append(replace(event, choice=event.choice + index * n))
            if batch is None or events:
                yield events or None
    finally:
        for task in tasks:
            task.cancel()
    usages = [answer.usage for answer in answers]
    names = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
    total = Usage(*(sum(getattr(usage, name) for usage in usages) for name in names))
    yield [Finished(total, max(answer.seconds for answer in answers))]


class EventStream(Response):
    """Server-sent events as they come; however it ends, so does the answer."""

    def __init__(self, chunks: AsyncIterator[str], exchange: Exchange, headers: dict[str, str]) -> None:
        super().__init__(headers={**headers, "X-Accel-Buffering": "no"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._chunks, self._exchange = chunks, exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
            if self._exchange.is_broken:
                raise BrokenStream
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._exchange.close()

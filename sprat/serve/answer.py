"""One answer that the engine works on: follows the engine to the end, and books what that cost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from sprat.errors import SpratError
from sprat.serve.choices import Choice
from sprat.serve.engine_client import EngineDied, JobEvent, JobStream
from sprat.serve.errors import RequestError
from sprat.serve.events import ChoiceFinished, EndedBy, Event, Failed, Finished, Started, Usage
from sprat.serve.generation import Generation
from sprat.serve.prompts import Prompt

if TYPE_CHECKING:
    from sprat.engine.sequence import Tenant
    from sprat.serve.service import Service

log = logging.getLogger(__name__)


class Answer:
    """One request that the engine works on.

    Attributes:
        request_id, tenant, generation: whose and what.
        seed: with which the same request gives the same answer.
        usage: what was computed so far; exact once it has ended, as ``cost`` and ``seconds`` are.
        ended_by: who ended it early.
        queue_seconds, first_token_seconds: from its start to its place, and to its first token; None: it had none.
        finish_reason: of its last choice.
    """

    def __init__(self, service: Service, request_id: str, tenant: Tenant, generation: Generation, seed: int) -> None:
        self.request_id, self.tenant, self.generation, self.seed = request_id, tenant, generation, seed
        self.start_time = time.monotonic()
        self.usage = Usage(0, 0, 0, 0)
        self.ended_by: EndedBy = ""
        self.cost: dict[str, object] | None = None
        self.seconds = 0.0
        self.queue_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.finish_reason = ""
        self.ended = asyncio.Event()
        self._begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._begun.add_done_callback(lambda future: future.cancelled() or future.exception())  # seen, though unread
        self._service = service
        self._job: JobStream | None = None
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._choices: list[Choice] = []
        self._metrics = service.metrics.request_started(service.names.served)

    def cancel(self, ended_by: EndedBy) -> None:
        """End it soon; its last events still come. Harmless once it has ended."""
        if not self.ended.is_set():
            self.ended_by = self.ended_by or ended_by
            if self._job is not None:
                self._job.cancel()

    def reject(self, code: str) -> None:
        """It got no place, or was not begun."""
        self._metrics.rejected(code)

    def admitted(self) -> None:
        """It has a place."""
        self.queue_seconds = time.monotonic() - self.start_time

    def begin(self, prompt: Prompt, job: JobStream) -> None:
        """The engine has it."""
        self._job, self._choices = job, prompt.choices
        if self.ended_by:
            job.cancel()

    async def follow(self) -> None:
        """Translate what the engine says, to its end; books what it cost. Raises nothing."""
        assert self._job is not None
        try:
            async for job_event in self._job:
                for event in self._translate(job_event):
                    self._events.put_nowait(event)
                self._has_begun(None)
            if self.ended_by == "shutdown":
                message = "the server is shutting down"
                raise RequestError(503, message, code="shutting_down", kind="server_error", retry_after=5)
            self._events.put_nowait(self._finish())
        except Exception as error:
            self._fail(error)
        finally:
            self.ended.set()
            self._metrics.cancelled(self.usage.completion_tokens)  # unless it has finished

    def _has_begun(self, error: RequestError | None) -> None:
        """Tell whoever waits for the first event."""
        if self._begun.done():
            return
        if error is None:
            self._begun.set_result(None)
        else:
            self._begun.set_exception(error)

    async def begun(self) -> None:
        """Returns when the engine has begun; raises RequestError where it refuses."""
        await self._begun

    def _fail(self, error: Exception) -> None:
        """It broke off, or was refused before it began."""
        if isinstance(error, EngineDied):
            log.error("an answer broke off: %s", error)
            message = "the engine stopped while it answered; ask again"
            error = RequestError(503, message, code="engine_died", kind="server_error", retry_after=1)
        elif isinstance(error, SpratError):
            error = self._service.refusal(error, self.generation)
        elif not isinstance(error, RequestError):
            log.error("an answer broke off", exc_info=error)
            error = RequestError(500, "the server made a mistake", code="internal_error", kind="server_error")
        if error.status < 500 and not self._begun.done():
            self.reject(error.code)
        elif error.code != "shutting_down":
            self._metrics.failed(self.usage.completion_tokens)
        self._has_begun(error)
        self._events.put_nowait(Failed(error))

    def _translate(self, event: JobEvent) -> Sequence[Event]:
        if event.kind == "started":
            self.usage = Usage(event.prompt_tokens, event.cached_tokens, 0, 0)
            self._metrics.began(event.prompt_tokens, event.cached_tokens)
            return [Started(event.prompt_tokens, event.cached_tokens)]
        if not self._metrics.is_in_step:  # what is there already, a step's events or those of several, comes together
            self._metrics.begin_step()
            asyncio.get_running_loop().call_soon(self._metrics.end_step)
        if event.kind != "done":
            if event.kind != "prompt":
                if self.first_token_seconds is None:
                    self.first_token_seconds = time.monotonic() - self.start_time
                self._metrics.token(max(1, len(event.logprobs)), event.choice)
            return self._choices[event.choice].push(event)
        self._metrics.choice_finished(event.completion_tokens, event.choice)
        usage = self.usage
        self.usage = Usage(
            max(usage.prompt_tokens, event.prompt_tokens),
            usage.cached_tokens,
            usage.completion_tokens + event.completion_tokens,
            usage.reasoning_tokens + event.reasoning_tokens,
        )
        events = self._choices[event.choice].finish(event, self.ended_by)
        self.finish_reason = next(each.reason for each in events if isinstance(each, ChoiceFinished))
        return events

    def _finish(self) -> Finished:
        usage, self.seconds = self.usage, time.monotonic() - self.start_time
        hit, miss = usage.cached_tokens, usage.prompt_tokens - usage.cached_tokens
        cost = self._service.meter.record(hit=hit, miss=miss, output=usage.completion_tokens)
        self.cost = cost.to_dict()
        if not self.ended_by:
            self._metrics.finished(usage.completion_tokens, self.finish_reason)
        if self._service.on_usage is not None:
            self._service.on_usage(self)
        return Finished(usage, self.seconds, self.cost)

    async def events(self, idle_seconds: float) -> AsyncIterator[list[Event] | None]:
        """All events that are there, as they come; None after each ``idle_seconds`` without one. Ends by itself."""
        while True:
            try:
                batch = [await asyncio.wait_for(self._events.get(), idle_seconds)]
            except TimeoutError:
                yield None
                continue
            while not self._events.empty():
                batch.append(self._events.get_nowait())
            yield batch
            if isinstance(batch[-1], Finished | Failed):
                return

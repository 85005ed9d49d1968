"""From a ``Generation`` to its events: a place, a prompt, a job for the engine, and what comes back.

One answer passes these rooms in order: its model is looked up; it is counted and waits for a place (``admission``);
its prompt is written and tokenised in a thread (``prompts``); the engine takes it; a task follows the engine's events
to the end, whether anybody still listens or not, so that what was computed is booked and the place is given back when
the *engine* has let go. Readers take events from a queue.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from sprat.errors import EngineError, SpratError
from sprat.serve.admission import Admission, Place
from sprat.serve.choices import Choice
from sprat.serve.engine_client import EngineClient, EngineDied, Job, JobEvent, JobStream
from sprat.serve.errors import RequestError
from sprat.serve.events import EndedBy, Event, Failed, Finished, Started, Usage
from sprat.serve.generation import Generation
from sprat.serve.meter import Meter
from sprat.serve.metrics import Metrics
from sprat.serve.prompts import Prompt, PromptWriter

if TYPE_CHECKING:
    from sprat.engine.sequence import Tenant

log = logging.getLogger(__name__)
RENDER_THREADS = 2
SETTINGS = frozenset(
    ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    + ("logit_bias", "seed", "stop", "min_tokens", "ignore_eos", "stop_token_ids", "top_logprobs", "tools")
    + ("max_tokens", "max_think_tokens", "thinking", "response_format")
)  # of the engine, which the caller knows by the same name unless ``Generation.paths`` says another
_T = TypeVar("_T")


class Answer:
    """One request that the engine works on.

    Attributes:
        request_id, tenant, generation: whose and what.
        model: the name that the caller gave.
        seed: with which the same request gives the same answer.
        usage: what was computed so far; exact once it has ended, as ``cost`` and ``seconds`` are.
        ended_by: who ended it early.
    """

    def __init__(self, service: Service, request_id: str, tenant: Tenant, generation: Generation, seed: int) -> None:
        self.request_id, self.tenant, self.generation, self.seed = request_id, tenant, generation, seed
        self.start_time = time.monotonic()
        self.usage = Usage(0, 0, 0, 0)
        self.ended_by: EndedBy = ""
        self.cost: dict[str, object] | None = None
        self.seconds = 0.0
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
        self._has_begun(error)
        self._events.put_nowait(Failed(error))

    def _translate(self, event: JobEvent) -> Sequence[Event]:
        if event.kind == "started":
            self.usage = Usage(event.prompt_tokens, event.cached_tokens, 0, 0)
            self._metrics.began(event.prompt_tokens, event.cached_tokens)
            return [Started(event.prompt_tokens, event.cached_tokens)]
        if event.kind != "done":
            self._metrics.token(1, event.choice)
            return self._choices[event.choice].push(event)
        usage = self.usage
        self.usage = Usage(
            max(usage.prompt_tokens, event.prompt_tokens),
            usage.cached_tokens,
            usage.completion_tokens + event.completion_tokens,
            usage.reasoning_tokens + event.reasoning_tokens,
        )
        return self._choices[event.choice].finish(event, self.ended_by)

    def _finish(self) -> Finished:
        usage, self.seconds = self.usage, time.monotonic() - self.start_time
        hit, miss = usage.cached_tokens, usage.prompt_tokens - usage.cached_tokens
        cost = self._service.meter.record(hit=hit, miss=miss, output=usage.completion_tokens)
        self.cost = cost.to_dict()
        if not self.ended_by:
            self._metrics.finished(usage.completion_tokens)
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


@dataclass(frozen=True)
class Names:
    """What a request may give as its model: the served name, other names of it, and adapters (``base:adapter`` too)."""

    served: str
    aliases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()

    def all(self) -> tuple[str, ...]:
        """Every name, the served one first; adapters as ``served:adapter``."""
        return (self.served, *self.aliases, *(f"{self.served}:{adapter}" for adapter in self.adapters))

    def adapter(self, model: str) -> str | None:
        """The adapter that ``model`` means, None for the model alone.

        Raises:
            RequestError: 404, no such model.
        """
        if model in (self.served, *self.aliases):
            return None
        base, _, adapter = model.rpartition(":")
        if adapter in self.adapters and base in ("", self.served, *self.aliases):
            return adapter
        message = f"The model {model[:100]!r} does not exist here"
        raise RequestError(404, message, param="model", code="model_not_found")

    def has(self, model: str) -> bool:
        """Whether ``model`` is one of them; an adapter may be named without its base."""
        base, _, adapter = model.rpartition(":")
        names = (self.served, *self.aliases)
        return model in names or (adapter in self.adapters and base in ("", *names))

    def parent(self, model: str) -> str | None:
        """The model that an adapter's name stands beside; None for the model itself."""
        return None if model in (self.served, *self.aliases) else self.served


class Service:
    """Answers generations with one engine.

    Args:
        on_usage: called once for each answer, before its last event can be read.
    """

    def __init__(
        self,
        engine: EngineClient,
        prompts: PromptWriter,
        admission: Admission,
        meter: Meter,
        metrics: Metrics,
        names: Names,
        on_usage: Callable[[Answer], None] | None = None,
    ) -> None:
        self.engine, self.prompts, self.admission = engine, prompts, admission
        self.meter, self.metrics, self.names = meter, metrics, names
        self.answers: dict[str, Answer] = {}
        self.closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(RENDER_THREADS, thread_name_prefix="sprat-prompt")
        self._on_usage = on_usage

    async def run_in_thread(self, work: Callable[[], _T]) -> _T:
        """Do what takes the processor (writing and tokenising prompts) beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def start(self, generation: Generation, tenant: Tenant, request_id: str, body_bytes: int) -> Answer:
        """Admit a request and hand it to the engine; returns when the engine has begun, or refused it.

        Args:
            body_bytes: of the request, from which its tokens are guessed before anything is done for it.

        Raises:
            RequestError: 404 no such model; 400 it cannot be answered; 429 or 503 no place; 503 the engine is down.
            asyncio.CancelledError: the caller has gone; the answer is cancelled.
        """
        adapter = self.names.adapter(generation.model)
        if not self.engine.alive:
            message = "the engine is being started again; try again in a moment"
            raise RequestError(503, message, code="engine_not_ready", kind="server_error", retry_after=2)
        asked = generation.sampling.get("seed")
        seed = asked if isinstance(asked, int) else secrets.randbits(31)
        answer = Answer(self, request_id, tenant, generation, seed)
        try:
            place = await self.admission.enter(
                tenant.name, tokens=body_bytes // 4, seqs=generation.n, generation=generation
            )
        except RequestError as error:
            answer.reject(error.code)
            raise
        except BaseException:
            answer.reject("disconnect")
            raise
        try:
            self.answers[request_id] = answer
            prompt = await self.run_in_thread(lambda: self.prompts.write(generation, seed))
            job = Job(prompt.ids, prompt.samplings, tenant, adapter)
            answer.begin(prompt, self.engine.submit(job))
        except BaseException as error:
            self._leave(answer, place)
            answer.reject("invalid_request")
            if isinstance(error, SpratError):
                raise self.refusal(error, generation) from error
            raise
        task = asyncio.create_task(answer.follow())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._leave(answer, place))
        try:
            await answer.begun()
        except asyncio.CancelledError:
            answer.cancel("disconnect")
            raise
        return answer

    def _leave(self, answer: Answer, place: Place) -> None:
        """Give the place back."""
        place.charge(answer.usage.prompt_tokens - answer.usage.cached_tokens + answer.usage.completion_tokens)
        place.leave()
        if self.answers.pop(answer.request_id, None) is not None and self._on_usage is not None:
            self._on_usage(answer)

    def refusal(self, error: SpratError, generation: Generation) -> RequestError:
        """What the engine or a chat format refuses, in the caller's words."""
        if not isinstance(error, EngineError):
            log.error("a request failed: %s", error)
            return RequestError(500, str(error), code="engine_error", kind="server_error")
        paths: Mapping[str, str] = generation.paths
        where = error.where
        if where == "response":  # the grammar: of the form, or of the tools
            has_form = generation.response_format is not None
            where = "tools" if not has_form else "response" if "response" in paths else "response_format"
        param = paths.get(where) or (where if where in SETTINGS else paths.get("messages", "messages"))
        text = str(EngineError(error.what, where=param, todo=error.todo))
        return RequestError(400, text, param=param, code="not_possible")

    async def embed(self, prompts: Sequence[Sequence[int]], model: str) -> list[list[float]]:
        """Pooled hidden states of prompts; RequestError where the engine cannot."""
        try:
            return await self.engine.embed(prompts, self.names.adapter(model))
        except EngineError as error:
            raise RequestError(400, str(error), param="model", code="not_offered") from error
        except SpratError as error:
            raise RequestError(503, str(error), code="engine_died", kind="server_error", retry_after=1) from error

    async def drain(self, timeout: float) -> None:
        """Admit nobody more, refuse whoever waits, and let running answers finish within ``timeout`` seconds."""
        self.closed = True
        self.admission.close()
        pending = list(self._tasks)
        if pending:
            await asyncio.wait(pending, timeout=timeout)
        self.abort()

    def abort(self) -> None:
        """End whatever still runs."""
        self.closed = True
        self.admission.close()
        for answer in list(self.answers.values()):
            answer.cancel("shutdown")

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

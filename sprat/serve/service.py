"""From a ``Generation`` to its events: a place, a prompt, a job for the engine, and what comes back.

One answer passes these rooms in order: its model is looked up; it is counted and waits for a place (``admission``);
its prompt is written and tokenised in a thread (``prompts``); the engine takes it; a task follows the engine's events
to the end, whether anybody still listens or not, so that what was computed is booked and the place is given back when
the *engine* has let go. Readers take events from a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from sprat.errors import EngineError, SpratError
from sprat.serve.admission import LONGEST_RETRY_SECONDS, Admission, Place
from sprat.serve.answer import Answer
from sprat.serve.engine_client import EngineClient, EngineDied, Job
from sprat.serve.errors import RequestError
from sprat.serve.generation import Generation
from sprat.serve.meter import Meter
from sprat.serve.metrics import Metrics
from sprat.serve.prompts import PromptWriter

if TYPE_CHECKING:
    from sprat.engine.response import Response
    from sprat.engine.sequence import Tenant

log = logging.getLogger(__name__)
RENDER_THREADS = 2
KNOWN_GRAMMARS = 64  # as many as an engine keeps; one that it has given up is compiled while its place is held
FAULT_OF_THE_ENGINE = "engine"  # where an error happened that no caller can mend, and whose text is for the log
NO_MEMORY = "KV cache"  # where it happened that there was less memory than the engine had counted on
MEMORY_RETRY_SECONDS = 5.0
SETTINGS = frozenset(
    ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    + ("logit_bias", "seed", "stop", "min_tokens", "ignore_eos", "stop_token_ids", "top_logprobs", "tools")
    + ("max_tokens", "max_think_tokens", "thinking", "response_format")
)  # of the engine, which the caller knows by the same name unless ``Generation.paths`` says another
_T = TypeVar("_T")


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
        admission: of answers.
        compiling: of grammars that the engine does not know yet.
        on_usage: called once for each answer that ended in order, before its last event can be read.
    """

    def __init__(
        self,
        engine: EngineClient,
        prompts: PromptWriter,
        admission: Admission,
        compiling: Admission,
        meter: Meter,
        metrics: Metrics,
        names: Names,
        on_usage: Callable[[Answer], None] | None = None,
    ) -> None:
        self.engine, self.prompts, self.admission = engine, prompts, admission
        self.compiling = compiling
        self.meter, self.metrics, self.names = meter, metrics, names
        self.answers: dict[str, Answer] = {}
        self.closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(RENDER_THREADS, thread_name_prefix="sprat-prompt")
        self.on_usage = on_usage
        self._grammars: OrderedDict[tuple[Tenant, Response], None] = OrderedDict()  # that the engine has compiled
        self._faults: OrderedDict[tuple[Tenant, Response], EngineError] = OrderedDict()  # of texts of custom tools

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
            raise self._not_ready()
        asked = generation.sampling.get("seed")
        seed = asked if isinstance(asked, int) else secrets.randbits(31)
        answer = Answer(self, request_id, tenant, generation, seed)
        try:
            await self._compile(generation, tenant)
            place = await self.admission.enter(
                tenant.name, tokens=body_bytes // 4, seqs=generation.n, generation=generation
            )
        except RequestError as error:
            answer.reject(error.code)
            raise
        except SpratError as error:
            refused = self.refusal(error, generation)
            answer.reject(refused.code)
            raise refused from error
        except BaseException:
            answer.reject("disconnect")
            raise
        answer.admitted()
        try:
            self.answers[request_id] = answer
            prompt = await self.run_in_thread(lambda: self.prompts.write(generation, seed))
            job = Job(prompt.ids, prompt.samplings, tenant, adapter)
            answer.begin(prompt, self.engine.submit(job))
        except BaseException as error:
            self._leave(answer, place)
            if isinstance(error, SpratError):
                error = self.refusal(error, generation)
            answer.reject(error.code if isinstance(error, RequestError) else "disconnect")
            raise error
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

    async def _compile(self, generation: Generation, tenant: Tenant) -> None:
        """Have the grammar of a request compiled before it gets a place: nobody's place is held for that.

        Whoever compiles is counted as whoever waits is, and a tenant compiles one grammar at a time.

        Raises:
            RequestError: too many wait for theirs.
            SpratError: the grammar cannot be used, or the engine died.
        """
        if generation.response_format is None and not generation.tools:
            return
        generation = self.prompts.without_unused_tools(generation)
        response, known = self.prompts.response(generation), self._grammars
        if response is None or (tenant, response) in known:
            return
        async with self.compiling.place(tenant.name, tokens=0, generation=generation):
            for text, path in self.prompts.text_grammars(generation):
                if (error := await self._fault_of(text, tenant)) is not None:
                    at = {"tools": path, "response_format": path}
                    raise self.refusal(error, replace(generation, paths={**generation.paths, **at}))
            await self.engine.compile(response, tenant)
        known[tenant, response] = None
        if len(known) > KNOWN_GRAMMARS:
            known.popitem(last=False)

    async def _fault_of(self, text: Response, tenant: Tenant) -> EngineError | None:
        """Why a grammar cannot be used; an engine says so once, and of a grammar that it knows only with the answer."""
        faults, key = self._faults, (tenant, text)
        if key not in faults:
            try:
                await self.engine.compile(text, tenant)
                return None
            except EngineError as error:
                faults[key] = error
                if len(faults) > KNOWN_GRAMMARS:
                    faults.popitem(last=False)
        return faults[key]

    def _leave(self, answer: Answer, place: Place) -> None:
        """Give the place back."""
        place.charge(answer.usage.prompt_tokens - answer.usage.cached_tokens + answer.usage.completion_tokens)
        place.leave()
        self.answers.pop(answer.request_id, None)

    def refusal(self, error: SpratError, generation: Generation) -> RequestError:
        """What the engine or a chat format refuses, in the caller's words."""
        if (fault := _fault_of_the_server(error)) is not None:
            return fault
        paths: Mapping[str, str] = generation.paths
        where = error.where
        if where == "response":  # the grammar: of the form, or of the tools
            where = "tools" if generation.response_format is None else "response_format"
        param = paths.get(where) or (where if where in SETTINGS else paths.get("messages", "messages"))
        text = str(EngineError(error.what, where=param, todo=error.todo))
        return RequestError(400, text, param=param, code="not_possible")

    def _not_ready(self) -> RequestError:
        """What a request is told while the engine is down; it is counted."""
        message, retry_after = "the engine is being started again; try again in a moment", 2.0
        if self.engine.stalled:
            message = "the engine does not get on, and is started again if that lasts; try again in a moment"
        if self.engine.failure is not None:
            message = "the engine is down and is not started again; whoever runs this server has to start it anew"
            retry_after = LONGEST_RETRY_SECONDS
        self.metrics.model(self.names.served).rejected("engine_not_ready")
        return RequestError(503, message, code="engine_not_ready", kind="server_error", retry_after=retry_after)

    async def embed(self, prompts: Sequence[Sequence[int]], model: str, tenant: Tenant) -> list[list[float]]:
        """Pooled hidden states of prompts, admitted and counted as one request.

        Raises:
            RequestError: 400 the engine cannot; 429 or 503 no place; 500 its fault; 503 the engine is down, or has no
                memory.
        """
        adapter, tokens = self.names.adapter(model), sum(map(len, prompts))
        if not self.engine.alive:
            raise self._not_ready()
        metrics = self.metrics.request_started(self.names.served)
        try:
            async with self.admission.place(tenant.name, tokens=tokens) as place:
                metrics.began(tokens, None)
                vectors = await self.engine.embed(prompts, adapter, tenant)
                place.charge(tokens)
            metrics.finished(0)
        except RequestError as error:
            metrics.rejected(error.code)
            raise
        except SpratError as error:
            if (fault := _fault_of_the_server(error)) is not None:
                metrics.failed()
                raise fault from error
            metrics.rejected("not_offered")
            raise RequestError(400, str(error), param="model", code="not_offered") from error
        finally:
            metrics.cancelled()  # unless it has ended
        return vectors

    async def drain(self, timeout: float) -> None:
        """Admit nobody more, refuse whoever waits, and let running answers finish within ``timeout`` seconds."""
        self.closed = True
        self.admission.close()
        self.compiling.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.admission.drained(), timeout)
        self.abort()

    def abort(self) -> None:
        """End whatever still runs."""
        self.closed = True
        self.admission.close()
        self.compiling.close()
        for answer in list(self.answers.values()):
            answer.cancel("shutdown")

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _fault_of_the_server(error: SpratError) -> RequestError | None:
    """What a caller is told of an error that is not its own doing; None: it is."""
    if isinstance(error, EngineDied):
        message = "the engine stopped before it answered; ask again"
        return RequestError(503, message, code="engine_died", kind="server_error", retry_after=1)
    if error.where == NO_MEMORY:
        log.error("a request failed: %s", error)
        message = "the server has no memory for this request; try again later"
        retry_after = MEMORY_RETRY_SECONDS
        return RequestError(503, message, code="out_of_memory", kind="server_error", retry_after=retry_after)
    if not isinstance(error, EngineError) or error.where == FAULT_OF_THE_ENGINE:
        log.error("a request failed: %s", error)
        return RequestError(500, "the engine made a mistake; ask again", code="engine_error", kind="server_error")
    return None

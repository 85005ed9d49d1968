"""The engine's side of jobs, for both engine clients: commands come in at any time, the events of a step go out as one.

One thread, the engine's own, steps and does nothing else. Commands are followed in the thread that brings them, and
none of them takes longer than a moment: a grammar that nobody has compiled yet goes to another thread, and its job
begins when it is ready. A tenant has one such thread at a time and they take turns, so the many grammars of one cost
another one turn; a job that was cancelled meanwhile is not compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from sprat.engine.backend import BLOCK_SIZE
from sprat.engine.engine import Engine
from sprat.engine.response import Response
from sprat.engine.sequence import Delta, Tenant
from sprat.engine.sequence import Sequence as Request
from sprat.engine.stats import Stats
from sprat.errors import EngineError, SpratError
from sprat.serve.engine_client import EngineDied, EngineInfo, Job, JobEvent, TokenLogprob
from sprat.serve.engine_compiling import CompilingThreads
from sprat.serve.engine_jobs import Notice

EMBEDDING_THREADS = 8  # they wait for the engine


@dataclass(eq=False)
class RunningJob:
    """A job on its way.

    Attributes:
        cancel: set, the engine ends its requests with the next step.
        queued: the engine has its requests, and all events come from there.
        ended: nothing more is said of it.
        unfinished: choices that are not done.
        scored: choices of which the prompt's log-probabilities were sent.
    """

    number: int
    job: Job
    unfinished: int
    cancel: threading.Event = field(default_factory=threading.Event)
    queued: bool = False
    started: bool = False
    ended: bool = False
    scored: set[int] = field(default_factory=set)


class EngineWorker:
    """An engine that works on jobs. Any thread may command it.

    Args:
        engine: stepped and ended from here; it may answer others meanwhile.
        send: gets the events of one step, or of one command; called in several threads.
    """

    def __init__(self, engine: Engine, send: Callable[[list[Notice]], None]) -> None:
        self.engine, self._send = engine, send
        self._lock = threading.Lock()  # of the table of jobs; the engine is asked to queue under it, never to step
        self._jobs: dict[int, RunningJob] = {}
        self._stopping = False
        self._notices: list[Notice] = []  # of this step; touched by the thread that steps
        self._num_steps = 0
        self._compiling, self._uncompiled = CompilingThreads(), set[Future[None]]()
        self._embedding = ThreadPoolExecutor(EMBEDDING_THREADS, thread_name_prefix="sprat-embed")

    def info(self) -> EngineInfo:
        """What the engine can."""
        limits, vocab_size = self.engine.limits, self.engine.tokenizer.vocab_size
        adapters = tuple(adapter.name for adapter in self.engine.backend.adapters)
        return EngineInfo(limits.context, limits.num_blocks * BLOCK_SIZE, limits.max_batch, vocab_size, adapters)

    def start(self) -> None:
        """Step from now on."""
        self.engine.start(self._end_step)

    def step_mark(self) -> int | None:
        """Which step it is at; None while there is nothing to do. Takes no lock: who asks must not hang with it."""
        return self._num_steps if self.engine.busy else None

    def stop(self) -> None:
        """End all jobs as cancelled, and the engine; returns when their last events were sent."""
        with self._lock:
            self._stopping = True
            numbers = list(self._jobs)
        for number in numbers:
            self.cancel(number)
        self._embedding.shutdown(wait=False, cancel_futures=True)  # whoever began later would step by itself
        self.engine.stop()
        self._flush()
        self._compiling.stop()
        self._embedding.shutdown()
        for compiled in list(self._uncompiled):
            compiled.set_exception(_stopping())

    def submit(self, number: int, job: Job) -> None:
        """Take a job under a number of its own; what is wrong with it is sent."""
        running = RunningJob(number, job, len(job.samplings))
        with self._lock:
            stopping = self._stopping
            if not stopping:
                self._jobs[number] = running
        if stopping:
            self._send([(number, _stopping())])
            return
        prepare = functools.partial(self._prepare, running)
        if any(self.engine.must_compile(sampling, job.tenant) for sampling in job.samplings):
            self._compiling.submit(job.tenant, prepare)
        else:
            prepare()

    def cancel(self, number: int) -> None:
        """End a job with the next step; nothing happens if it is unknown or has ended."""
        with self._lock:
            running = self._jobs.get(number)
            if running is None:
                return
            running.cancel.set()
            if running.queued:
                return
            self._forget(running)
        prompt_tokens = len(running.job.prompt_ids)
        self._send(
            [
                (number, JobEvent("done", choice, prompt_tokens=prompt_tokens, finish_reason="cancelled"))
                for choice in range(len(running.job.samplings))
            ]
        )

    def stats(self) -> Stats:
        """What the engine has done and holds; jobs whose grammar is being compiled wait too."""
        stats = self.engine.stats()
        compiling = sum(running.unfinished for running in list(self._jobs.values()) if not running.queued)
        return dataclasses.replace(stats, waiting=stats.waiting + compiling)

    def compile(self, response: Response, tenant: Tenant) -> Future[None]:
        """See ``EngineClient.compile``."""
        compiled: Future[None] = Future()
        if self.engine.compile(response, tenant, wait=False):
            compiled.set_result(None)
            return compiled

        def work() -> None:
            try:
                self.engine.compile(response, tenant)
            except Exception as error:
                compiled.set_exception(self._as_sprat_error(error))
            else:
                compiled.set_result(None)
            self._uncompiled.discard(compiled)

        self._uncompiled.add(compiled)
        self._compiling.submit(tenant, work)
        return compiled

    def embed(self, prompts: Sequence[Sequence[int]], tenant: Tenant, adapter: str | None) -> Future[list[list[float]]]:
        """See ``EngineClient.embed``; those that have not begun when the engine is stopped are cancelled."""

        def work() -> list[list[float]]:
            try:
                return self.engine.embed(prompts, adapter, tenant=tenant)
            except Exception as error:
                raise self._as_sprat_error(error) from None

        return self._embedding.submit(work)

    def _prepare(self, running: RunningJob) -> None:
        """Make requests of a job and queue them, unless it was cancelled before."""
        if running.ended:
            return
        job = running.job
        try:
            requests = self.engine.prepare(job.prompt_ids, job.samplings, job.tenant, job.adapter, running.cancel)
        except Exception as error:
            self._refuse(running, self._as_sprat_error(error))
            return
        listeners = [functools.partial(self._hear, running, request, n) for n, request in enumerate(requests)]
        with self._lock:
            if not running.ended:
                running.queued = True
                self.engine.enqueue(requests, listeners)

    def _refuse(self, running: RunningJob, error: SpratError) -> None:
        """End a job that the engine does not have."""
        with self._lock:
            if running.ended:
                return
            self._forget(running)
        self._send([(running.number, error)])

    def _hear(self, running: RunningJob, request: Request, choice: int, delta: Delta | Exception) -> None:
        """Take note of what the engine says of one choice; in the thread that steps, its books are locked."""
        if running.ended:
            return
        number = running.number
        if isinstance(delta, Exception):
            running.cancel.set()  # the other choices
            self._forget(running)
            self._notices.append((number, self._as_sprat_error(delta)))
            return
        if delta.kind == "started":
            if not running.started:
                running.started = True
                prompt, cached = len(request.prompt_ids), request.num_cached
                self._notices.append((number, JobEvent("started", prompt_tokens=prompt, cached_tokens=cached)))
            return
        if request.sampling.prompt_logprobs and choice not in running.scored:
            running.scored.add(choice)
            if len(request.prompt_logprobs) == len(request.prompt_ids) - 1:  # it was not cancelled before
                self._notices.append((number, JobEvent("prompt", choice, logprobs=_prompt_logprobs(request))))
        if delta.output is not None:
            running.unfinished -= 1
            if not running.unfinished:
                self._forget(running)
            self._notices.append((number, _done(choice, delta)))
        else:
            self._notices.append((number, JobEvent(delta.kind, choice, delta.text, delta.logprobs)))

    def _forget(self, running: RunningJob) -> None:
        """Nothing more is said of a job."""
        running.ended = True
        self._jobs.pop(running.number, None)

    def _end_step(self) -> None:
        """After each step, also one that failed."""
        self._num_steps += 1
        self._flush()

    def _as_sprat_error(self, error: Exception) -> SpratError:
        """``error`` as one of ours; whatever breaks while the engine is stopped breaks of that."""
        if self._stopping:
            return _stopping()
        if isinstance(error, SpratError):
            return error
        fault = f"the request broke: {type(error).__name__}: {error}"
        return EngineError(fault, where="engine", todo="ask again; if it stays, report it with --debug")

    def _flush(self) -> None:
        """Send what a step gave."""
        if self._notices:
            notices, self._notices = self._notices, []
            self._send(notices)


def _prompt_logprobs(request: Request) -> tuple[TokenLogprob, ...]:
    """What the tokens of a prompt were worth; the first one stands behind nothing."""
    first, *ids = request.prompt_ids
    tops = request.prompt_top_logprobs or [[]] * len(ids)
    rows = zip(ids, request.prompt_logprobs, tops, strict=True)
    return ((first, None, ()), *((token, logprob, tuple(top)) for token, logprob, top in rows))


def _done(choice: int, delta: Delta) -> JobEvent:
    """The last event of a choice."""
    output = delta.output
    assert output is not None
    usage = output.usage
    return JobEvent(
        "done",
        choice,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cache_hit_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        finish_reason=output.finish_reason,
        stop=output.stop,
    )


def _stopping() -> EngineDied:
    """Why nothing more is answered."""
    return EngineDied("the engine is being stopped", where="engine", todo="start it again")

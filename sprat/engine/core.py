"""The heart of the engine: ``step`` = schedule → run → postprocess, and the books of all requests in flight.

A step that fails, for whatever reason and at whatever point, leaves books that nobody should trust. So they are not
mended: the requests that ran fail with the reason, those that wait keep their place, and everything in between
(blocks, slots, prefix index) is made anew.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from sprat.engine.backend import Backend
from sprat.engine.cache.blocks import Blocks
from sprat.engine.cache.disk import DiskCache
from sprat.engine.cache.prefix import BlockKeys
from sprat.engine.postprocess import postprocess
from sprat.engine.request import RequestHandle
from sprat.engine.runner import Runner
from sprat.engine.sampling.sampler import Sampler
from sprat.engine.scheduling.scheduler import Scheduler
from sprat.engine.sequence import EngineLimits, FinishReason, ScheduledStep, Sequence
from sprat.engine.speculation import Speculation
from sprat.engine.stats import Stats
from sprat.errors import EngineError, SpratError
from sprat.tokens import Tokenizer


class EngineCore:
    """Requests in flight. One lock guards the books, another lets only one step run at a time.

    Args:
        eos_token_ids: ids that end any answer.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        keys: BlockKeys,
        eos_token_ids: frozenset[int],
        limits: EngineLimits,
        speculation: Speculation,
        disk: DiskCache | None,
    ) -> None:
        self.backend, self.speculation = backend, speculation
        self._tokenizer, self._keys, self._eos_token_ids = tokenizer, keys, eos_token_ids
        self._limits, self._disk = limits, disk
        self.handles: dict[int, RequestHandle] = {}
        self.cancellation = threading.Event()
        self._cancel_events: Counter[threading.Event] = Counter()
        self._lock, self._stepping = threading.Lock(), threading.Lock()
        self._counters: Counter[str] = Counter()
        self._steps = self._sampled = 0
        self._seconds = 0.0
        self._version = 0
        self._reset()

    def step(self) -> list[RequestHandle]:
        """Move every request on; the requests that finished thereby.

        Raises:
            EngineError: the model's logits are not finite, or the back end failed.
        """
        with self._stepping:
            try:
                with self._lock:
                    step = self._schedule()
                if not step.decoding and not step.chunks:
                    return []
                result = self.runner.run(step)
                with self._lock:
                    ended, accepted = postprocess(step, result, self.runner, self.handles, self._eos_token_ids)
                    self._steps += 1
                    self._sampled += len(result.sequences)
                    self._seconds += result.seconds
                    self._sampled -= sum(not sequence.max_tokens for sequence in ended)
                    finished = self._finish(ended) if ended else []
                self.speculation.update(step, result, accepted)
                return finished
            except BaseException as error:
                reason = _as_sprat_error(error)
                self._fail_step(reason)
                if isinstance(error, Exception) and reason is not error:
                    raise reason from error
                raise

    def add_requests(self, handles: list[RequestHandle]) -> None:
        """Queue requests; no step comes between them, so that siblings find each other."""
        with self._lock:
            for handle in handles:
                self.handles[handle.id] = handle
                self.scheduler.add(handle.sequence)
                if handle.sequence.cancel_event is not None:
                    self._cancel_events[handle.sequence.cancel_event] += 1

    def update_weights(self, write: Callable[[], None], version: int) -> None:
        """See ``Engine``."""
        with self._stepping, self._lock:
            self.scheduler.preempt_all()
            write()
            for handle in self.handles.values():
                sequence = handle.sequence
                sequence.versions = sequence.versions or [(0, self._version)]
                sequence.versions.append((len(sequence.output_ids), version))
            self._version = version

    def flush(self) -> None:
        """Write what is known of prompts to the disk tier, if there is one."""
        with self._stepping, self._lock:
            self.scheduler.blocks.flush()

    def stats(self) -> Stats:
        """What was done so far, and what is held now."""
        with self._lock:
            blocks, running = self.scheduler.blocks, len(self.scheduler.running)
            return Stats(
                running=running,
                waiting=len(self.handles) - running,
                blocks=self.backend.num_blocks,
                blocks_used=blocks.used,
                blocks_cached=blocks.cached,
                block_bytes=self.backend.block_bytes,
                steps=self._steps,
                sampled_tokens=self._sampled + self.speculation.accepted,
                prompt_tokens=self._counters["prompt"],
                cached_tokens=self._counters["cached"],
                preemptions=self._counters["preemptions"] + self.scheduler.num_preemptions,
                drafted_tokens=self.speculation.drafted,
                accepted_tokens=self.speculation.accepted,
                model_seconds=self._seconds,
            )

    def check(self) -> list[str]:
        """Faults of the books, none if all is well."""
        with self._stepping, self._lock:
            known = [sequence.id for sequence in [*self.scheduler.running, *self.scheduler.queue.waiting]]
            faults = self.scheduler.check()
            if sorted(known) != sorted(self.handles):
                faults.append(f"requests {sorted(set(known) ^ set(self.handles))} are lost or double")
            if not set(self.speculation.ngram_tables) <= set(self.handles):
                faults.append("n-gram tables of requests that left are still there")
            return faults

    def _reset(self) -> None:
        """Make cache, scheduler and runner anew, empty."""
        self.scheduler = Scheduler(Blocks(self.backend, self._limits, self._disk), self._keys, self._limits)
        sampler = Sampler(self._tokenizer, self._limits.max_batch, self._eos_token_ids)
        self.runner = Runner(self.backend, self.scheduler, sampler)

    def _schedule(self) -> ScheduledStep:
        """Let cancelled requests go, and choose what the next step computes."""
        scheduler = self.scheduler
        if self.cancellation.is_set() or (self._cancel_events and any(event.is_set() for event in self._cancel_events)):
            self.cancellation.clear()
            cancelled = [s for s in [*scheduler.running, *scheduler.queue.waiting] if s.is_cancelled]
            self._finish(cancelled, "cancelled")
        step = scheduler.schedule()
        for sequence in scheduler.take_unschedulable():
            fault = f"{sequence.num_tokens} tokens do not fit into the memory that there is"
            error = EngineError(fault, where="KV cache", todo="shorten the prompt, or free memory")
            self._pop_handle(sequence).fail(error)
        for chunk in step.chunks:
            self.handles[chunk.sequence.id].start()
        if step.decoding:
            self.speculation.propose(step, scheduler, self.runner.sampler)
        return step

    def _finish(self, sequences: list[Sequence], reason: FinishReason | None = None) -> list[RequestHandle]:
        """Finish requests (``reason``: instead of their own) and free what they hold; those that are not failed."""
        finished = []
        for sequence in sequences:
            if sequence.slot >= 0:
                self.runner.sampler.remove(sequence.slot)
            self.scheduler.remove(sequence)
            handle = self._pop_handle(sequence)
            if not handle.finished.is_set():
                handle.finish(reason or sequence.finish_reason or "stop")
                finished.append(handle)
            self._counters["prompt"] += len(sequence.prompt_ids) * (sequence.num_cached >= 0)
            self._counters["cached"] += max(0, sequence.num_cached)
        if not self.handles and not self._limits.frozen:
            self.scheduler.blocks.clear_prefix_index()
        return finished

    def _pop_handle(self, sequence: Sequence) -> RequestHandle:
        """The handle of a request that leaves; nothing else is kept of it."""
        self.speculation.ngram_tables.pop(sequence.id, None)
        if sequence.cancel_event is not None:
            self._cancel_events[sequence.cancel_event] -= 1
            if not self._cancel_events[sequence.cancel_event]:
                del self._cancel_events[sequence.cancel_event]
        return self.handles.pop(sequence.id)

    def _fail_step(self, reason: SpratError) -> None:
        """Give ``reason`` to all requests of the step, and begin anew with those that wait."""
        with self._lock:
            waiting = {sequence.id: sequence for sequence in self.scheduler.queue.waiting if sequence.slot < 0}
            failed = [handle for request_id, handle in self.handles.items() if request_id not in waiting]
            if not failed:  # the fault is not in a running request, so it would come again
                failed, waiting = list(self.handles.values()), {}
            self._counters["preemptions"] += self.scheduler.num_preemptions
            self._reset()
            for handle in failed:
                self._pop_handle(handle.sequence)
                handle.fail(reason)
            for request_id in sorted(waiting):
                self.scheduler.add(waiting[request_id])


def _as_sprat_error(error: BaseException) -> SpratError:
    """``error`` as one of ours."""
    if isinstance(error, SpratError):
        return error
    if isinstance(error, Exception):
        fault = f"the step failed: {type(error).__name__}: {error}"
        return EngineError(fault, where="engine", todo="ask again; if it stays, report it with --debug")
    return EngineError("the engine was interrupted", where="engine", todo="ask again")

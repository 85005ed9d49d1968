"""The heart of the engine: ``step`` = schedule → run → settle, and the books of all requests in flight.

A step that fails, for whatever reason and at whatever point, leaves books that nobody should trust. So they are not
mended: the requests that ran fail with the reason, those that wait keep their place, and everything in between
(blocks, slots, prefix index) is made anew.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sprat.engine.backend import Backend
from sprat.engine.blocks import Blocks
from sprat.engine.disk import Disk
from sprat.engine.draft import Speculation
from sprat.engine.handle import Handle
from sprat.engine.plan import Plan
from sprat.engine.prefix import Keys
from sprat.engine.runner import Runner
from sprat.engine.sample import Sampler
from sprat.engine.scheduler import Scheduler
from sprat.engine.sequence import FinishReason, Sequence
from sprat.engine.settle import settle
from sprat.engine.stats import Stats
from sprat.errors import EngineError, SpratError
from sprat.tokens import Tokenizer


@dataclass(frozen=True)
class Room:
    """How much there is of everything.

    Attributes:
        slots: requests that run together at most.
        step_tokens: tokens of one step, about.
        blocks: blocks of memory at most.
        width: blocks of the longest table.
        frozen: the weights never change, so blocks are kept while nobody asks.
    """

    slots: int
    step_tokens: int
    blocks: int
    width: int
    frozen: bool


class Core:
    """Requests in flight. One lock guards the books, another lets only one step run at a time.

    Args:
        ends: ids that end any answer.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        keys: Keys,
        ends: frozenset[int],
        room: Room,
        speculation: Speculation,
        disk: Disk | None,
    ) -> None:
        self.backend, self.speculation = backend, speculation
        self._tokenizer, self._keys, self._ends, self._room, self._disk = tokenizer, keys, ends, room, disk
        self.handles: dict[int, Handle] = {}
        self.halts = threading.Event()
        self._events: Counter[threading.Event] = Counter()
        self._lock, self._stepping = threading.Lock(), threading.Lock()
        self._counts: Counter[str] = Counter()
        self._steps = self._sampled = 0
        self._seconds = 0.0
        self._build()

    def step(self) -> list[Handle]:
        """Move every request on; the requests that finished thereby.

        Raises:
            EngineError: the model's logits are not finite, or the back end failed.
        """
        with self._stepping:
            try:
                with self._lock:
                    plan = self._schedule()
                if plan.empty:
                    return []
                result = self.runner.run(plan)
                with self._lock:
                    ended, accepted = settle(plan, result, self.runner, self.handles, self._ends)
                    self._steps += 1
                    self._sampled += len(result.rows)
                    self._seconds += result.seconds
                    done = self._let_go(ended) if ended else []
                self.speculation.follow(plan, result, accepted)
                return done
            except BaseException as error:
                reason = _clear(error)
                self._fail(reason)
                if isinstance(error, Exception) and reason is not error:
                    raise reason from error
                raise

    def enter(self, sequences: Iterable[Sequence], drive: Callable[[], bool], *, streams: bool) -> list[Handle]:
        """Queue requests; no step comes between them, so that twins find each other."""
        handles = [Handle(one, self._tokenizer, drive, self.halts, streams=streams) for one in sequences]
        with self._lock:
            for handle in handles:
                self.handles[handle.id] = handle
                self.scheduler.add(handle.sequence)
                if handle.sequence.event is not None:
                    self._events[handle.sequence.event] += 1
        return handles

    def spill(self) -> None:
        """Write what is known of prompts to the disk tier, if there is one."""
        with self._stepping, self._lock:
            self.scheduler.blocks.spill()

    def stats(self) -> Stats:
        """What was done so far, and what is held now."""
        with self._lock:
            blocks, running = self.scheduler.blocks, len(self.scheduler.running)
            return Stats(
                running=running,
                waiting=len(self.handles) - running,
                blocks=self.backend.blocks,
                blocks_held=blocks.used,
                blocks_cached=blocks.cached,
                block_bytes=self.backend.block_bytes,
                steps=self._steps,
                sampled_tokens=self._sampled + self.speculation.accepted,
                prompt_tokens=self._counts["prompt"],
                hit_tokens=self._counts["hit"],
                preempted=self._counts["preempted"] + self.scheduler.preempted,
                drafted_tokens=self.speculation.drafted,
                accepted_tokens=self.speculation.accepted,
                model_seconds=self._seconds,
            )

    def check(self) -> list[str]:
        """Faults of the books, none if all is well."""
        with self._stepping, self._lock:
            known = [sequence.id for sequence in [*self.scheduler.running, *self.scheduler.tenants.waiting]]
            faults = self.scheduler.check()
            if sorted(known) != sorted(self.handles):
                faults.append(f"requests {sorted(set(known) ^ set(self.handles))} are lost or double")
            return faults

    def _build(self) -> None:
        """Make the rooms, empty."""
        room = self._room
        blocks = Blocks(self.backend, room.blocks, room.slots, room.width, self._disk)
        self.scheduler = Scheduler(blocks, self._keys, room.slots, room.step_tokens, tails=room.frozen)
        self.runner = Runner(self.backend, self.scheduler, Sampler(self._tokenizer, room.slots, self._ends))

    def _schedule(self) -> Plan:
        """Let cancelled requests go, and choose what the next step computes."""
        scheduler = self.scheduler
        if self.halts.is_set() or (self._events and any(event.is_set() for event in self._events)):
            self.halts.clear()
            halted = [one for one in [*scheduler.running, *scheduler.tenants.waiting] if one.halted]
            self._let_go(halted, "cancelled")
        plan = scheduler.plan()
        for sequence in scheduler.doomed():
            fault = f"{sequence.length} tokens do not fit into the memory that there is"
            error = EngineError(fault, where="KV cache", todo="shorten the prompt, or free memory")
            self._forget(sequence).fail(error)
        if plan.rows:
            self.speculation.propose(plan, scheduler, self.runner.sampler)
        return plan

    def _let_go(self, sequences: list[Sequence], reason: FinishReason | None = None) -> list[Handle]:
        """Finish requests (``reason``: instead of their own) and free what they hold; those that are not failed."""
        done = []
        for sequence in sequences:
            if sequence.slot >= 0:
                self.runner.sampler.close(sequence.slot)
            self.scheduler.remove(sequence)
            handle = self._forget(sequence)
            if not handle.finished.is_set():
                handle.finish(reason or sequence.finish_reason or "stop")
                done.append(handle)
            self._counts["prompt"] += len(sequence.prompt) * (sequence.hit >= 0)
            self._counts["hit"] += max(0, sequence.hit)
        if not self.handles and not self._room.frozen:
            self.scheduler.blocks.forget()
        return done

    def _forget(self, sequence: Sequence) -> Handle:
        """The handle of a request that leaves."""
        if sequence.event is not None:
            self._events[sequence.event] -= 1
            if not self._events[sequence.event]:
                del self._events[sequence.event]
        return self.handles.pop(sequence.id)

    def _fail(self, reason: SpratError) -> None:
        """Give ``reason`` to all requests of the step, and begin anew with those that wait."""
        with self._lock:
            waiting = {sequence.id: sequence for sequence in self.scheduler.tenants.waiting if sequence.slot < 0}
            failed = [handle for number, handle in self.handles.items() if number not in waiting]
            if not failed:  # the fault is not in a running request, so it would come again
                failed, waiting = list(self.handles.values()), {}
            self._counts["preempted"] += self.scheduler.preempted
            self._build()
            for handle in failed:
                self._forget(handle.sequence)
                handle.fail(reason)
            for number in sorted(waiting):
                self.scheduler.add(waiting[number])


def _clear(error: BaseException) -> SpratError:
    """``error`` as one of ours."""
    if isinstance(error, SpratError):
        return error
    if isinstance(error, Exception):
        fault = f"the step failed: {type(error).__name__}: {error}"
        return EngineError(fault, where="engine", todo="ask again; if it stays, report it with --debug")
    return EngineError("the engine was interrupted", where="engine", todo="ask again")

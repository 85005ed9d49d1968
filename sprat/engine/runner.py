"""One step of computing: a plan becomes one ``Batch``, the back end's logits become samples.

Whatever a sequence does in this step, it has so many new tokens at such positions: one for an answer that goes on, a
few more where drafts are checked, many for a piece of a prompt. They are laid one behind the other by whole-array
operations; where nothing but answers go on, as in almost every step, the arrays of the last step are used again, and
where only likeliest tokens are wanted, no logits come back.

S sequences, T new tokens, A of them of answers, N new answers, R rows of logits or samples, W blocks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sprat.engine.backend import Backend, Batch
from sprat.engine.draw import not_finite
from sprat.engine.plan import FEW, At, Plan, add_at, put_at
from sprat.engine.sample import Sampler, Samples
from sprat.engine.scheduler import Scheduler
from sprat.engine.sequence import Sequence


@dataclass(slots=True)
class Result:
    """What a step gave: the sequences that got tokens, and the samples.

    Attributes:
        rows: sequences in the order of their rows of ``samples``; one that had drafts has as many more rows.
        at: their slots, as an index.
        seconds: that the back end took.
    """

    rows: list[Sequence]
    at: At
    samples: Samples
    batch: Batch
    seconds: float


@dataclass(frozen=True)
class Answers:
    """The part of a batch that answers have: A tokens of S sequences, all of them wanted.

    Attributes:
        ahead_A: drafted tokens before each; None if there are none.
    """

    tokens_A: NDArray[np.int32]
    positions_A: NDArray[np.int32]
    slots_A: NDArray[np.int64]
    ahead_A: NDArray[np.int64] | None
    counts_S: NDArray[np.int64]


@dataclass(slots=True)
class Steady:
    """The batch of plain steps, used again in place while the same answers go on in the same blocks.

    Attributes:
        slots_S, version: the slots, and the state of the tables, that it was made for.
        rows: all of its rows, as an index.
        said: what the last step sampled.
    """

    batch: Batch
    slots_S: NDArray[np.int64]
    version: int
    rows: At
    said: list[int]


class Runner:
    """Between the books and the back end."""

    def __init__(self, backend: Backend, scheduler: Scheduler, sampler: Sampler) -> None:
        self.backend, self.scheduler, self.sampler = backend, scheduler, sampler
        self.last = np.zeros(len(scheduler.at), np.int32)  # by slot: the token sampled last, not yet in memory
        self._steady: Steady | None = None

    def run(self, plan: Plan) -> Result:
        """Compute a plan and sample from it. Every row is booked with one token; drafts that hold add to that.

        Raises:
            EngineError: the model's logits are not finite.
        """
        if not plan.chunks and not plan.drafts:
            return self._run_plain(plan)
        self._leave()
        scheduler, answers = self.scheduler, self._answers(plan)
        batch = self._compose(plan, answers)
        logits_RV, seconds = self._compute(batch)
        scheduler.stored[plan.slots_S] += 1
        starting = scheduler.computed(plan.chunks)
        new = [sequence for group in starting for sequence in group]
        for sequence in new:
            self.sampler.open(sequence.slot, sequence)
        slots_N = np.array([sequence.slot for sequence in new], np.int64)
        samples = self._sample(plan, answers, logits_RV, [len(group) for group in starting], slots_N)
        if not plan.drafts:
            self.last[plan.slots_S] = samples.tokens_R[: len(plan.rows)]
        self.last[slots_N] = samples.tokens_R[len(samples.tokens_R) - len(new) :]
        return Result(plan.rows + new, np.concatenate((plan.slots_S, slots_N)), samples, batch, seconds)

    def _run_plain(self, plan: Plan) -> Result:
        """``run`` for one token of each answer: what almost every step is.

        The weights have washed this code and its objects out of the processor's caches since the last step, so what
        counts here is how much memory is touched: where the same answers go on, their batch is used again in place.
        """
        slots_S, scheduler, sampler, steady = plan.slots_S, self.scheduler, self.sampler, self._steady
        if steady is None or steady.slots_S is not slots_S or steady.version != scheduler.blocks.version:
            self._leave()
            steady = self._steady = self._enter(slots_S)
        else:
            put_at(steady.batch.tokens_T, steady.rows, steady.said)
            add_at(steady.batch.positions_T, steady.rows, 1)
        if sampler.plain(slots_S):
            began = time.perf_counter()
            tokens_S = self.backend.best(steady.batch, sampler.vocab)
            seconds, samples = time.perf_counter() - began, Samples(tokens_S)
            if min(samples.tokens) < 0:
                if max(samples.tokens) < 0:
                    raise not_finite()
                samples.faults = {row: not_finite() for row, token in enumerate(samples.tokens) if token < 0}
        else:
            logits_RV, seconds = self._compute(steady.batch)
            samples = sampler.sample(logits_RV, slots_S)
        add_at(scheduler.stored, plan.at, 1)
        steady.said = samples.tokens
        return Result(plan.rows, plan.at, samples, steady.batch, seconds)

    def _enter(self, slots_S: NDArray[np.int64]) -> Steady:
        """The batch of the answers in these slots."""
        count = len(slots_S)
        starts_S = np.arange(count + 1, dtype=np.int32)
        batch = Batch(
            self.last[slots_S], self.scheduler.stored[slots_S], starts_S, self._tables(slots_S), starts_S[:-1]
        )
        rows = list(range(count)) if count <= FEW else np.arange(count)
        return Steady(batch, slots_S, self.scheduler.blocks.version, rows, [])

    def _leave(self) -> None:
        """Let go of the batch of plain steps; what it sampled last is told to ``last``."""
        if self._steady is not None and self._steady.said:
            self.last[self._steady.slots_S] = self._steady.said
        self._steady = None

    def _compute(self, batch: Batch) -> tuple[Tensor, float]:
        """Logits, and how long they took."""
        began = time.perf_counter()
        logits_RV = self.backend.run(batch)
        return logits_RV, time.perf_counter() - began

    def _answers(self, plan: Plan) -> Answers:
        """The tokens of all answers: the one that was sampled last, and its drafts."""
        slots_S = plan.slots_S
        last_S, stored_S = self.last[slots_S], self.scheduler.stored[slots_S]
        if not plan.drafts:
            return Answers(last_S, stored_S, slots_S, None, np.ones(len(slots_S), np.int64))
        tokens: list[int] = []  # drafts are for a few rows, where lists are faster
        positions: list[int] = []
        slots: list[int] = []
        ahead: list[int] = []
        counts: list[int] = []
        for slot, last, place in zip(slots_S.tolist(), last_S.tolist(), stored_S.tolist(), strict=True):
            new = [last, *plan.drafts.get(slot, ())]
            tokens += new
            positions += range(place, place + len(new))
            slots += [slot] * len(new)
            ahead += range(len(new))
            counts.append(len(new))
        wide, narrow = np.int64, np.int32
        return Answers(
            np.array(tokens, narrow), np.array(positions, narrow), np.array(slots, wide), np.array(ahead, wide),
            np.array(counts, wide),
        )  # fmt: skip

    def _compose(self, plan: Plan, answers: Answers) -> Batch:
        """The batch of answers, and behind them pieces of prompts."""
        tokens, positions, counts = [answers.tokens_A], [answers.positions_A], [answers.counts_S]
        wanted, slots, end = [np.arange(len(answers.tokens_A))], [plan.slots_S], len(answers.tokens_A)
        for chunk in plan.chunks:
            stop, end = chunk.start + chunk.count, end + chunk.count
            tokens.append(chunk.sequence.known[chunk.start : stop])
            positions.append(np.arange(chunk.start, stop, dtype=np.int32))
            counts.append(np.array([chunk.count]))
            slots.append(np.array([chunk.sequence.slot]))
            wanted += [np.array([end - 1])] if chunk.last else []
        counts_S = np.concatenate(counts)
        starts_S = np.zeros(len(counts_S) + 1, np.int32)
        np.cumsum(counts_S, out=starts_S[1:])
        return Batch(
            tokens_T=np.concatenate(tokens),
            positions_T=np.concatenate(positions),
            starts_S=starts_S,
            tables_SW=self._tables(np.concatenate(slots)),
            wanted_R=np.concatenate(wanted).astype(np.int32),
        )

    def _tables(self, slots_S: NDArray[np.int64]) -> NDArray[np.int32]:
        """The tables of these slots, as wide as the longest."""
        blocks = self.scheduler.blocks
        return np.ascontiguousarray(blocks.tables[slots_S, : blocks.held[slots_S].max(initial=0)])

    def _sample(
        self, plan: Plan, answers: Answers, logits_RV: Tensor, groups: list[int], slots_N: NDArray[np.int64]
    ) -> Samples:
        """Sample the rows of all answers, and for each prompt that is whole a token for each of its twins."""
        rows, slots_R = len(answers.slots_A), np.concatenate((answers.slots_A, slots_N))
        if not len(slots_R):
            return Samples(slots_R)
        if len(slots_N) > len(groups):  # twins read the same row of logits
            index_R = np.concatenate((np.arange(rows), rows + np.repeat(np.arange(len(groups)), groups)))
            logits_RV = logits_RV[torch.from_numpy(index_R).to(logits_RV.device)]
        if answers.ahead_A is None:
            return self.sampler.sample(logits_RV, slots_R)
        ahead_R = np.concatenate((answers.ahead_A, np.zeros(len(slots_N), np.int64)))
        return self.sampler.sample(logits_RV, slots_R, ahead_R, plan.drafts)

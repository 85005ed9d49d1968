"""One step of computing: a plan becomes one ``Batch``, the back end's logits become samples.

Whatever a sequence does in this step, it has so many new tokens at such positions: one for an answer that goes on, a
few more where drafts are checked, many for a piece of a prompt. They are laid one behind the other by whole-array
operations; where nothing but answers go on, as in almost every step, what did not change since the last step (starts,
tables, wanted rows) is used again.

S sequences, T new tokens, R rows of logits or samples, W blocks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sprat.engine.backend import Backend, Batch
from sprat.engine.plan import Plan
from sprat.engine.sample import Sampler, Samples
from sprat.engine.scheduler import Scheduler
from sprat.engine.sequence import Sequence


@dataclass(frozen=True)
class Result:
    """What a step gave: the sequences that got tokens, and the samples.

    Attributes:
        rows: sequences in the order of their rows of ``samples``; one that had drafts has as many more rows.
        slots_S: their slots.
        seconds: that the back end took.
    """

    rows: list[Sequence]
    slots_S: NDArray[np.int64]
    samples: Samples
    batch: Batch
    seconds: float


class Runner:
    """Between the books and the back end."""

    def __init__(self, backend: Backend, scheduler: Scheduler, sampler: Sampler) -> None:
        self.backend, self.scheduler, self.sampler = backend, scheduler, sampler
        self.last = np.zeros(len(scheduler.at), np.int32)  # by slot: the token sampled last, not yet in memory
        self._slots_S: NDArray[np.int64] | None = None  # of these slots are the tables, as they were at this version
        self._version = -1
        self._starts_S = np.zeros(1, np.int32)
        self._tables_SW = np.zeros((0, 0), np.int32)

    def run(self, plan: Plan) -> Result:
        """Compute a plan and sample from it. Every row is booked with one token; drafts that hold add to that.

        Raises:
            EngineError: the model's logits are not finite.
        """
        scheduler = self.scheduler
        simple = not plan.chunks and not plan.drafts
        batch = self._again(plan) if simple else self._compose(plan)
        began = time.perf_counter()
        logits_RV = self.backend.run(batch)
        seconds = time.perf_counter() - began
        scheduler.stored[plan.slots_S] += 1
        if simple:
            samples = self.sampler.sample(logits_RV, plan.slots_S)
            self.last[plan.slots_S] = samples.tokens_R
            return Result(plan.rows, plan.slots_S, samples, batch, seconds)
        starting = scheduler.computed(plan.chunks)
        new = [sequence for group in starting for sequence in group]
        for sequence in new:
            self.sampler.open(sequence.slot, sequence)
        slots_N = np.array([sequence.slot for sequence in new], np.int64)
        samples = self._sample(plan, logits_RV, starting, slots_N)
        if not plan.drafts:
            self.last[plan.slots_S] = samples.tokens_R[: len(plan.rows)]
        self.last[slots_N] = samples.tokens_R[len(samples.tokens_R) - len(new) :]
        return Result(plan.rows + new, np.concatenate((plan.slots_S, slots_N)), samples, batch, seconds)

    def _again(self, plan: Plan) -> Batch:
        """The batch of one token for each answer."""
        slots_S, version = plan.slots_S, self.scheduler.blocks.version
        if self._slots_S is not slots_S or self._version != version:
            if len(self._starts_S) != len(slots_S) + 1:
                self._starts_S = np.arange(len(slots_S) + 1, dtype=np.int32)
            self._tables_SW = self._tables(slots_S)
            self._slots_S, self._version = slots_S, version
        starts_S = self._starts_S
        tokens_S, positions_S = self.last[slots_S], self.scheduler.stored[slots_S]
        return Batch(tokens_S, positions_S, starts_S, self._tables_SW, starts_S[:-1])

    def _compose(self, plan: Plan) -> Batch:
        """The batch of any plan: answers first, then pieces of prompts."""
        scheduler, chunks, decoding = self.scheduler, plan.chunks, len(plan.rows)
        counts_S = np.concatenate((self._counts(plan), [chunk.count for chunk in chunks])).astype(np.int64)
        first_S = np.concatenate((scheduler.stored[plan.slots_S], [chunk.start for chunk in chunks])).astype(np.int64)
        starts_S = np.zeros(len(counts_S) + 1, np.int32)
        np.cumsum(counts_S, out=starts_S[1:])
        positions_T = np.arange(starts_S[-1]) + np.repeat(first_S - starts_S[:-1], counts_S)
        tokens_T = np.empty(len(positions_T), np.int32)
        tokens_T[starts_S[:decoding]] = self.last[plan.slots_S]
        for row, slot in enumerate(plan.slots_S.tolist()) if plan.drafts else ():
            tokens_T[starts_S[row] + 1 : starts_S[row + 1]] = plan.drafts.get(slot, ())
        for row, chunk in enumerate(chunks, decoding):
            tokens_T[starts_S[row] : starts_S[row + 1]] = chunk.sequence.known[chunk.start : chunk.start + chunk.count]
        ended = [starts_S[row] - 1 for row, chunk in enumerate(chunks, decoding + 1) if chunk.last]
        wanted_R = np.concatenate((np.arange(starts_S[decoding]), ended)).astype(np.int32)
        slots_S = np.concatenate((plan.slots_S, [chunk.sequence.slot for chunk in chunks])).astype(np.int64)
        return Batch(tokens_T, positions_T.astype(np.int32), starts_S, self._tables(slots_S), wanted_R)

    def _tables(self, slots_S: NDArray[np.int64]) -> NDArray[np.int32]:
        """The tables of these slots, as wide as the longest."""
        blocks = self.scheduler.blocks
        width = int(blocks.held[slots_S].max(initial=0))
        return np.ascontiguousarray(blocks.tables[slots_S, :width])

    def _sample(
        self, plan: Plan, logits_RV: Tensor, starting: list[list[Sequence]], slots_N: NDArray[np.int64]
    ) -> Samples:
        """Sample the rows of all answers, and for each prompt that is whole a token for each of its twins."""
        counts_S = self._counts(plan)
        rows = int(counts_S.sum())
        slots_R = np.concatenate((np.repeat(plan.slots_S, counts_S), slots_N))
        if not len(slots_R):
            return Samples(slots_R)
        if len(slots_N) > len(starting):  # twins read the same row of logits
            twin_N = np.repeat(np.arange(len(starting)), [len(group) for group in starting])
            index_R = np.concatenate((np.arange(rows), rows + twin_N))
            logits_RV = logits_RV[torch.from_numpy(index_R).to(logits_RV.device)]
        if not plan.drafts:
            return self.sampler.sample(logits_RV, slots_R)
        ahead_R = np.zeros(len(slots_R), np.int64)
        ahead_R[:rows] = np.arange(rows) - np.repeat(np.cumsum(counts_S) - counts_S, counts_S)
        return self.sampler.sample(logits_RV, slots_R, ahead_R, plan.drafts)

    def _counts(self, plan: Plan) -> NDArray[np.int64]:
        """New tokens of each answer: one, and its drafts."""
        counts_S = np.ones(len(plan.rows), np.int64)
        if plan.drafts:
            counts_S += [len(plan.drafts.get(slot, ())) for slot in plan.slots_S.tolist()]
        return counts_S

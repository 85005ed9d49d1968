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
from sprat.engine.plan import At, Plan, add_at, places, put_at
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


@dataclass(frozen=True, slots=True)
class Answers:
    """The part of a batch that answers have: A tokens of S sequences, all of them wanted.

    Attributes:
        ahead_A: drafted tokens before each; None if there are none.
        counts: tokens of each sequence; none where each has one.
    """

    tokens_A: NDArray[np.int32]
    positions_A: NDArray[np.int32]
    slots_A: NDArray[np.int64]
    ahead_A: NDArray[np.int64] | None
    counts: list[int]


@dataclass(slots=True)
class Steady:
    """The batch of a step without prompts, used again in place while the same answers go on with as many drafts.

    Attributes:
        slots_S, version: the slots, and the state of the tables, that it was made for.
        rows: all of its rows, as an index.
        said: what the last step sampled.
    """

    batch: Batch
    answers: Answers
    slots_S: NDArray[np.int64]
    version: int
    rows: At
    said: list[int]


class Runner:
    """Between the books and the back end."""

    def __init__(self, backend: Backend, scheduler: Scheduler, sampler: Sampler) -> None:
        self.backend, self.scheduler, self.sampler = backend, scheduler, sampler
        self._steady: Steady | None = None

    def run(self, plan: Plan) -> Result:
        """Compute a plan and sample from it. Every row is booked with one token; drafts that hold add to that.

        Raises:
            EngineError: the model's logits are not finite.
        """
        if not plan.chunks:
            return self._run_answers(plan)
        self._steady = None
        scheduler, answers = self.scheduler, self._answers(plan, self._counts(plan))
        batch = self._compose(plan, answers)
        logits_RV, seconds = self._compute(batch)
        scheduler.stored[plan.slots_S] += 1
        starting = scheduler.computed(plan.chunks)
        new = [sequence for group in starting for sequence in group]
        for sequence in new:
            self.sampler.open(sequence.slot, sequence)
        slots_N = np.array([sequence.slot for sequence in new], np.int64)
        samples = self._sample(plan, answers, logits_RV, [len(group) for group in starting], slots_N)
        return Result(plan.rows + new, np.concatenate((plan.slots_S, slots_N)), samples, batch, seconds)

    def _run_answers(self, plan: Plan) -> Result:
        """``run`` for one token of each answer and its drafts: what almost every step is.

        The weights have washed this code and its objects out of the processor's caches since the last step, so what
        counts here is how much memory is touched: where the same answers go on, their batch is used again in place.
        """
        sampler, steady = self.sampler, self._refill(plan)
        answers = steady.answers
        if sampler.plain(answers.slots_A):
            began = time.perf_counter()
            tokens_A = self.backend.best(steady.batch, sampler.vocab)
            seconds, samples = time.perf_counter() - began, Samples(tokens_A)
            if min(samples.tokens) < 0:
                if max(samples.tokens) < 0:
                    raise not_finite()
                samples.faults = {row: not_finite() for row, token in enumerate(samples.tokens) if token < 0}
        else:
            logits_RV, seconds = self._compute(steady.batch)
            samples = sampler.sample(logits_RV, answers.slots_A, answers.ahead_A, plan.drafts)
        add_at(self.scheduler.stored, plan.at, 1)
        steady.said = samples.tokens
        return Result(plan.rows, plan.at, samples, steady.batch, seconds)

    def _refill(self, plan: Plan) -> Steady:
        """The batch of all answers and their drafts."""
        steady, version, counts = self._steady, self.scheduler.blocks.version, self._counts(plan)
        if (
            steady is None
            or steady.slots_S is not plan.slots_S
            or steady.version != version
            or steady.answers.counts != counts
        ):
            answers = self._answers(plan, counts)
            rows = places(len(answers.tokens_A))
            steady = self._steady = Steady(self._compose(plan, answers), answers, plan.slots_S, version, rows, [])
        elif counts:
            tokens, positions = _drafted(plan)
            put_at(steady.batch.tokens_T, steady.rows, tokens)
            put_at(steady.batch.positions_T, steady.rows, positions)
        else:
            put_at(steady.batch.tokens_T, steady.rows, steady.said)
            add_at(steady.batch.positions_T, steady.rows, 1)
        return steady

    def _compute(self, batch: Batch) -> tuple[Tensor, float]:
        """Logits, and how long they took."""
        began = time.perf_counter()
        logits_RV = self.backend.run(batch)
        return logits_RV, time.perf_counter() - began

    def _counts(self, plan: Plan) -> list[int]:
        """Tokens of each answer, see ``Answers``."""
        drafts = plan.drafts
        return [1 + len(drafts.get(sequence.slot, ())) for sequence in plan.rows] if drafts else []

    def _answers(self, plan: Plan, counts: list[int]) -> Answers:
        """The tokens of all answers: the one that was sampled last, and its drafts."""
        slots_S = plan.slots_S
        if not counts:
            last_S = np.array([sequence.token_ids[-1] for sequence in plan.rows], np.int32)
            return Answers(last_S, self.scheduler.stored[slots_S], slots_S, None, counts)
        tokens, positions = _drafted(plan)
        ahead_A = np.array([ahead for count in counts for ahead in range(count)], np.int64)
        last_A, place_A = np.array(tokens, np.int32), np.array(positions, np.int32)
        return Answers(last_A, place_A, np.repeat(slots_S, counts), ahead_A, counts)

    def _compose(self, plan: Plan, answers: Answers) -> Batch:
        """The batch of answers, and behind them pieces of prompts."""
        tokens, positions, slots = [answers.tokens_A], [answers.positions_A], plan.slots_S.tolist()
        counts, wanted = answers.counts or [1] * len(slots), list(range(len(answers.tokens_A)))
        end = len(wanted)
        for chunk in plan.chunks:
            stop, end = chunk.start + chunk.count, end + chunk.count
            tokens.append(chunk.sequence.known[chunk.start : stop])
            positions.append(np.arange(chunk.start, stop, dtype=np.int32))
            counts = [*counts, chunk.count]
            slots.append(chunk.sequence.slot)
            wanted += [end - 1] if chunk.last else []
        blocks = self.scheduler.blocks
        return Batch(
            tokens_T=np.concatenate(tokens),
            positions_T=np.concatenate(positions),
            starts_S=np.cumsum([0, *counts], dtype=np.int32),
            tables_SW=np.ascontiguousarray(blocks.tables[slots, : blocks.held[slots].max(initial=0)]),
            wanted_R=np.array(wanted, np.int32),
        )

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


def _drafted(plan: Plan) -> tuple[list[int], list[int]]:
    """Tokens of all answers with their drafts, and their positions; these rows are few, so lists are faster."""
    tokens: list[int] = []
    positions: list[int] = []
    for sequence in plan.rows:
        place = sequence.length - 1
        new = [sequence.token_ids[-1], *plan.drafts.get(sequence.slot, ())]
        tokens += new
        positions += range(place, place + len(new))
    return tokens, positions

"""One step of computing: a scheduled step becomes one ``Batch``, the back end's logits become samples.

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
from sprat.engine.routes import record_routes, room_for_routes, share_routes
from sprat.engine.sampling.ops import Integers, add_at, not_finite, put_at, row_index
from sprat.engine.sampling.sampler import Sampler, SamplerOutput
from sprat.engine.scheduling.scheduler import Scheduler
from sprat.engine.scoring import score_prompts
from sprat.engine.sequence import ScheduledStep, Sequence, SlotIndex


@dataclass(slots=True)
class StepResult:
    """What a step gave: the sequences that got tokens, and the samples.

    Attributes:
        sequences: in the order of their rows of ``samples``; one that had drafts has as many more rows.
        slot_index: their slots, as an index.
        seconds: that the back end took.
    """

    sequences: list[Sequence]
    slot_index: SlotIndex
    samples: SamplerOutput
    batch: Batch
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """The part of a batch that answers have: A tokens of S sequences; the logits of all are wanted.

    Attributes:
        draft_offset_A: drafted tokens before each; None if there are none.
        row_counts: tokens of each sequence; empty where each has one.
    """

    tokens_A: NDArray[np.int32]
    positions_A: NDArray[np.int32]
    slots_A: Integers
    draft_offset_A: Integers | None
    row_counts: list[int]


@dataclass(slots=True)
class SteadyBatch:
    """The batch of a step without prompts, used again in place while the same answers go on with as many drafts.

    Attributes:
        slots_S, key: the slots, and the state of the tables and tokens of each sequence, that it was made for.
        rows: all of its rows, as an index.
        sampled: what the last step sampled.
    """

    batch: Batch
    inputs: DecodeInputs
    slots_S: Integers
    key: tuple[int, list[int]]
    rows: SlotIndex
    sampled: list[int]


class Runner:
    """Between the scheduler and the back end."""

    def __init__(self, backend: Backend, scheduler: Scheduler, sampler: Sampler) -> None:
        self.backend, self.scheduler, self.sampler = backend, scheduler, sampler
        self._steady: SteadyBatch | None = None

    def run(self, step: ScheduledStep) -> StepResult:
        """Compute a step and sample from it. Every row is booked with one token; drafts that are accepted add to that.

        Raises:
            EngineError: the model's logits are not finite.
        """
        if not step.chunks:
            return self._run_decode(step)
        self._steady = None
        scheduler, inputs = self.scheduler, self._decode_inputs(step, self._row_counts(step))
        batch = self._build_batch(step, inputs)
        logits_RV, seconds = self._forward(batch)
        record_routes(batch, step)
        scheduler.num_computed[step.slots_S] += 1
        starting = scheduler.commit_chunks(step.chunks)
        for group in starting:
            share_routes(group)
        new = [sequence for group in starting for sequence in group]
        for sequence in new:
            self.sampler.add(sequence.slot, sequence)
        slots_N = np.array([sequence.slot for sequence in new], np.int64)
        samples = self._sample(step, inputs, logits_RV, [len(group) for group in starting], slots_N)
        score_prompts(self.backend, batch, step)
        return StepResult(step.decoding + new, np.concatenate((step.slots_S, slots_N)), samples, batch, seconds)

    def _run_decode(self, step: ScheduledStep) -> StepResult:
        """``run`` for one token of each answer and its drafts: what almost every step is.

        The weights have washed this code and its objects out of the processor's caches since the last step, so what
        counts here is how much memory is touched: where the same answers go on, their batch is used again in place.
        """
        sampler, steady = self.sampler, self._decode_batch(step)
        inputs = steady.inputs
        if sampler.only_argmax(inputs.slots_A):
            start_time = time.perf_counter()
            tokens_A = self.backend.argmax(steady.batch, sampler.vocab)
            seconds, samples = time.perf_counter() - start_time, SamplerOutput(tokens_A)
            if min(samples.tokens) < 0:
                if max(samples.tokens) < 0:
                    raise not_finite()
                samples.errors = {row: not_finite() for row, token in enumerate(samples.tokens) if token < 0}
        else:
            logits_RV, seconds = self._forward(steady.batch)
            samples = sampler.sample(logits_RV, inputs.slots_A, inputs.draft_offset_A, step.drafts)
        if steady.batch.routes_TLK is not None:
            record_routes(steady.batch, step)
        add_at(self.scheduler.num_computed, step.slot_index, 1)
        steady.sampled = samples.tokens
        return StepResult(step.decoding, step.slot_index, samples, steady.batch, seconds)

    def _decode_batch(self, step: ScheduledStep) -> SteadyBatch:
        """The batch of all answers and their drafts."""
        steady, row_counts = self._steady, self._row_counts(step)
        key = self.scheduler.blocks.version, row_counts
        if steady is None or steady.slots_S is not step.slots_S or steady.key != key:
            inputs = self._decode_inputs(step, row_counts)
            batch, rows = self._build_batch(step, inputs), row_index(len(inputs.tokens_A))
            steady = self._steady = SteadyBatch(batch, inputs, step.slots_S, key, rows, [])
        elif row_counts:
            tokens, positions = _draft_inputs(step)
            put_at(steady.batch.tokens_T, steady.rows, tokens)
            put_at(steady.batch.positions_T, steady.rows, positions)
        else:
            put_at(steady.batch.tokens_T, steady.rows, steady.sampled)
            add_at(steady.batch.positions_T, steady.rows, 1)
        return steady

    def _forward(self, batch: Batch) -> tuple[Tensor, float]:
        """Logits, and how long they took."""
        start_time = time.perf_counter()
        logits_RV = self.backend.run(batch)
        return logits_RV, time.perf_counter() - start_time

    def _row_counts(self, step: ScheduledStep) -> list[int]:
        """Tokens of each answer, see ``DecodeInputs``."""
        drafts = step.drafts
        return [1 + len(drafts.get(sequence.slot, ())) for sequence in step.decoding] if drafts else []

    def _decode_inputs(self, step: ScheduledStep, row_counts: list[int]) -> DecodeInputs:
        """The tokens of all answers: the one that was sampled last, and its drafts."""
        slots_S = step.slots_S
        if not row_counts:
            token_S = np.array([sequence.output_ids[-1] for sequence in step.decoding], np.int32)
            return DecodeInputs(token_S, self.scheduler.num_computed[slots_S], slots_S, None, row_counts)
        tokens, positions = _draft_inputs(step)
        draft_offset_A = np.array([offset for count in row_counts for offset in range(count)], np.int64)
        token_A, position_A = np.array(tokens, np.int32), np.array(positions, np.int32)
        return DecodeInputs(token_A, position_A, np.repeat(slots_S, row_counts), draft_offset_A, row_counts)

    def _build_batch(self, step: ScheduledStep, inputs: DecodeInputs) -> Batch:
        """The batch of answers, and behind them pieces of prompts."""
        tokens, positions, slots = [inputs.tokens_A], [inputs.positions_A], step.slots_S.tolist()
        row_counts, logits_index = inputs.row_counts or [1] * len(slots), list(range(len(inputs.tokens_A)))
        end = len(logits_index)
        for chunk in step.chunks:
            stop, end = chunk.start + chunk.count, end + chunk.count
            tokens.append(chunk.sequence.pending_ids[chunk.start : stop])
            positions.append(np.arange(chunk.start, stop, dtype=np.int32))
            row_counts = [*row_counts, chunk.count]
            slots.append(chunk.sequence.slot)
            logits_index += [end - 1] if chunk.is_last else []
        blocks, sequences = self.scheduler.blocks, [*step.decoding, *(chunk.sequence for chunk in step.chunks)]
        adapters = [sequence.adapter for sequence in sequences] if self.backend.adapters else []
        return Batch(
            tokens_T=np.concatenate(tokens),
            positions_T=np.concatenate(positions),
            starts_S=np.cumsum([0, *row_counts], dtype=np.int32),
            block_tables_SW=np.ascontiguousarray(blocks.tables[slots, : blocks.blocks_per_slot[slots].max(initial=0)]),
            logits_index_R=np.array(logits_index, np.int32),
            adapters_S=np.array(adapters if max(adapters, default=-1) >= 0 else [], np.int32),
            routes_TLK=room_for_routes(sequences, end),
        )

    def _sample(
        self, step: ScheduledStep, inputs: DecodeInputs, logits_RV: Tensor, group_sizes: list[int], slots_N: Integers
    ) -> SamplerOutput:
        """Sample the rows of all answers, and for each prompt that is whole a token for each of its siblings."""
        rows, slots_R = len(inputs.slots_A), np.concatenate((inputs.slots_A, slots_N))
        if not len(slots_R):
            return SamplerOutput(slots_R)
        if len(slots_N) > len(group_sizes):  # siblings read the same row of logits
            index_R = np.concatenate((np.arange(rows), rows + np.repeat(np.arange(len(group_sizes)), group_sizes)))
            logits_RV = logits_RV[torch.from_numpy(index_R).to(logits_RV.device)]
        if inputs.draft_offset_A is None:
            return self.sampler.sample(logits_RV, slots_R)
        draft_offset_R = np.concatenate((inputs.draft_offset_A, np.zeros(len(slots_N), np.int64)))
        return self.sampler.sample(logits_RV, slots_R, draft_offset_R, step.drafts)


def _draft_inputs(step: ScheduledStep) -> tuple[list[int], list[int]]:
    """Tokens of all answers with their drafts, and their positions; these rows are few, so lists are faster."""
    tokens: list[int] = []
    positions: list[int] = []
    for sequence in step.decoding:
        position = sequence.num_tokens - 1
        new = [sequence.output_ids[-1], *step.drafts.get(sequence.slot, ())]
        tokens += new
        positions += range(position, position + len(new))
    return tokens, positions

"""The sampler: settings of every slot in arrays, and one call that turns a step's logits into tokens.

A slot is a place for one running request. Its settings stand in numpy arrays, so that a step picks those of its rows by
one index and no Python loop runs over plain rows. What a request carries beyond numbers (penalties, a grammar, a
think budget: ``processors.py``) is applied to its own row, and only from the token on at which it can matter.

A row may stand some drafted tokens behind the output so far. Its noise is that of its own position and its
processors see the answer with the drafts before it, so each row is sampled exactly as it would be without drafts: a
draft that equals the sample of the row before it is accepted, and what comes out is what would have come out anyway.

R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sprat.engine.reasoning import think_close_ids
from sprat.engine.sampling import ops
from sprat.engine.sampling.ops import Floats, Integers, LogNormalizer, NotFinite, Truncation, not_finite
from sprat.engine.sampling.processors import process_row
from sprat.engine.sampling_params import Sampling, TokenIds
from sprat.engine.sequence import Sequence, SlotIndex, TopLogprobs
from sprat.errors import SpratError
from sprat.tokens.tokenizer import Tokenizer

NEVER = np.iinfo(np.int64).max  # the position at which no processor starts
Drafts = Mapping[int, TokenIds]  # slot → its drafted tokens


@dataclass(slots=True)
class SamplerOutput:
    """What one step sampled.

    Attributes:
        tokens_R: int64.
        logprobs_R: float32, in nats, of the whole distribution at the request's temperature (1 for greedy ones), before
            anything else; None if no row asked.
        top_logprobs: row → its likeliest tokens of the same distribution, where asked.
        errors: row → why its request cannot go on; the token of such a row means nothing, and the others are fine.
    """

    tokens_R: Integers
    logprobs_R: Floats | None = None
    top_logprobs: dict[int, TopLogprobs] = field(default_factory=dict)
    errors: dict[int, SpratError] = field(default_factory=dict)
    tokens: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """The same tokens as Python's integers."""
        self.tokens = self.tokens_R.tolist()


@dataclass(frozen=True, slots=True)
class _SamplingMetadata:
    """The settings of the rows of a step; made once for as long as the same requests run."""

    slots_R: Integers
    greedy_R: NDArray[np.bool_]
    temperature_R: Floats  # 1 for greedy rows
    truncation: Truncation
    key_R: NDArray[np.uint64]
    min_think_R: Integers
    min_tokens_R: Integers
    starts_at_R: Integers
    greedy: bool  # all rows are
    mixed: bool  # some are
    processed: bool  # a row has bans now, or processors
    logprobs: bool
    top_logprobs: list[int]  # rows that asked for the likeliest tokens


class Sampler:
    """Samples for up to ``max_batch`` requests at once.

    Args:
        eos_token_ids: ids that end an answer; with the end of thinking they are banned while a request may not stop
            thinking, and with its own ``stop_token_ids`` while its answer may not end.

    Attributes:
        supports_drafts: bool [max_batch]; False where a processor cannot look past output tokens: nothing is drafted.
    """

    def __init__(self, tokenizer: Tokenizer, max_batch: int, eos_token_ids: frozenset[int]) -> None:
        self.vocab = tokenizer.vocab_size
        self.supports_drafts = np.ones(max_batch, np.bool_)
        self._eos_token_ids = eos_token_ids
        self._banned = np.array(sorted({think_close_ids(tokenizer)[0], *eos_token_ids}))
        self._sequences: list[Sequence | None] = [None] * max_batch
        self._temperature = np.ones(max_batch, np.float32)
        self._top_k = np.zeros(max_batch, np.int64)
        self._top_p = np.ones(max_batch, np.float32)
        self._min_p = np.zeros(max_batch, np.float32)
        self._noise_key = np.zeros(max_batch, np.uint64)
        self._position = np.zeros(max_batch, np.int64)  # output tokens so far
        self._min_think = np.zeros(max_batch, np.int64)
        self._min_tokens = np.zeros(max_batch, np.int64)
        self._starts_at = np.full(max_batch, NEVER, np.int64)  # position from which on processors act
        self._logprobs = np.zeros(max_batch, np.bool_)
        self._top_logprobs = np.zeros(max_batch, np.int64)
        self._last_metadata: _SamplingMetadata | None = None

    def add(self, slot: int, sequence: Sequence) -> None:
        """Give ``slot`` to a request, wherever its answer stands."""
        sampling, processors = sequence.sampling, sequence.processors
        self._sequences[slot], self._last_metadata = sequence, None
        self._temperature[slot] = sampling.temperature
        self._top_k[slot], self._top_p[slot], self._min_p[slot] = sampling.top_k, sampling.top_p, sampling.min_p
        self._noise_key[slot], self._position[slot] = sequence.noise_key, len(sequence.output_ids)
        self._min_think[slot], self._min_tokens[slot] = sequence.min_think_tokens, sampling.min_tokens
        self._starts_at[slot] = min((processor.starts_at for processor in processors), default=NEVER)
        self._logprobs[slot], self._top_logprobs[slot] = sampling.logprobs, sampling.top_logprobs
        self.supports_drafts[slot] = all(processor.supports_drafts for processor in processors)

    def remove(self, slot: int) -> None:
        """Take ``slot`` back."""
        self._sequences[slot], self._last_metadata = None, None

    def advance(self, slot_index: SlotIndex, by: int | list[int] = 1) -> None:
        """So many sampled tokens of each of these (different) slots now stand in its ``output_ids``."""
        ops.add_at(self._position, slot_index, by)

    def only_argmax(self, slots_R: Integers) -> bool:
        """Whether all that these rows need is their likeliest token: then nobody has to see their logits."""
        metadata = self._metadata(slots_R)
        return metadata.greedy and not metadata.processed and not metadata.logprobs

    def sample(
        self, logits: Tensor, slots_R: Integers, draft_offset_R: Integers | None = None, drafts: Drafts | None = None
    ) -> SamplerOutput:
        """Sample one token for each row.

        Args:
            logits: float32 [R, V], on any device; not modified.
            slots_R: whose row it is; a slot may have several rows.
            draft_offset_R: drafted tokens before the row; None if there are none.
            drafts: slot → its drafted tokens.

        Raises:
            EngineError: no row has logits that are finite; where only some have not, it is an error of those.
        """
        logits_RV = logits.numpy() if logits.device.type == "cpu" else logits.cpu().numpy()
        position_R = self._position[slots_R] if draft_offset_R is None else self._position[slots_R] + draft_offset_R
        try:
            return self._sample(logits_RV, slots_R, position_R, drafts or {})
        except NotFinite:
            fine_R = np.isfinite(logits_RV.max(1))
            if not fine_R.any():
                raise
        samples = self._sample(np.where(fine_R[:, None], logits_RV, np.float32(0)), slots_R, position_R, drafts or {})
        samples.errors.update({row: not_finite() for row in np.flatnonzero(~fine_R).tolist()})
        return samples

    def _sample(self, logits_RV: Floats, slots_R: Integers, position_R: Integers, drafts: Drafts) -> SamplerOutput:
        """``sample``, where all rows are finite or none is sampled."""
        metadata, vocab = self._metadata(slots_R), self.vocab
        errors: dict[int, SpratError] = {}
        processed_RV = logits_RV
        if metadata.processed:
            processed_RV, errors = self._process_logits(logits_RV, metadata, position_R, drafts)
        normalizer, temperature_R = None, metadata.temperature_R
        if metadata.greedy:
            tokens_R = ops.argmax(processed_RV, vocab)
        else:
            noise_R = ops.uniform(metadata.key_R, position_R)
            tokens_R, normalizer = ops.sample(processed_RV, temperature_R, metadata.truncation, noise_R, vocab)
            if metadata.mixed:
                tokens_R[metadata.greedy_R] = ops.argmax(processed_RV[metadata.greedy_R], vocab)
        if not metadata.logprobs:
            return SamplerOutput(tokens_R, errors=errors)
        if normalizer is None or processed_RV is not logits_RV:
            normalizer = ops.softmax_weights(logits_RV, temperature_R, vocab).normalizer
        logprobs_R = ops.logprob(logits_RV[np.arange(len(tokens_R)), tokens_R], temperature_R, normalizer)
        top_logprobs = {row: self._top(row, logits_RV, metadata, normalizer) for row in metadata.top_logprobs}
        return SamplerOutput(tokens_R, logprobs_R, top_logprobs, errors)

    def _metadata(self, slots_R: Integers) -> _SamplingMetadata:
        """The settings of these rows; the same array again means the same rows."""
        if self._last_metadata is None or self._last_metadata.slots_R is not slots_R:
            self._last_metadata = self._gather(slots_R)
        return self._last_metadata

    def _gather(self, slots_R: Integers) -> _SamplingMetadata:
        """The settings of these rows."""
        temperature_R = self._temperature[slots_R]
        greedy_R = temperature_R == 0
        temperature_R[greedy_R] = 1
        min_think_R, min_tokens_R = self._min_think[slots_R], self._min_tokens[slots_R]
        starts_at_R, position_R = self._starts_at[slots_R], self._position[slots_R]
        banned_R = np.maximum(min_think_R, min_tokens_R) > position_R
        return _SamplingMetadata(
            slots_R=slots_R,
            greedy_R=greedy_R,
            temperature_R=temperature_R,
            truncation=Truncation(self._top_k[slots_R], self._top_p[slots_R], self._min_p[slots_R]),
            key_R=self._noise_key[slots_R],
            min_think_R=min_think_R,
            min_tokens_R=min_tokens_R,
            starts_at_R=starts_at_R,
            greedy=bool(greedy_R.all()),
            mixed=bool(greedy_R.any()),
            processed=bool(banned_R.any() or (starts_at_R < NEVER).any()),
            logprobs=bool(self._logprobs[slots_R].any()),
            top_logprobs=np.flatnonzero(self._top_logprobs[slots_R]).tolist(),
        )

    def _process_logits(
        self, logits_RV: Floats, metadata: _SamplingMetadata, position_R: Integers, drafts: Drafts
    ) -> tuple[Floats, dict[int, SpratError]]:
        """The logits after bans and processors, and by row the errors of these.

        They are ``logits_RV`` itself where no row has any now, else a copy.
        """
        errors: dict[int, SpratError] = {}
        banned_R, endless_R = position_R < metadata.min_think_R, position_R < metadata.min_tokens_R
        acting_R = position_R >= metadata.starts_at_R
        special = np.flatnonzero(acting_R | endless_R).tolist()
        if not special and not banned_R.any():
            if metadata.starts_at_R.min() == NEVER:  # all bans have ended: these rows need no processing any more
                self._last_metadata = None
            return logits_RV, errors
        processed_RV = logits_RV.copy()
        if banned_R.any():
            processed_RV[np.flatnonzero(banned_R)[:, None], self._banned] = -np.inf
        for row in special:
            slot = int(metadata.slots_R[row])
            sequence = self._sequences[slot]
            if sequence is None:
                raise RuntimeError(f"slot {slot} is not open")
            draft_ids = drafts.get(slot, ())[: int(position_R[row] - self._position[slot])]
            processors = sequence.processors if acting_R[row] else ()
            banned_ids = self._end_token_ids(sequence.sampling) if endless_R[row] else []
            error = process_row(sequence, processors, processed_RV[row, : self.vocab], banned_ids, draft_ids)
            if error is not None:
                errors[row] = error
                processed_RV[row] = 0
        return processed_RV, errors

    def _end_token_ids(self, sampling: Sampling) -> list[int]:
        """What must not be said before ``min_tokens``."""
        ignored = sampling.ignore_eos and sampling.response is None
        return [*sampling.stop_token_ids, *(() if ignored else self._eos_token_ids)]

    def _top(self, row: int, logits_RV: Floats, metadata: _SamplingMetadata, normalizer: LogNormalizer) -> TopLogprobs:
        """The likeliest tokens of one row, as many as its request asked."""
        logits_V, temperature = logits_RV[row], metadata.temperature_R[row]
        count = min(int(self._top_logprobs[metadata.slots_R[row]]), len(logits_V))
        ids = np.flatnonzero(logits_V >= np.partition(logits_V, -count)[-count])
        ids = ids[np.argsort(-logits_V[ids], kind="stable")][:count]
        of_row = LogNormalizer(normalizer.max_R[row], normalizer.log_sum_R[row])
        return list(zip(ids.tolist(), ops.logprob(logits_V[ids], temperature, of_row).tolist(), strict=True))

"""The sampler: settings of every slot in arrays, and one call that turns a step's logits into tokens.

A slot is a place for one running request. Its settings stand in numpy arrays, so that a step picks those of its rows by
one index and no Python loop runs over plain rows. What a request carries beyond numbers (penalties, a grammar, a
think budget: ``processors.py``) is applied to its own row, and only from the token on at which it can matter.

A row may stand ``ahead`` drafted tokens behind the settled answer. Its noise is that of its own position and its
processors see the answer with the drafts before it, so each row is sampled exactly as it would be without drafts: a
draft that equals the sample of the row before it is accepted, and what comes out is what would have come out anyway.

R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sprat.engine.draw import Floats, Integers, NotFinite, Scale, draw, greatest, logprob, not_finite, uniform, weigh
from sprat.engine.plan import At, add_at
from sprat.engine.processors import NEVER
from sprat.engine.sequence import Sequence
from sprat.engine.think import closing
from sprat.errors import EngineError, SpratError
from sprat.tokens.tokenizer import Tokenizer

Top = list[tuple[int, float]]  # likeliest tokens with their log-probabilities, best first


@dataclass(slots=True)
class Samples:
    """What one step sampled.

    Attributes:
        tokens_R: int64.
        logprobs_R: float32, in nats, of the whole distribution at the request's temperature (1 for greedy ones), before
            anything else; None if no row asked.
        tops: row → its likeliest tokens of the same distribution, where asked.
        faults: row → why its request cannot go on; the token of such a row means nothing, and the others are fine.
    """

    tokens_R: Integers
    logprobs_R: Floats | None = None
    tops: dict[int, Top] = field(default_factory=dict)
    faults: dict[int, SpratError] = field(default_factory=dict)
    tokens: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """The same tokens as Python's integers."""
        self.tokens = self.tokens_R.tolist()


@dataclass(frozen=True, slots=True)
class _Rows:
    """The settings of the rows of a step; made once for as long as the same requests run."""

    slots_R: Integers
    greedy_R: NDArray[np.bool_]
    heat_R: Floats  # 1 for greedy rows
    limits: tuple[Integers, Floats, Floats]
    key_R: NDArray[np.uint64]
    ban_R: Integers
    wakes_R: Integers
    greedy: bool  # all rows are
    mixed: bool  # some are
    shaped: bool  # a row has bans now, or processors
    logprobs: bool
    tops: list[int]  # rows that asked for the likeliest tokens


class Sampler:
    """Samples for up to ``slots`` requests at once.

    Args:
        ends: ids that end an answer; with the end of thinking they are banned while a request may not stop thinking.

    Attributes:
        speculates: bool [slots]; False where a processor cannot look past settled tokens, so nothing may be drafted.
    """

    def __init__(self, tokenizer: Tokenizer, slots: int, ends: frozenset[int]) -> None:
        self.vocab = tokenizer.vocab_size
        self.speculates = np.ones(slots, np.bool_)
        self._banned = np.array(sorted({closing(tokenizer)[0], *ends}))
        self._sequences: list[Sequence | None] = [None] * slots
        self._temperature = np.ones(slots, np.float32)
        self._top_k = np.zeros(slots, np.int64)
        self._top_p = np.ones(slots, np.float32)
        self._min_p = np.zeros(slots, np.float32)
        self._key = np.zeros(slots, np.uint64)
        self._position = np.zeros(slots, np.int64)  # tokens settled so far
        self._ban = np.zeros(slots, np.int64)
        self._wakes = np.full(slots, NEVER, np.int64)  # position from which on processors act
        self._logprobs = np.zeros(slots, np.bool_)
        self._tops = np.zeros(slots, np.int64)
        self._rows: _Rows | None = None

    def open(self, slot: int, sequence: Sequence) -> None:
        """Give ``slot`` to a request, wherever its answer stands."""
        sampling, processors = sequence.sampling, sequence.processors
        self._sequences[slot], self._rows = sequence, None
        self._temperature[slot] = sampling.temperature
        self._top_k[slot], self._top_p[slot], self._min_p[slot] = sampling.top_k, sampling.top_p, sampling.min_p
        self._key[slot], self._position[slot], self._ban[slot] = sequence.key, len(sequence.token_ids), sequence.ban
        self._wakes[slot] = min((processor.wakes for processor in processors), default=NEVER)
        self._logprobs[slot], self._tops[slot] = sampling.logprobs, sampling.top_logprobs
        self.speculates[slot] = all(processor.speculates for processor in processors)

    def close(self, slot: int) -> None:
        """Take ``slot`` back."""
        self._sequences[slot], self._rows = None, None

    def advance(self, at: At, by: int | list[int] = 1) -> None:
        """So many sampled tokens of each of these (different) slots now stand in its ``token_ids``."""
        add_at(self._position, at, by)

    def plain(self, slots_R: Integers) -> bool:
        """Whether all that these rows need is their likeliest token: then nobody has to see their logits."""
        rows = self._of(slots_R)
        return rows.greedy and not rows.shaped and not rows.logprobs

    def sample(
        self,
        logits: Tensor,
        slots_R: Integers,
        ahead_R: Integers | None = None,
        drafts: Mapping[int, Rows[int]] | None = None,
    ) -> Samples:
        """Sample one token for each row.

        Args:
            logits: float32 [R, V], on any device; not modified.
            slots_R: whose row it is; a slot may have several rows.
            ahead_R: drafted tokens before the row; None if there are none.
            drafts: slot → its drafted tokens.

        Raises:
            EngineError: no row has logits that are finite; where only some have not, it is a fault of those.
        """
        logits_RV = logits.numpy() if logits.device.type == "cpu" else logits.cpu().numpy()
        try:
            return self._sample(logits_RV, slots_R, ahead_R, drafts)
        except NotFinite:
            fine_R = np.isfinite(logits_RV.max(1))
            if not fine_R.any():
                raise
        samples = self._sample(np.where(fine_R[:, None], logits_RV, np.float32(0)), slots_R, ahead_R, drafts)
        samples.faults.update({row: not_finite() for row in np.flatnonzero(~fine_R).tolist()})
        return samples

    def _sample(
        self,
        logits_RV: Floats,
        slots_R: Integers,
        ahead_R: Integers | None,
        drafts: Mapping[int, Rows[int]] | None,
    ) -> Samples:
        """``sample``, where all rows are finite or none is sampled."""
        rows = self._of(slots_R)
        position_R = self._position[slots_R] if ahead_R is None else self._position[slots_R] + ahead_R
        faults: dict[int, SpratError] = {}
        shaped_RV = logits_RV
        if rows.shaped:
            shaped_RV = self._shape(logits_RV, rows, position_R, ahead_R, drafts or {}, faults)
        scale = None
        if rows.greedy:
            tokens_R = greatest(shaped_RV, self.vocab)
        else:
            noise_R = uniform(rows.key_R, position_R)
            tokens_R, scale = draw(shaped_RV, rows.heat_R, *rows.limits, noise_R, self.vocab)
            if rows.mixed:
                tokens_R[rows.greedy_R] = greatest(shaped_RV[rows.greedy_R], self.vocab)
        if not rows.logprobs:
            return Samples(tokens_R, faults=faults)
        if scale is None or shaped_RV is not logits_RV:
            scale = weigh(logits_RV, rows.heat_R, self.vocab).scale
        logprobs_R = logprob(logits_RV[np.arange(len(tokens_R)), tokens_R], rows.heat_R, scale)
        tops = {row: self._likeliest(logits_RV[row], int(slots_R[row]), row, rows.heat_R, scale) for row in rows.tops}
        return Samples(tokens_R, logprobs_R, tops, faults)

    def _of(self, slots_R: Integers) -> _Rows:
        """The settings of these rows; the same array again means the same rows."""
        rows = self._rows
        if rows is None or rows.slots_R is not slots_R:
            rows = self._rows = self._gather(slots_R)
        return rows

    def _gather(self, slots_R: Integers) -> _Rows:
        """The settings of these rows."""
        heat_R = self._temperature[slots_R]
        greedy_R = heat_R == 0
        heat_R[greedy_R] = 1
        ban_R, wakes_R = self._ban[slots_R], self._wakes[slots_R]
        return _Rows(
            slots_R=slots_R,
            greedy_R=greedy_R,
            heat_R=heat_R,
            limits=(self._top_k[slots_R], self._top_p[slots_R], self._min_p[slots_R]),
            key_R=self._key[slots_R],
            ban_R=ban_R,
            wakes_R=wakes_R,
            greedy=bool(greedy_R.all()),
            mixed=bool(greedy_R.any()),
            shaped=bool((ban_R > self._position[slots_R]).any() or (wakes_R < NEVER).any()),
            logprobs=bool(self._logprobs[slots_R].any()),
            tops=np.flatnonzero(self._tops[slots_R]).tolist(),
        )

    def _shape(
        self,
        logits_RV: Floats,
        rows: _Rows,
        position_R: Integers,
        ahead_R: Integers | None,
        drafts: Mapping[int, Rows[int]],
        faults: dict[int, SpratError],
    ) -> Floats:
        """The logits after bans and processors: ``logits_RV`` itself where no row has any now, else a copy."""
        held_R = position_R < rows.ban_R
        acting = np.flatnonzero(position_R >= rows.wakes_R).tolist()
        if not acting and not held_R.any():
            if rows.wakes_R.min() == NEVER:  # all bans have ended: these rows need no shaping any more
                self._rows = None
            return logits_RV
        shaped_RV = logits_RV.copy()
        if held_R.any():
            shaped_RV[np.flatnonzero(held_R)[:, None], self._banned] = -np.inf
        for row in acting:
            slot = int(rows.slots_R[row])
            sequence = self._sequences[slot]
            if sequence is None:
                raise RuntimeError(f"slot {slot} is not open")
            ahead = drafts[slot][: int(ahead_R[row])] if ahead_R is not None and slot in drafts else ()
            fault = _process(sequence, shaped_RV[row, : self.vocab], ahead)
            if fault is not None:
                faults[row] = fault
                shaped_RV[row] = 0
        return shaped_RV

    def _likeliest(self, logits_V: Floats, slot: int, row: int, heat_R: Floats, scale: Scale) -> Top:
        """The likeliest tokens of one row, as many as its request asked."""
        count = min(int(self._tops[slot]), len(logits_V))
        ids = np.flatnonzero(logits_V >= np.partition(logits_V, -count)[-count])
        ids = ids[np.argsort(-logits_V[ids], kind="stable")][:count]
        own = Scale(scale.top_R[row], scale.sum_R[row])
        return list(zip(ids.tolist(), logprob(logits_V[ids], heat_R[row], own).tolist(), strict=True))


def _process(sequence: Sequence, logits_V: Floats, ahead: Rows[int]) -> SpratError | None:
    """Apply the processors of one request to its row, in place; the error that ends the request, if any.

    Raises:
        EngineError: the model's own logits are not finite.
    """
    if not np.isfinite(logits_V.max()):
        raise not_finite()
    try:
        for processor in sequence.processors:
            processor.apply(logits_V, sequence.token_ids, ahead)
    except SpratError as error:
        return error
    except Exception as error:  # a processor of the caller's may raise anything; only its own request pays
        todo = "mend the processor"
        return EngineError(f"a processor failed: {type(error).__name__}: {error}", where="processors", todo=todo)
    if np.isfinite(logits_V.max()):
        return None
    todo = "loosen bad_words, logit_bias, repetition_penalty, processors or response"
    return EngineError("the request's own rules leave no token to say", where="sampling", todo=todo)

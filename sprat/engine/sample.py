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
import torch
from numpy.typing import NDArray
from torch import Tensor

from sprat.engine.draw import draw, greatest, not_finite, uniform
from sprat.engine.processors import NEVER
from sprat.engine.sequence import Sequence
from sprat.engine.think import closing
from sprat.errors import EngineError, SpratError
from sprat.tokens.tokenizer import Tokenizer

Top = list[tuple[int, float]]  # likeliest tokens with their log-probabilities, best first


@dataclass(frozen=True)
class Samples:
    """What one step sampled.

    Attributes:
        tokens_R: int64.
        logprobs_R: float32, in nats, of the whole distribution at the request's temperature (1 for greedy ones), before
            anything else; None if no row asked.
        tops: row → its likeliest tokens of the same distribution, where asked.
        faults: row → why its request cannot go on; the token of such a row means nothing.
    """

    tokens_R: NDArray[np.int64]
    logprobs_R: NDArray[np.float32] | None = None
    tops: dict[int, Top] = field(default_factory=dict)
    faults: dict[int, SpratError] = field(default_factory=dict)


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
        self._banned = torch.tensor(sorted({closing(tokenizer)[0], *ends}))
        self._sequences: list[Sequence | None] = [None] * slots
        self._plain = [False] * slots  # greedy, nothing asked and nothing carried
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

    def open(self, slot: int, sequence: Sequence) -> None:
        """Give ``slot`` to a request, wherever its answer stands."""
        sampling, processors = sequence.sampling, sequence.processors
        self._sequences[slot] = sequence
        self._temperature[slot] = sampling.temperature
        self._top_k[slot], self._top_p[slot], self._min_p[slot] = sampling.top_k, sampling.top_p, sampling.min_p
        self._key[slot], self._position[slot], self._ban[slot] = sequence.key, len(sequence.token_ids), sequence.ban
        self._wakes[slot] = min((processor.wakes for processor in processors), default=NEVER)
        self._logprobs[slot], self._tops[slot] = sampling.logprobs, sampling.top_logprobs
        self._plain[slot] = sampling.temperature == 0 and not sampling.logprobs and not processors
        self.speculates[slot] = all(processor.speculates for processor in processors)

    def close(self, slot: int) -> None:
        """Take ``slot`` back."""
        self._sequences[slot] = None

    def advance(self, slots_S: NDArray[np.int64], by: NDArray[np.int64] | int = 1) -> None:
        """So many sampled tokens of these (different) slots now stand in their ``token_ids``."""
        self._position[slots_S] += by

    def sample(
        self,
        logits_RV: Tensor,
        slots_R: NDArray[np.int64],
        ahead_R: NDArray[np.int64] | None = None,
        drafts: Mapping[int, Rows[int]] | None = None,
    ) -> Samples:
        """Sample one token for each row.

        Args:
            logits_RV: float32; not modified.
            slots_R: whose row it is; a slot may have several rows.
            ahead_R: drafted tokens before the row; None if there are none.
            drafts: slot → its drafted tokens.

        Raises:
            EngineError: a row has logits that are not finite.
        """
        if len(slots_R) == 1:
            slot = int(slots_R[0])
            if self._plain[slot] and self._position[slot] >= self._ban[slot]:
                return Samples(greatest(logits_RV[:, : self.vocab]))
        position_R = self._position[slots_R] if ahead_R is None else self._position[slots_R] + ahead_R
        faults: dict[int, SpratError] = {}
        shaped_RV = self._shape(logits_RV, slots_R, position_R, ahead_R, drafts or {}, faults)
        heat_R = self._temperature[slots_R]
        greedy_R = heat_R == 0
        sum_R = None
        if greedy_R.all():
            tokens_R = greatest(shaped_RV[:, : self.vocab])
        else:
            heat_R[greedy_R] = 1
            noise_R = uniform(self._key[slots_R], position_R)
            limits = (self._top_k[slots_R], self._top_p[slots_R], self._min_p[slots_R])
            tokens_R, sum_R = draw(shaped_RV, heat_R, *limits, noise_R, self.vocab)
            if greedy_R.any():
                likeliest = greatest(shaped_RV[torch.from_numpy(greedy_R).to(shaped_RV.device), : self.vocab])
                tokens_R[greedy_R] = likeliest
        if not self._logprobs[slots_R].any():
            return Samples(tokens_R, faults=faults)
        heat_R[greedy_R] = 1
        scale_R = torch.from_numpy(np.float32(1) / heat_R).to(logits_RV.device)
        if sum_R is None or shaped_RV is not logits_RV:
            sum_R = torch.logsumexp(logits_RV * scale_R[:, None], -1)
        chosen_R1 = torch.from_numpy(tokens_R).to(logits_RV.device)[:, None]
        logprobs_R = (logits_RV.gather(1, chosen_R1)[:, 0] * scale_R - sum_R).cpu().numpy()
        return Samples(tokens_R, logprobs_R, self._likeliest(logits_RV, slots_R, scale_R, sum_R), faults)

    def _likeliest(
        self, logits_RV: Tensor, slots_R: NDArray[np.int64], scale_R: Tensor, sum_R: Tensor
    ) -> dict[int, Top]:
        """Row → likeliest tokens, for the rows that asked."""
        tops: dict[int, Top] = {}
        for row in np.flatnonzero(self._tops[slots_R]).tolist():
            found = torch.topk(logits_RV[row], min(int(self._tops[slots_R[row]]), logits_RV.shape[1]))
            logprobs = found.values * scale_R[row] - sum_R[row]
            tops[row] = list(zip(found.indices.tolist(), logprobs.tolist(), strict=True))
        return tops

    def _shape(
        self,
        logits_RV: Tensor,
        slots_R: NDArray[np.int64],
        position_R: NDArray[np.int64],
        ahead_R: NDArray[np.int64] | None,
        drafts: Mapping[int, Rows[int]],
        faults: dict[int, SpratError],
    ) -> Tensor:
        """The logits after bans and processors: ``logits_RV`` itself where no row has any, else a copy."""
        held_R = position_R < self._ban[slots_R]
        acting = np.flatnonzero(position_R >= self._wakes[slots_R]).tolist()
        if not acting and not held_R.any():
            return logits_RV
        shaped_RV = logits_RV.clone()
        if held_R.any():
            held = torch.from_numpy(np.flatnonzero(held_R)).to(logits_RV.device)
            shaped_RV[held[:, None], self._banned.to(logits_RV.device)] = -torch.inf
        for row in acting:
            slot = int(slots_R[row])
            sequence = self._sequences[slot]
            if sequence is None:
                raise RuntimeError(f"slot {slot} is not open")
            ahead = drafts[slot][: int(ahead_R[row])] if ahead_R is not None and slot in drafts else ()
            logits_V = shaped_RV[row, : self.vocab].cpu().numpy()
            fault = _process(sequence, logits_V, ahead)
            if fault is not None:
                faults[row] = fault
                logits_V[:] = 0
            if logits_RV.device.type != "cpu":
                shaped_RV[row, : self.vocab] = torch.from_numpy(logits_V).to(logits_RV.device)
        return shaped_RV


def _process(sequence: Sequence, logits_V: NDArray[np.float32], ahead: Rows[int]) -> SpratError | None:
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
    todo = "loosen bad_words, logit_bias, processors or response"
    return EngineError("the request's own rules leave no token to say", where="sampling", todo=todo)

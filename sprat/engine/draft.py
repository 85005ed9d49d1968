"""Speculation: guess a few tokens, let the model check them all in one step, keep what it would have said anyway.

A step reads all weights whether it computes one token or five, so checking a guess costs little where weights are what
a step waits for. Guesses come from one of two places. *Lookup*: what followed the last three tokens where they last
stood in this prompt or answer; free, and good at quoting. *MTP*: the module that DeepSeek models were trained with to
see one token further (DeepSeek-V3, arXiv 2412.19437, section 2.2), fed with the hidden states of the step before.

Why nothing changes but the speed. A draft is a definite token, so the proposal is a distribution with all mass on
one token d, and speculative sampling (Leviathan et al., arXiv 2211.17192) accepts it with probability p(d) and else
draws from p without d. Both happen when one draws from p and compares: the draw equals d with probability p(d),
and is distributed as p without d where it does not. So every row is sampled as ever, with the noise of its own
position, which is a pure function of request and position; a draft counts where it equals the sample. The answer is
the one without speculation, token by token, greedy or not, on a back end whose rows do not depend on the batch.

Whether it pays is measured. A step of five rows may cost 1.1 steps of one or 2, and a guess may hold always or never,
so ``Payoff`` keeps both as moving averages and ``auto`` drafts while (1 + tokens gained) grows faster than the cost,
with a trial now and then in case the text has changed. ``ngram`` and ``mtp`` always draft; ``auto`` does only
where the back end is invariant, since an answer must not depend on a stop-watch.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import replace
from typing import Literal

import numpy as np

from sprat.engine.backend import BLOCK, Backend, Batch
from sprat.engine.plan import Plan
from sprat.engine.runner import Result
from sprat.engine.sample import Sampler
from sprat.engine.scheduler import Scheduler
from sprat.engine.sequence import Sequence
from sprat.errors import EngineError

Way = Literal["auto", "ngram", "mtp", "off"]
GRAM = 3  # tokens that must be the same before a guess
LOOKUP_TOKENS, MTP_TOKENS = 4, 2  # guessed at once
MOST_ROWS = 16  # answers of one step above which weights are no longer what it waits for
TRIAL = 64  # steps between two trials of what did not pay
MEMORY = 0.1  # weight of the newest figure in a moving average


class Lookup:
    """What followed every three tokens of one prompt and its answer, the latest place counting."""

    def __init__(self, prompt: Rows[int], vocab: int) -> None:
        self._vocab, self._tokens, self._prompt = vocab, list(prompt), len(prompt)
        self._after: dict[int, int] = {}
        self._seen = GRAM  # places before this one are in the table

    def propose(self, said: Rows[int], count: int) -> list[int]:
        """Up to ``count`` tokens that may follow prompt and ``said``, which only grows; none if nothing is known."""
        tokens = self._tokens
        tokens.extend(said[len(tokens) - self._prompt :])
        for place in range(self._seen, len(tokens)):
            self._after[self._gram(place)] = place
        self._seen = max(self._seen, len(tokens))
        found = self._after.get(self._gram(len(tokens)), 0) if len(tokens) >= GRAM else 0
        return tokens[found : found + count] if found else []

    def _gram(self, place: int) -> int:
        """The three tokens before ``place`` as one number."""
        first, second, third = self._tokens[place - GRAM : place]
        return (first * self._vocab + second) * self._vocab + third


class Payoff:
    """Measured: what a step of so many rows costs, and how many drafts hold."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # by powers of two of the rows
        self._gain = 1.0  # tokens that a row with drafts gains beyond its own
        self._wait = 0

    def pays(self, rows: int, drafts: int) -> bool:
        """Whether ``rows`` answers should be given ``drafts`` drafts each in the next step."""
        plain = self._seconds.get(rows.bit_length())
        wide = self._seconds.get((rows * (1 + drafts)).bit_length())
        if plain is None:
            return False
        if wide is None or (1 + self._gain) * plain > wide:
            return True
        self._wait += 1
        if self._wait >= TRIAL:
            self._wait = 0
            return True
        return False

    def timed(self, rows: int, seconds: float) -> None:
        """A step of ``rows`` rows took so long."""
        size = rows.bit_length()
        self._seconds[size] = _mean(self._seconds.get(size, seconds), seconds)

    def checked(self, accepted: float) -> None:
        """So many drafts held, for each answer that had some."""
        self._gain = _mean(self._gain, accepted)


def _mean(old: float, new: float) -> float:
    """The moving average."""
    return old + MEMORY * (new - old)


class Speculation:
    """Gives drafts to the answers of a plan, and learns from what came of them.

    Attributes:
        drafted, accepted: tokens so far.

    Raises:
        EngineError: ``way`` is unknown, or is ``mtp`` and the back end has no module.
    """

    def __init__(self, way: Way, backend: Backend, vocab: int) -> None:
        if way not in ("auto", "ngram", "mtp", "off"):
            raise EngineError(f"{way!r} is no way to speculate", where="speculate", todo="auto, ngram, mtp or off")
        if way == "mtp" and not backend.depth:
            todo = "use ngram, or a model with num_nextn_predict_layers"
            raise EngineError("this model has no MTP module to draft with", where="speculate", todo=todo)
        self._auto = way == "auto"
        if way == "auto":
            way = "off" if not backend.invariant else "mtp" if backend.depth else "ngram"
        self._way, self._backend, self._vocab = way, backend, vocab
        self._payoff = Payoff()
        self._on = False
        self.drafted = self.accepted = 0

    def propose(self, plan: Plan, scheduler: Scheduler, sampler: Sampler) -> None:
        """Fill ``plan.drafts`` where a guess is at hand, there is memory for it, and it is worth it."""
        most = LOOKUP_TOKENS if self._way == "ngram" else MTP_TOKENS
        rows = len(plan.rows)
        self._on = self._way != "off" and rows <= MOST_ROWS and (not self._auto or self._payoff.pays(rows, most))
        if not self._on:
            for sequence in plan.rows if self._way == "mtp" else ():
                sequence.drafts = []
            return
        for sequence in plan.rows:
            slot, place = sequence.slot, int(scheduler.stored[sequence.slot])
            count = min(most, sequence.limit - len(sequence.token_ids) - 1)
            drafts: list[int] = []
            if count > 0 and sampler.speculates[slot]:
                drafts = self._lookup(sequence, count) if self._way == "ngram" else sequence.drafts[:count]
            # One place more than is computed: the module looks a token further.
            if (drafts or self._way == "mtp") and scheduler.blocks.extend(slot, place + 2 + len(drafts)) and drafts:
                plan.drafts[slot] = drafts

    def learn(self, plan: Plan, result: Result, accepted: dict[int, int]) -> None:
        """Note what a step cost, and by slot how many of its drafts held."""
        if accepted:
            self.drafted += sum(map(len, plan.drafts.values()))
            self.accepted += sum(accepted.values())
            self._payoff.checked(sum(accepted.values()) / len(accepted))
        if self._auto and self._way != "off" and not plan.chunks:
            self._payoff.timed(len(result.batch.tokens_T), result.seconds)

    def draft(self, plan: Plan, result: Result, accepted: dict[int, int]) -> None:
        """Let the MTP module follow the step that was just settled, and guess what comes next."""
        if self._way != "mtp" or not (self._on or plan.chunks):
            return
        batch = _shifted(plan, result)
        wanted = [
            (sequence, int(batch.starts_S[row]) + accepted.get(slot, 0))
            for row, (sequence, slot) in enumerate(zip(plan.rows, plan.slots_S.tolist(), strict=True))
        ] + [
            (chunk.sequence, int(batch.starts_S[row + 1]) - 1)
            for row, chunk in enumerate(plan.chunks, len(plan.rows))
            if chunk.last
        ]
        wanted = [(sequence, index) for sequence, index in wanted if sequence.slot >= 0]
        wanted_R = np.array([index for _, index in wanted], np.int32)
        batch = replace(batch, wanted_R=wanted_R)
        for step in range(MTP_TOKENS):
            if not _has_places(batch):
                return
            logits_RV = self._backend.draft(batch, first=step == 0)
            tokens_R = logits_RV[:, : self._vocab].cpu().numpy().argmax(1).astype(np.int32) if wanted else wanted_R
            for (sequence, _), token in zip(wanted, tokens_R.tolist(), strict=True):
                sequence.drafts = [*sequence.drafts, token] if step else [token]
            every_R = np.arange(len(wanted) + 1, dtype=np.int32)
            rows_R = np.searchsorted(batch.starts_S, batch.wanted_R, "right") - 1
            positions_R = batch.positions_T[batch.wanted_R] + np.int32(1)
            batch = Batch(tokens_R, positions_R, every_R, batch.tables_SW[rows_R], every_R[:-1])
            if not wanted:
                return

    def _lookup(self, sequence: Sequence, count: int) -> list[int]:
        """Tokens that followed the last ones before."""
        if sequence.lookup is None:
            sequence.lookup = Lookup(sequence.prompt, self._vocab)
        return sequence.lookup.propose(sequence.token_ids, count)


def _shifted(plan: Plan, result: Result) -> Batch:
    """The batch of a settled step one token further: each place holds the token that came to stand behind it.

    Behind a refused draft stands whatever was sampled there; nobody asks for such a row, and the next step
    overwrites what it leaves.
    """
    batch, decoding = result.batch, len(plan.rows)
    tokens_T = np.empty_like(batch.tokens_T)
    tokens_T[: batch.starts_S[decoding]] = result.samples.tokens_R[: batch.starts_S[decoding]]
    for row, chunk in enumerate(plan.chunks, decoding):
        sequence, start, stop = chunk.sequence, chunk.start + 1, chunk.start + chunk.count + 1
        after = max(0, start - len(sequence.prompt)), max(0, stop - len(sequence.prompt))
        tokens_T[batch.starts_S[row] : batch.starts_S[row + 1]] = (
            sequence.prompt[start:stop] + sequence.token_ids[slice(*after)]
        )
    return replace(batch, tokens_T=tokens_T, positions_T=batch.positions_T + np.int32(1))


def _has_places(batch: Batch) -> bool:
    """Whether the tables reach as far as the positions."""
    rows_T = np.repeat(np.arange(len(batch.starts_S) - 1), np.diff(batch.starts_S))
    places_T, width = batch.positions_T // BLOCK, batch.tables_SW.shape[1]
    return bool((places_T < width).all() and (batch.tables_SW[rows_T, places_T] >= 0).all())

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

import time
from collections.abc import Sequence as Rows
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sprat.engine.backend import Backend
from sprat.engine.plan import Plan
from sprat.engine.runner import Result
from sprat.engine.sample import Sampler
from sprat.engine.scheduler import Scheduler
from sprat.engine.sequence import Sequence
from sprat.errors import EngineError

Way = Literal["auto", "ngram", "mtp", "off"]
GRAM = 3  # tokens that must be the same before a guess
LOOKUP_TOKENS = 4  # guessed at once; MTP guesses one for each of its modules
MOST_ROWS = 16  # answers of one step above which weights are no longer what it waits for
PAUSE, TRIAL = 64, 4  # steps without drafts where they do not pay, and then with some to see whether they do now
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
    """Measured: what a step of so many rows costs, and how many drafts hold.

    Attributes:
        paying: what was found last; True before anything is known.
    """

    def __init__(self) -> None:
        self.paying = True
        self._seconds: dict[int, float] = {}  # by powers of two of the rows
        self._gain = 1.0  # tokens that a row with drafts gains beyond its own
        self._wait = 0

    def pays(self, rows: int, drafts: int) -> bool:
        """Whether ``rows`` answers should be given ``drafts`` drafts each in the next step."""
        plain = self._seconds.get(rows.bit_length())
        wide = self._seconds.get((rows * (1 + drafts)).bit_length())
        if plain is None:
            return False
        self.paying = wide is None or (1 + self._gain) * plain > wide
        self._wait = 0 if self.paying else (self._wait + 1) % (PAUSE + TRIAL)
        return self.paying or self._wait >= PAUSE

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
        if self._way == "off":
            return
        plan.drafts = {}
        most = LOOKUP_TOKENS if self._way == "ngram" else self._backend.depth
        rows = len(plan.rows)
        self._on = rows <= MOST_ROWS and (not self._auto or self._payoff.pays(rows, most))
        if not self._on:
            for sequence in plan.rows if self._way == "mtp" else ():
                sequence.drafts = []
            return
        for sequence in plan.rows:
            slot = sequence.slot
            count = min(most, sequence.limit - len(sequence.token_ids) - 1)
            drafts: list[int] = []
            if count > 0 and sampler.speculates[slot]:
                drafts = self._lookup(sequence, count) if self._way == "ngram" else sequence.drafts[:count]
            if drafts and scheduler.extends(slot, len(drafts)):
                plan.drafts[slot] = drafts

    def follow(self, plan: Plan, result: Result, accepted: dict[int, int]) -> None:
        """After a step was settled: guess what comes next; learn what it cost and, by slot, how many drafts held."""
        if self._way == "off":
            return
        if accepted:
            self.drafted += sum(map(len, plan.drafts.values()))
            self.accepted += sum(accepted.values())
            self._payoff.checked(sum(accepted.values()) / len(accepted))
        began = time.perf_counter()
        guesses = self._way == "mtp" and (self._on or (bool(plan.chunks) and self._payoff.paying))
        if guesses:
            self._guess(plan, result)
        if self._auto and not plan.chunks and (plan.drafts or not guesses):
            self._payoff.timed(len(result.batch.tokens_T), result.seconds + time.perf_counter() - began)

    def _guess(self, plan: Plan, result: Result) -> None:
        """Let the MTP modules follow the step; their guesses are the drafts of the next one."""
        sequences = [*plan.rows, *(chunk.sequence for chunk in plan.chunks)] if plan.chunks else plan.rows
        for sequence in sequences:
            if sequence.slot >= 0 and len(sequence.token_ids) + 1 < sequence.limit:
                break
        else:
            return  # nobody will check a draft
        next_T = result.samples.tokens_R if not plan.chunks else _behind(plan, result)
        guesses_SD = self._backend.draft(result.batch, next_T, self._vocab)
        for sequence, guesses in zip(sequences, guesses_SD.tolist(), strict=True):
            sequence.drafts = guesses if min(guesses) >= 0 else []

    def _lookup(self, sequence: Sequence, count: int) -> list[int]:
        """Tokens that followed the last ones before."""
        if sequence.lookup is None:
            sequence.lookup = Lookup(sequence.prompt, self._vocab)
        return sequence.lookup.propose(sequence.token_ids, count)


def _behind(plan: Plan, result: Result) -> NDArray[np.int64]:
    """The token behind each of a batch with pieces of prompts; 0 where there is none, since the row failed."""
    batch, tokens_R = result.batch, result.samples.tokens_R
    next_T = np.append(batch.tokens_T[1:], 0).astype(np.int64)
    answers = int(batch.starts_S[len(plan.rows)])
    next_T[:answers] = tokens_R[:answers]
    for chunk, stop in zip(plan.chunks, batch.starts_S[len(plan.rows) + 1 :].tolist(), strict=True):
        place = chunk.start + chunk.count
        next_T[stop - 1] = next(iter(chunk.sequence.span(place, place + 1)), 0)
    return next_T

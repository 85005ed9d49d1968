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
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sprat.engine.backend import Backend
from sprat.engine.runner import StepResult
from sprat.engine.sampling.sampler import Sampler
from sprat.engine.sampling_params import TokenIds
from sprat.engine.scheduling.scheduler import Scheduler
from sprat.engine.sequence import ScheduledStep, Sequence
from sprat.errors import EngineError

SpeculationMode = Literal["auto", "ngram", "mtp", "off"]
NGRAM = 3  # tokens that must be the same before a draft
NGRAM_DRAFTS = 4  # drafted at once; MTP drafts one with each of its modules
MAX_ROWS = 16  # answers of one step above which weights are no longer what it waits for
PAUSE, TRIAL = 64, 4  # steps without drafts where they do not pay, and then with some to see whether they do now
EMA_WEIGHT = 0.1  # weight of the newest figure in a moving average


class NgramTable:
    """What followed every three tokens of one prompt and its answer, the latest place counting."""

    def __init__(self, prompt_ids: TokenIds, vocab: int) -> None:
        self._vocab, self._tokens, self._prompt = vocab, list(prompt_ids), len(prompt_ids)
        self._positions: dict[int, int] = {}
        self._num_indexed = NGRAM  # positions before this one are in the table

    def propose(self, output_ids: TokenIds, count: int) -> list[int]:
        """Up to ``count`` tokens that may follow prompt and output, which only grows; none if nothing is known."""
        tokens = self._tokens
        tokens.extend(output_ids[len(tokens) - self._prompt :])
        for position in range(self._num_indexed, len(tokens)):
            self._positions[self._key(position)] = position
        self._num_indexed = max(self._num_indexed, len(tokens))
        position = self._positions.get(self._key(len(tokens)), 0) if len(tokens) >= NGRAM else 0
        return tokens[position : position + count] if position else []

    def _key(self, position: int) -> int:
        """The three tokens before ``position`` as one number."""
        first, second, third = self._tokens[position - NGRAM : position]
        return (first * self._vocab + second) * self._vocab + third


class Payoff:
    """Measured: what a step of so many rows costs, and how many drafts are accepted.

    Attributes:
        paying: what was found last; True before anything is known.
    """

    def __init__(self) -> None:
        self.paying = True
        self._step_seconds: dict[int, float] = {}  # by powers of two of the rows
        self._accepted_per_row = 1.0  # tokens that a row with drafts gains beyond its own
        self._paused_steps = 0

    def pays(self, rows: int, drafts: int) -> bool:
        """Whether ``rows`` answers should be given ``drafts`` drafts each in the next step."""
        plain = self._step_seconds.get(rows.bit_length())
        drafted = self._step_seconds.get((rows * (1 + drafts)).bit_length())
        if plain is None:
            return False
        self.paying = drafted is None or (1 + self._accepted_per_row) * plain > drafted
        self._paused_steps = 0 if self.paying else (self._paused_steps + 1) % (PAUSE + TRIAL)
        return self.paying or self._paused_steps >= PAUSE

    def record_step(self, rows: int, seconds: float) -> None:
        """A step of ``rows`` rows took so long."""
        size = rows.bit_length()
        self._step_seconds[size] = _moving_average(self._step_seconds.get(size, seconds), seconds)

    def record_accepted(self, accepted: float) -> None:
        """So many drafts were accepted, for each answer that had some."""
        self._accepted_per_row = _moving_average(self._accepted_per_row, accepted)


def _moving_average(old: float, new: float) -> float:
    """The moving average."""
    return old + EMA_WEIGHT * (new - old)


class Speculation:
    """Gives drafts to the answers of a step, and learns from what came of them.

    Attributes:
        drafted, accepted: tokens so far.
        ngram_tables: by id of the request; dropped when it leaves.

    Raises:
        EngineError: ``mode`` is unknown, or is ``mtp`` and the back end has no module.
    """

    def __init__(self, mode: SpeculationMode, backend: Backend, vocab: int) -> None:
        if mode not in ("auto", "ngram", "mtp", "off"):
            raise EngineError(f"{mode!r} is no way to speculate", where="speculate", todo="auto, ngram, mtp or off")
        if mode == "mtp" and not backend.num_mtp_modules:
            todo = "use ngram, or a model with num_nextn_predict_layers"
            raise EngineError("this model has no MTP module to draft with", where="speculate", todo=todo)
        self._auto = mode == "auto"
        if mode == "auto":
            mode = "off" if not backend.batch_invariant else "mtp" if backend.num_mtp_modules else "ngram"
        self._mode, self._backend, self._vocab = mode, backend, vocab
        self._payoff = Payoff()
        self._drafting = False
        self.drafted = self.accepted = 0
        self.ngram_tables: dict[int, NgramTable] = {}

    def propose(self, step: ScheduledStep, scheduler: Scheduler, sampler: Sampler) -> None:
        """Fill ``step.drafts`` where a draft is at hand, there are blocks for it, and it is worth it."""
        if self._mode == "off":
            return
        step.drafts = {}
        max_drafts = NGRAM_DRAFTS if self._mode == "ngram" else self._backend.num_mtp_modules
        rows = len(step.decoding)
        self._drafting = rows <= MAX_ROWS and (not self._auto or self._payoff.pays(rows, max_drafts))
        if not self._drafting:
            for sequence in step.decoding if self._mode == "mtp" else ():
                sequence.draft_ids = []
            return
        for sequence in step.decoding:
            slot = sequence.slot
            count = min(max_drafts, sequence.max_tokens - len(sequence.output_ids) - 1)
            drafts: list[int] = []
            if count > 0 and sampler.supports_drafts[slot]:
                drafts = self._draft_ngram(sequence, count) if self._mode == "ngram" else sequence.draft_ids[:count]
            if drafts and scheduler.allocate_drafts(slot, len(drafts)):
                step.drafts[slot] = drafts

    def update(self, step: ScheduledStep, result: StepResult, accepted: dict[int, int]) -> None:
        """After a step: draft what comes next; learn what the step cost and, by slot, how many drafts were accepted."""
        if self._mode == "off":
            return
        if accepted:
            self.drafted += sum(map(len, step.drafts.values()))
            self.accepted += sum(accepted.values())
            self._payoff.record_accepted(sum(accepted.values()) / len(accepted))
        start_time = time.perf_counter()
        guesses = self._mode == "mtp" and (self._drafting or (bool(step.chunks) and self._payoff.paying))
        if guesses:
            self._draft_mtp(step, result)
        if self._auto and not step.chunks and (step.drafts or not guesses):
            self._payoff.record_step(len(result.batch.tokens_T), result.seconds + time.perf_counter() - start_time)

    def _draft_mtp(self, step: ScheduledStep, result: StepResult) -> None:
        """Let the MTP modules follow the step; what they guess are the drafts of the next one."""
        sequences = [*step.decoding, *(chunk.sequence for chunk in step.chunks)] if step.chunks else step.decoding
        if not any(s.slot >= 0 and len(s.output_ids) + 1 < s.max_tokens for s in sequences):
            return  # nobody will check a draft
        next_T = result.samples.tokens_R if not step.chunks else _next_tokens(step, result)
        drafts_SD = self._backend.draft(result.batch, next_T, self._vocab)
        for sequence, draft_ids in zip(sequences, drafts_SD.tolist(), strict=True):
            sequence.draft_ids = draft_ids if min(draft_ids) >= 0 else []

    def _draft_ngram(self, sequence: Sequence, count: int) -> list[int]:
        """Tokens that followed the last ones before."""
        if sequence.id not in self.ngram_tables:
            self.ngram_tables[sequence.id] = NgramTable(sequence.prompt_ids, self._vocab)
        return self.ngram_tables[sequence.id].propose(sequence.output_ids, count)


def _next_tokens(step: ScheduledStep, result: StepResult) -> NDArray[np.int64]:
    """The token behind each of a batch with pieces of prompts; 0 where there is none, since the row failed."""
    batch, tokens_R = result.batch, result.samples.tokens_R
    next_T = np.append(batch.tokens_T[1:], 0).astype(np.int64)
    answers = int(batch.starts_S[len(step.decoding)])
    next_T[:answers] = tokens_R[:answers]
    for chunk, stop in zip(step.chunks, batch.starts_S[len(step.decoding) + 1 :].tolist(), strict=True):
        position = chunk.start + chunk.count
        next_T[stop - 1] = next(iter(chunk.sequence.ids_between(position, position + 1)), 0)
    return next_T

"""What a request carries beyond numbers: small rules that change its own logits before anything is cut or sampled.

A processor is a function of the tokens so far: output tokens, which only grow, and drafted ones, which may be refused.
So nobody has to tell it that a token was accepted, that a draft was refused, or that the request was preempted and
came back. It may remember what it worked out about output tokens, and must not remember drafts.

The order is fixed: logit bias, penalties, bad words, the think budget, the caller's own, and the grammar last, because
only the last one has the last word on what is possible at all.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as GenericSequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sprat.engine.reasoning import ReasoningTracker, think_close_ids
from sprat.engine.sampling.grammar import GrammarCache
from sprat.engine.sampling.ops import Floats, not_finite
from sprat.engine.sampling.penalties import Penalties
from sprat.engine.sampling_params import Processor, Sampling, TokenIds
from sprat.engine.sequence import DEFAULT_TENANT, Sequence, Tenant
from sprat.errors import EngineError, SpratError
from sprat.tokens.chat import resolve_thinking
from sprat.tokens.tokenizer import Tokenizer

# What a step reads of a caller's processor, and whether it can.
_READ: dict[str, Callable[[Any], object]] = {
    "apply": callable,
    "starts_at": lambda at: isinstance(at, int | np.integer) and at is not True and at is not False and 0 <= at < 2**63,
    "supports_drafts": lambda flag: isinstance(flag, bool | np.bool_),
}
_ADVICE = (
    "give it apply, starts_at (was wakes; a whole number from 0 on), supports_drafts (was speculates; True or False)"
)


def build_processors(
    sampling: Sampling, prompt: TokenIds, tokenizer: Tokenizer, grammars: GrammarCache, tenant: Tenant = DEFAULT_TENANT
) -> tuple[Processor, ...]:
    """The processors of one answer of ``tenant``, in their order.

    Raises:
        EngineError: an id is not of this vocabulary, the grammar cannot be used, or a factory failed or gave what is no
            ``Processor``.
    """
    processors: list[Processor] = []
    vocab_size = tokenizer.vocab_size
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    if sampling.logit_bias:
        processors.append(LogitBias(dict(sampling.logit_bias), vocab_size))
    if (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) != (0, 0, 1):
        processors.append(Penalties(sampling, prompt, vocab_size))
    if sampling.bad_words:
        processors.append(BadWords(sampling.bad_words, tokenizer))
    if sampling.max_think_tokens is not None and sampling.thinking is not False:
        processors.append(ThinkBudget(tokenizer, sampling.thinking, sampling.max_think_tokens))
    for factory in sampling.processors:
        try:
            processors.append(processor := factory(prompt))
            lacks = [name for name, is_usable in _READ.items() if not is_usable(getattr(processor, name, None))]
        except Exception as error:  # the caller's own code
            fault = f"a processor cannot be made: {type(error).__name__}: {error}"
            raise EngineError(fault, where="processors", todo="mend it") from error
        if lacks:
            fault = f"{type(processor).__name__} has no usable {', '.join(lacks)}"
            raise EngineError(fault, where="processors", todo=_ADVICE)
    if sampling.response is not None:
        thinking = resolve_thinking(tokenizer, sampling.thinking, structured=sampling.is_structured)
        processors.append(grammars.grammar(sampling.response, thinking, tenant))
    return tuple(processors)


class NothingLeft(EngineError):
    """A request's own rules ban every token."""


def process_row(
    sequence: Sequence,
    processors: GenericSequence[Processor],
    logits_V: Floats,
    end_ids: list[int],
    draft_ids: TokenIds,
) -> SpratError | None:
    """Ban ``end_ids`` in the row of one request, unless that leaves nothing, and apply its processors, in place.

    Returns:
        the error that ends the request, if any.

    Raises:
        EngineError: the model's own logits are not finite.
    """
    if not np.isfinite(logits_V.max()):
        raise not_finite()
    if not end_ids:
        return _apply_processors(sequence, processors, logits_V, draft_ids)
    before_V = logits_V.copy()
    logits_V[end_ids] = -np.inf
    error = _apply_processors(sequence, processors, logits_V, draft_ids)
    if not isinstance(error, NothingLeft):
        return error
    logits_V[:] = before_V
    return _apply_processors(sequence, processors, logits_V, draft_ids)


def _apply_processors(
    sequence: Sequence, processors: GenericSequence[Processor], logits_V: Floats, draft_ids: TokenIds
) -> SpratError | None:
    """Apply processors to a row, in place; the error that ends the request, if any."""
    try:
        for processor in processors:
            given: object = processor.apply(logits_V, sequence.output_ids, draft_ids)  # type: ignore[func-returns-value]
            if given is not None and given is not logits_V:
                fault = f"{type(processor).__name__}.apply returned a {type(given).__name__}"
                raise EngineError(fault, where="processors", todo="change logits_V in place and return nothing")
    except SpratError as error:
        return error
    except Exception as error:  # a processor of the caller's may raise anything; only its own request pays
        todo = "mend the processor"
        return EngineError(f"a processor failed: {type(error).__name__}: {error}", where="processors", todo=todo)
    if np.isfinite(logits_V.max()):
        return None
    todo = "loosen bad_words, logit_bias, repetition_penalty, processors or response"
    return NothingLeft("the request's own rules leave no token to say", where="sampling", todo=todo)


class LogitBias:
    """Adds to the logits of some tokens."""

    starts_at, supports_drafts = 0, True

    def __init__(self, biases: dict[int, float], vocab_size: int) -> None:
        _check_ids("logit_bias", biases, vocab_size)
        self._ids = np.fromiter(biases, np.int64)
        self._biases = np.fromiter(biases.values(), np.float32)

    def apply(self, logits_V: NDArray[np.float32], output_ids: TokenIds, draft_ids: TokenIds) -> None:
        """See ``Processor``."""
        logits_V[self._ids] += self._biases


class BadWords:
    """Bans the last token of each word whose other tokens stand right before it.

    A string is banned as the tokenizer spells it, both at the beginning of a text and after a space. A model can
    spell it in other tokens; who must exclude a text in every spelling uses a regex or a stop string.
    """

    starts_at, supports_drafts = 0, True

    def __init__(self, words: tuple[str | tuple[int, ...], ...], tokenizer: Tokenizer) -> None:
        spellings: set[tuple[int, ...]] = set()
        for word in words:
            variants = (word, f" {word.lstrip()}") if isinstance(word, str) else ()
            spellings.update(tuple(tokenizer.encode(text)) for text in variants)
            spellings.update(() if isinstance(word, str) else (word,))
        for spelling in spellings:
            _check_ids("bad_words", spelling, tokenizer.vocab_size)
        self._single = np.array(sorted(ids[0] for ids in spellings if len(ids) == 1), np.int64)
        self._longer: dict[int, list[tuple[int, ...]]] = {}
        for ids in sorted(ids for ids in spellings if len(ids) > 1):
            self._longer.setdefault(ids[-2], []).append(ids)
        self._reach = max((len(ids) - 1 for ids in spellings), default=0)

    def apply(self, logits_V: NDArray[np.float32], output_ids: TokenIds, draft_ids: TokenIds) -> None:
        """See ``Processor``."""
        logits_V[self._single] = -np.inf
        if not self._longer:
            return
        tail = (*output_ids[-self._reach :], *draft_ids)
        for ids in self._longer.get(tail[-1], ()) if tail else ():
            if tail[1 - len(ids) :] == ids[:-1]:
                logits_V[ids[-1]] = -np.inf


class ThinkBudget:
    """Forces ``</think>``, token by token, once the reasoning has ``limit`` tokens."""

    supports_drafts = True

    def __init__(self, tokenizer: Tokenizer, thinking: bool | None, limit: int) -> None:
        self.starts_at = limit
        self._limit, self._close_ids = limit, think_close_ids(tokenizer)
        self._tracker = ReasoningTracker(tokenizer, thinking)

    def apply(self, logits_V: NDArray[np.float32], output_ids: TokenIds, draft_ids: TokenIds) -> None:
        """See ``Processor``."""
        tracker = self._tracker.advance(output_ids, draft_ids)
        if tracker.end is not None or tracker.start is None:
            return
        excess = tracker.num_tokens - tracker.start - self._limit
        if excess >= 0:
            logits_V.fill(-np.inf)
            logits_V[self._close_ids[excess % len(self._close_ids)]] = 0


def _check_ids(name: str, ids: TokenIds | dict[int, float], vocab_size: int) -> None:
    """Raise EngineError at the first id that the tokenizer does not have."""
    for index in ids:
        if index >= vocab_size:
            fault = f"{name} names token {index}, and the tokenizer has {vocab_size}"
            raise EngineError(fault, where=name, todo=f"give ids of 0 … {vocab_size - 1}")

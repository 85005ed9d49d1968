"""What a request carries beyond numbers: small rules that change its own logits before anything is cut or drawn.

A processor is a function of the tokens said so far: the settled ones, which only grow, and drafted ones, which may be
taken back. So nobody has to tell it that a token was accepted, that a draft was refused, or that the request was
pre-empted and came back. It may remember what it worked out about settled tokens, and must not remember drafts.

The order is fixed: logit bias, penalties, bad words, the think budget, the caller's own, and the grammar last, because
only the last one has the last word on what is possible at all.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sprat.engine.grammar import Grammars
from sprat.engine.penalties import Penalties
from sprat.engine.sampling import Sampling
from sprat.engine.sequence import NOBODY, Tenant
from sprat.engine.think import Thought, closing
from sprat.errors import EngineError
from sprat.tokens.chat import resolve_thinking
from sprat.tokens.tokenizer import Tokenizer

NEVER = np.iinfo(np.int64).max  # the position at which nothing wakes


class Processor(Protocol):
    """A rule of one answer; each answer has its own.

    Attributes:
        wakes: it changes nothing while fewer tokens than these were said; 0: from the first one on.
        speculates: whether ``ahead`` may hold anything; if not, nothing is drafted for its request.
    """

    wakes: int
    speculates: bool

    def apply(self, logits_V: NDArray[np.float32], said: Rows[int], ahead: Rows[int]) -> None:
        """Change ``logits_V`` in place, for the token that follows ``said`` and ``ahead``.

        Args:
            logits_V: float32, one per id of the tokenizer; -inf is "never".
            said: settled tokens of the answer; grows from call to call, and never changes otherwise.
            ahead: drafted tokens behind them.
        """
        ...


def build(
    sampling: Sampling, prompt: Rows[int], tokenizer: Tokenizer, grammars: Grammars, tenant: Tenant = NOBODY
) -> tuple[Processor, ...]:
    """The processors of one answer of ``tenant``, in their order.

    Raises:
        EngineError: an id is not of this vocabulary, the grammar cannot be used, or a maker failed.
    """
    made: list[Processor] = []
    vocab = tokenizer.vocab_size
    _known("stop_token_ids", sampling.stop_token_ids, vocab)
    if sampling.logit_bias:
        made.append(LogitBias(dict(sampling.logit_bias), vocab))
    if (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) != (0, 0, 1):
        made.append(Penalties(sampling, prompt, vocab))
    if sampling.bad_words:
        made.append(BadWords(sampling.bad_words, tokenizer))
    if sampling.max_think_tokens is not None and sampling.thinking is not False:
        made.append(ThinkBudget(tokenizer, sampling.thinking, sampling.max_think_tokens))
    for make in sampling.processors:
        try:
            made.append(make(prompt))
        except Exception as error:  # the caller's own code
            fault = f"a processor cannot be made: {type(error).__name__}: {error}"
            raise EngineError(fault, where="processors", todo="mend it") from error
    if sampling.response is not None:
        thinking = resolve_thinking(tokenizer, sampling.thinking, structured=True)
        made.append(grammars.grammar(sampling.response, thinking, tenant))
    return tuple(made)


class LogitBias:
    """Adds to the logits of some tokens."""

    wakes, speculates = 0, True

    def __init__(self, biases: dict[int, float], vocab: int) -> None:
        _known("logit_bias", biases, vocab)
        self._ids = np.fromiter(biases, np.int64)
        self._biases = np.fromiter(biases.values(), np.float32)

    def apply(self, logits_V: NDArray[np.float32], said: Rows[int], ahead: Rows[int]) -> None:
        """See ``Processor``."""
        logits_V[self._ids] += self._biases


class BadWords:
    """Bans the last token of each word whose other tokens were just said.

    A string is banned as the tokenizer spells it, both at the beginning of a text and after a space. A model can
    spell it in other tokens; who must exclude a text in every spelling uses a regex or a stop string.
    """

    wakes, speculates = 0, True

    def __init__(self, words: Rows[str | tuple[int, ...]], tokenizer: Tokenizer) -> None:
        spelled: set[tuple[int, ...]] = set()
        for word in words:
            both = (word, f" {word.lstrip()}") if isinstance(word, str) else ()
            spelled.update(tuple(tokenizer.encode(text)) for text in both)
            spelled.update(() if isinstance(word, str) else (word,))
        for one in spelled:
            _known("bad_words", one, tokenizer.vocab_size)
        self._single = np.array(sorted(ids[0] for ids in spelled if len(ids) == 1), np.int64)
        self._longer: dict[int, list[tuple[int, ...]]] = {}
        for ids in sorted(ids for ids in spelled if len(ids) > 1):
            self._longer.setdefault(ids[-2], []).append(ids)
        self._reach = max((len(ids) - 1 for ids in spelled), default=0)

    def apply(self, logits_V: NDArray[np.float32], said: Rows[int], ahead: Rows[int]) -> None:
        """See ``Processor``."""
        logits_V[self._single] = -np.inf
        if not self._longer:
            return
        tail = (*said[-self._reach :], *ahead)
        for ids in self._longer.get(tail[-1], ()) if tail else ():
            if tail[1 - len(ids) :] == ids[:-1]:
                logits_V[ids[-1]] = -np.inf


class ThinkBudget:
    """Forces ``</think>``, token by token, once the reasoning has ``limit`` tokens."""

    speculates = True

    def __init__(self, tokenizer: Tokenizer, thinking: bool | None, limit: int) -> None:
        self.wakes = limit
        self._limit, self._closing = limit, closing(tokenizer)
        self._thought = Thought(tokenizer, thinking)

    def apply(self, logits_V: NDArray[np.float32], said: Rows[int], ahead: Rows[int]) -> None:
        """See ``Processor``."""
        thought = self._thought.follow(said, ahead)
        if thought.end is not None or thought.begin is None:
            return
        over = thought.seen - thought.begin - self._limit
        if over >= 0:
            logits_V.fill(-np.inf)
            logits_V[self._closing[over % len(self._closing)]] = 0


def _known(name: str, ids: Rows[int] | dict[int, float], vocab: int) -> None:
    """Raise EngineError at the first id that the tokenizer does not have."""
    for index in ids:
        if index >= vocab:
            fault = f"{name} names token {index}, and the tokenizer has {vocab}"
            raise EngineError(fault, where=name, todo=f"give ids of 0 … {vocab - 1}")

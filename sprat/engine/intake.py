"""What is asked, checked before it costs anything: from a prompt to a request that will fit.

Everything that can be wrong with a request is found here, in the caller's thread, as one EngineError.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence as Rows

from sprat.config.model import ModelConfig
from sprat.engine.grammar import Grammars
from sprat.engine.processors import build
from sprat.engine.sampling import Sampling
from sprat.engine.sequence import NOBODY, Sequence, Tenant, noise_key
from sprat.errors import DataError, EngineError
from sprat.tokens import Message, Tokenizer, render

Prompt = str | Rows[Message] | Rows[int]


class Intake:
    """Makes numbered requests for one model.

    Args:
        cap: sampled tokens of one request at most; None: what the context holds.
        memory: tokens that the cache holds.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, grammars: Grammars, cap: int | None, memory: int
    ) -> None:
        self._tokenizer, self._grammars, self._memory = tokenizer, grammars, memory
        self._vocab, self.context = config.vocab_size, config.context
        self.cap = cap or self.context
        self._numbers = itertools.count(1)

    def ids(self, prompt: Prompt, sampling: Sampling) -> list[int]:
        """The ids of a prompt: a question, a conversation, or ids as they are.

        Raises:
            EngineError: it is empty, or not of this vocabulary; a role is unknown or has no place in the chat format;
                the model shall think and does not.
        """
        turns = [Message("user", prompt)] if isinstance(prompt, str) else [t for t in prompt if isinstance(t, Message)]
        if not prompt or (turns and not any(turn.content.strip() for turn in turns)):
            raise EngineError("the prompt is empty", where="prompt", todo="ask something")
        if isinstance(prompt, str) or len(turns) == len(prompt):
            try:
                return render(self._tokenizer, turns, thinking=sampling.thinking)
            except DataError as error:
                raise EngineError(error.what, where=error.where, todo=error.todo) from None
        ids = [int(index) for index in prompt if isinstance(index, int)]
        if len(ids) != len(prompt) or min(ids) < 0 or max(ids) >= self._vocab:
            fault = "the prompt holds what is no token of this model"
            raise EngineError(fault, where="prompt", todo=f"give ids of 0 … {self._vocab - 1}")
        return ids

    def sequence(
        self,
        ids: list[int],
        sampling: Sampling,
        *,
        stream: int = 0,
        share: int = 0,
        tenant: Tenant = NOBODY,
        event: threading.Event | None = None,
    ) -> Sequence:
        """A new request; ``stream`` numbers the answers that one prompt gets from one seed.

        Raises:
            EngineError: it asks for more tokens than the engine gives, or than the context or the memory holds; a
                setting names what this vocabulary does not have; the form of its response cannot be followed.
        """
        room = self.context - len(ids)
        wanted = min(self.cap, max(room, 1)) if sampling.max_tokens is None else sampling.max_tokens
        if sampling.fit:
            wanted = min(wanted, self.cap, max(1, min(room, self._memory - len(ids))))
        if wanted > self.cap:
            fault = f"max_tokens is {wanted}, and this engine gives {self.cap} at most"
            raise EngineError(fault, where="max_tokens", todo="ask for less")
        if wanted > room:
            fault = f"{len(ids)} prompt tokens and {wanted} more exceed the context of {self.context}"
            raise EngineError(fault, where="prompt", todo="shorten the prompt or lower max_tokens")
        if len(ids) + wanted > self._memory:
            fault = f"{len(ids)} prompt tokens and {wanted} more exceed the memory for {self._memory}"
            raise EngineError(fault, where="prompt", todo="ask for less, or give the engine more cache_bytes")
        return Sequence(
            id=next(self._numbers),
            prompt=ids,
            sampling=sampling,
            limit=wanted,
            key=noise_key(sampling.seed, stream, ids),
            share=share,
            tenant=tenant,
            event=event,
            ban=max(1, sampling.min_think_tokens) if sampling.thinking else 0,
            processors=build(sampling, ids, self._tokenizer, self._grammars, tenant),
        )


def ends(config: ModelConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer: those of the tokenizer and its folder, and those of config.json that are control."""
    named = config.eos_token_id
    listed = {named} if isinstance(named, int) else set(named or ())
    return tokenizer.eos_token_ids | (listed & tokenizer.control_ids)

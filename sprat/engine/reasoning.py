"""Where the reasoning of an answer begins and ends, read from its tokens as they come.

With think tags that are tokens this is a comparison. With tags that are ordinary text, ``</think>`` may be spelled by
any tokens and may begin inside one and end inside another, so the bytes are followed. ``Detokenizer`` draws the same
line for what the user reads; a test holds the two together.
"""

from __future__ import annotations

import copy

from sprat.engine.sampling_params import TokenIds
from sprat.tokens.chat import resolve_thinking
from sprat.tokens.tokenizer import Tokenizer


def think_close_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that spell ``</think>``: one where it is a token, else several."""
    close_id = tokenizer.special_ids.think_close
    return (close_id,) if close_id >= 0 else tokenizer.encode_cached(tokenizer.chat_format.think_tags[1])


def has_think_tokens(tokenizer: Tokenizer) -> bool:
    """Whether both think tags are tokens of their own."""
    return min(tokenizer.special_ids.think_open, tokenizer.special_ids.think_close) >= 0


class ReasoningTracker:
    """Follows one answer.

    Args:
        thinking: how its prompt was rendered; None: the model may open a think block itself.

    Attributes:
        num_tokens: tokens followed so far.
        start: index of the first token of the reasoning; None: there is none, or not yet.
        end: index of the first token of the content; None: it has not begun.
        tail: with tags of text, the last bytes, which may be the beginning of a tag.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool | None) -> None:
        self._tokenizer, self._has_think_tokens = tokenizer, has_think_tokens(tokenizer)
        open_tag, close_tag = tokenizer.chat_format.think_tags
        self._open_tag, self._close_tag = open_tag.encode(), close_tag.encode()
        self.num_tokens, self.tail = 0, b""
        thinking = resolve_thinking(tokenizer, thinking)
        self.start: int | None = 0 if thinking else None
        self.end: int | None = 0 if thinking is False else None

    @property
    def is_reasoning(self) -> bool:
        """Whether the next token belongs to the reasoning (or ends it)."""
        return self.start is not None and self.end is None

    def advance(self, output_ids: TokenIds, draft_ids: TokenIds = ()) -> ReasoningTracker:
        """The state after output and drafts; only ``output_ids``, which may grow but not change, are remembered."""
        for token in output_ids[self.num_tokens :] if self.end is None else ():
            self._push(token)
        if not draft_ids or self.end is not None:
            return self
        drafted = copy.copy(self)
        for token in draft_ids:
            drafted._push(token)
        return drafted

    def _push(self, token: int) -> None:
        """Follow one token more."""
        self.num_tokens += 1
        if self.end is not None:
            return
        if self._has_think_tokens:
            ids = self._tokenizer.special_ids
            if self.start is None:
                self.start, self.end = (1, None) if token == ids.think_open else (None, 0)
            elif token == ids.think_close:
                self.end = self.num_tokens
            return
        self.tail += self._tokenizer.token_bytes(token)
        if self.start is None:
            self.tail = self.tail.lstrip()
            if not self.tail.startswith(self._open_tag):
                self.end = None if self._open_tag.startswith(self.tail) else 0
                return
            self.start, self.tail = self.num_tokens, self.tail.removeprefix(self._open_tag)
        if self._close_tag in self.tail:
            self.end = self.num_tokens
        self.tail = self.tail[1 - len(self._close_tag) :]

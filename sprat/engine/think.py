"""Where the reasoning of an answer begins and ends, read from its tokens as they come.

With think tags that are tokens this is a comparison. With tags that are ordinary text, ``</think>`` may be spelled by
any tokens and may begin inside one and end inside another, so the bytes are followed. ``text.Reader`` draws the same
line for what the user reads; a test holds the two together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence as Rows

from sprat.tokens.chat import resolve_thinking
from sprat.tokens.tokenizer import Tokenizer


def closing(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that spell ``</think>``: one where it is a token, else several."""
    close = tokenizer.special_ids.think_close
    return (close,) if close >= 0 else tokenizer.encode_cached(tokenizer.chat_format.think_tags[1])


def tagged(tokenizer: Tokenizer) -> bool:
    """Whether both think tags are tokens of their own."""
    return min(tokenizer.special_ids.think_open, tokenizer.special_ids.think_close) >= 0


class Thought:
    """Follows one answer.

    Args:
        thinking: how its prompt was rendered; None: the model may open a think block itself.

    Attributes:
        seen: tokens followed so far.
        begin: index of the first token of the reasoning; None: there is none, or not yet.
        end: index of the first token of the content; None: it has not begun.
        tail: with tags of text, the last bytes, which may be the beginning of a tag.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool | None) -> None:
        self._tokenizer, self._tagged = tokenizer, tagged(tokenizer)
        opening, ending = tokenizer.chat_format.think_tags
        self._open, self._close = opening.encode(), ending.encode()
        self.seen, self.tail = 0, b""
        thinking = resolve_thinking(tokenizer, thinking)
        self.begin: int | None = 0 if thinking else None
        self.end: int | None = 0 if thinking is False else None

    @property
    def reasons(self) -> bool:
        """Whether the next token belongs to the reasoning (or ends it)."""
        return self.begin is not None and self.end is None

    def follow(self, said: Rows[int], ahead: Rows[int] = ()) -> Thought:
        """The state after ``said`` and ``ahead``; only ``said``, which may grow but not change, is remembered."""
        for token in said[self.seen :] if self.end is None else ():
            self._feed(token)
        if not ahead or self.end is not None:
            return self
        further = copy.copy(self)
        for token in ahead:
            further._feed(token)
        return further

    def _feed(self, token: int) -> None:
        """Follow one token more."""
        self.seen += 1
        if self.end is not None:
            return
        if self._tagged:
            ids = self._tokenizer.special_ids
            if self.begin is None:
                self.begin, self.end = (1, None) if token == ids.think_open else (None, 0)
            elif token == ids.think_close:
                self.end = self.seen
            return
        self.tail += self._tokenizer.token_bytes(token)
        if self.begin is None:
            self.tail = self.tail.lstrip()
            if not self.tail.startswith(self._open):
                self.end = None if self._open.startswith(self.tail) else 0
                return
            self.begin, self.tail = self.seen, self.tail.removeprefix(self._open)
        if self._close in self.tail:
            self.end = self.seen
        self.tail = self.tail[1 - len(self._close) :]

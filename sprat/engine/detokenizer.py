"""From token ids to streamed text: whole characters, the think block, stop strings.

Three things do not end where a token ends. A character may be spread over several byte tokens, so text
is let go only up to the last whole character. A stop string may begin in one token and end in a later
one, so text that could be the beginning of a stop string is held back until it is decided. And for
tokenizers whose think tags are ordinary text, ``</think>`` is found in the same way. What a detokenizer gives
in pieces is what ``chat.split`` gives at once; a test holds the two equal. Line breaks that a format puts around its
think tags go, so those at the end of the reasoning are held back until it is closed; all others stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sprat.engine.sequence import Delta
from sprat.tokens.chat import Answer, resolve_thinking
from sprat.tokens.tokenizer import Tokenizer

Kind = Literal["reasoning", "content"]

WINDOW = 16  # tokens that are decoded together, at most
CHARACTER_TOKENS = 4  # tokens that one character may be spread over: UTF-8 writes it in four bytes at most


class IncrementalDecoder:
    """Ids to text, piece by piece; the pieces concatenated are the text of all ids.

    Each token is decoded together with those before it, and the window slides whatever they are, so that the cost of
    a token is bounded. Its last tokens stay. They hold all that later tokens can change, since four bytes show where a
    character begins, wherever one starts to read; and the latest token must not come first, where it loses its space.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_emitted = 0  # characters of the window that were given out

    def push(self, token: int) -> str:
        """The text that ``token`` completes.

        A character that is not whole yet is decoded as one U+FFFD at the end, so all before it is final.
        """
        if not self._tokenizer.is_visible(token):
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window, skip_special_tokens=True)
        complete = text.removesuffix("\ufffd")
        piece = complete[self._num_emitted :]
        self._num_emitted = max(self._num_emitted, len(complete))
        if len(self._window) > WINDOW:
            remaining = len(text) - self._num_emitted
            self._window = self._window[-CHARACTER_TOKENS:]
            self._num_emitted = len(self._tokenizer.decode(self._window, skip_special_tokens=True)) - remaining
        return piece

    def flush(self) -> str:
        """What is left, with U+FFFD where a character never became whole."""
        piece = self._tokenizer.decode(self._window, skip_special_tokens=True)[self._num_emitted :]
        self._window, self._num_emitted = [], 0
        return piece


class Detokenizer:
    """Follows one answer token by token.

    Args:
        thinking: how the prompt was rendered (see ``chat.render``).
        stops: strings that end the content.
        structured: the content has a form that was asked for, so all of it stays.
        min_tokens: a stop string that is whole within so many tokens is text like any other.

    Attributes:
        stop: the stop string that came; empty while none has.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        thinking: bool | None,
        stops: Sequence[str] = (),
        structured: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._tokens_before_stops = min_tokens
        thinking = resolve_thinking(tokenizer, thinking, structured=structured)
        self._decoder = IncrementalDecoder(tokenizer)
        tags = tokenizer.chat_format.think_tags
        self._tags = None if min(tokenizer.special_ids.think_open, tokenizer.special_ids.think_close) >= 0 else tags
        self._state: Kind | Literal["start"] = "start" if thinking is None else "reasoning" if thinking else "content"
        self._structured = structured
        # Line breaks at the tags
        self._trims_newlines = {"reasoning": "\n" in "".join(tokenizer.chat_format.think_delimiters), "content": False}
        self._leading_blanks: list[str] = []  # what stands before the first word, while it may be a tag
        self._buffer = ""  # decoded, may be the beginning of a delimiter
        self._num_searched = 0  # characters at its end in which a stop string may end
        self._pending_newlines = 0  # line breaks that go if the reasoning is closed here
        self._emitted: dict[str, list[str]] = {"reasoning": [], "content": []}
        self.stop = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return bool(self.stop)

    @property
    def is_reasoning(self) -> bool:
        """Whether text that comes now belongs to the reasoning."""
        return self._state == "reasoning"

    def push(self, token: int) -> list[Delta]:
        """The pieces of text that ``token`` lets go."""
        ids = self._tokenizer.special_ids
        self._tokens_before_stops -= 1
        if self._tags is None and self._state == "start" and token != ids.think_open:
            self._state = "content"
        if token in self._tokenizer.eos_token_ids or self.stopped:
            return []
        if self._tags is None:
            if self._state == "start":
                self._state = "reasoning"
                return []
            if self._state == "reasoning" and token == ids.think_close:
                deltas = self._append(self._decoder.flush(), is_last=True)
                self._end_reasoning()
                return deltas
        return self._append(self._decoder.push(token))

    def close(self) -> list[Delta]:
        """The last pieces; call once, when no token will come any more."""
        if self.stopped:
            return []
        deltas = self._append(self._decoder.flush(), is_last=True)
        if self._state == "reasoning":  # it was cut, not closed
            self._emit("reasoning", "\n" * self._pending_newlines, deltas)
        return deltas

    def answer(self) -> Answer:
        """The whole text so far."""
        reasoning, content = ("".join(self._emitted[kind]) for kind in ("reasoning", "content"))
        return Answer(reasoning, content, closed=self._state != "reasoning")

    def _end_reasoning(self) -> None:
        """Leave the reasoning."""
        self._state, self._pending_newlines = "content", 0
        self._trims_newlines["content"] = self._trims_newlines["reasoning"] and not self._structured

    def _emit(self, kind: Kind, text: str, deltas: list[Delta]) -> None:
        """Give out ``text``."""
        if text:
            self._emitted[kind].append(text)
            deltas.append(Delta(kind, text))

    def _append(self, text: str, *, is_last: bool = False) -> list[Delta]:
        """Sort new text into channels; ``is_last``: nothing more comes in this channel."""
        self._buffer += text
        self._num_searched = self._num_searched + len(text) if self._tokens_before_stops < 0 else 0
        deltas: list[Delta] = []
        if self._state == "start" and (self._tags is None or not self._find_open_tag(is_last)):
            return deltas
        if self._state == "reasoning":
            delimiters = (self._tags[1],) if self._tags else ()
            delimiter = self._release("reasoning", delimiters, deltas, is_last)
            if not delimiter:
                return deltas
            self._end_reasoning()
        self.stop = self._release("content", self._stops, deltas, is_last)
        return deltas

    def _find_open_tag(self, is_last: bool) -> bool:
        """Decide, for text tags, whether the model opened a think block; False while it is open."""
        opening = self._tags[0] if self._tags else ""
        stripped = self._buffer.lstrip()
        self._leading_blanks.append(self._buffer[: len(self._buffer) - len(stripped)])
        self._buffer = stripped
        if stripped.startswith(opening):
            self._state, self._buffer = "reasoning", stripped.removeprefix(opening)
        elif is_last or not opening.startswith(stripped):
            self._state, self._buffer = "content", "".join([*self._leading_blanks, stripped])
        return self._state != "start"

    def _release(self, kind: Kind, delimiters: Sequence[str], deltas: list[Delta], is_last: bool) -> str:
        """Let go what of the buffer cannot belong to a delimiter; the one that came (it is cut out), or nothing.

        Of several delimiters the one that is complete first counts, so that the cut does not depend on the tokens.
        """
        before = len(self._buffer) - self._num_searched if kind == "content" else 0
        places = ((self._buffer.find(text, max(0, before + 1 - len(text))), text) for text in delimiters)
        matches = [(start, text) for start, text in places if start >= 0]
        start, delimiter = min(matches, key=lambda pair: (pair[0] + len(pair[1]), pair[0]), default=(-1, ""))
        if delimiter:
            text, self._buffer = self._buffer[:start], self._buffer[start + len(delimiter) :]
        else:
            num_held = 0 if is_last else _overlap(self._buffer, delimiters)
            size = len(self._buffer) - num_held
            text, self._buffer = self._buffer[:size], self._buffer[size:]
        self._num_searched = min(self._num_searched, len(self._buffer))
        if self._trims_newlines[kind] and not self._emitted[kind]:
            text = text.lstrip("\n")
        if self._trims_newlines[kind] and kind == "reasoning":
            stripped = text.rstrip("\n")
            newlines, pending = len(text) - len(stripped), self._pending_newlines
            text = "\n" * pending + stripped if stripped else ""
            self._pending_newlines = newlines if stripped else pending + newlines
        self._emit(kind, text, deltas)
        return delimiter


def _overlap(text: str, delimiters: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that is the beginning of a delimiter.

    >>> _overlap("abc<", ["</x>"]), _overlap("abc", ["</x>"])
    (1, 0)
    """
    sizes = (n for tag in delimiters for n in range(1, min(len(tag), len(text) + 1)) if text.endswith(tag[:n]))
    return max(sizes, default=0)

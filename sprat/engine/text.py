"""From token ids to streamed text: whole characters, the think block, stop strings.

Three things do not end where a token ends. A character may be spread over several byte tokens, so text
is let go only up to the last whole character. A stop string may begin in one token and end in a later
one, so text that could be the beginning of a stop string is held back until it is decided. And for
tokenizers whose think tags are ordinary text, ``</think>`` is found in the same way. What a reader gives
in pieces is what ``chat.split`` gives at once; a test holds the two equal. Line breaks that a format puts around its
think tags go, so those at the end of the reasoning are held back until it is closed; all others stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sprat.engine.sequence import Delta
from sprat.tokens.chat import Answer, resolve_thinking
from sprat.tokens.tokenizer import Tokenizer

WINDOW = 16  # tokens that are decoded together, at most
CHARACTER = 4  # tokens that one character may be spread over: UTF-8 writes it in four bytes at most


class Decoder:
    """Ids to text, piece by piece; the pieces concatenated are the text of all ids.

    Each token is decoded together with those before it, and the window slides whatever they say, so that the cost of
    a token is bounded. Its last tokens stay. They hold all that later tokens can change, since four bytes show where a
    character begins, wherever one starts to read; and what was said last must not come first, where it loses its space.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0  # characters of the window that were given out

    def push(self, token: int) -> str:
        """The text that ``token`` completes.

        A character that is not whole yet is decoded as one U+FFFD at the end, so all before it is final.
        """
        if not self._tokenizer.is_visible(token):
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window, skip_special_tokens=True)
        whole = text.removesuffix("\ufffd")
        piece = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        if len(self._window) > WINDOW:
            left = len(text) - self._shown
            self._window = self._window[-CHARACTER:]
            self._shown = len(self._tokenizer.decode(self._window, skip_special_tokens=True)) - left
        return piece

    def flush(self) -> str:
        """What is left, with U+FFFD where a character never became whole."""
        piece = self._tokenizer.decode(self._window, skip_special_tokens=True)[self._shown :]
        self._window, self._shown = [], 0
        return piece


class Reader:
    """Follows one answer token by token.

    Args:
        thinking: how the prompt was rendered (see ``chat.render``).
        stops: strings that end the content; ``stopped`` tells that one came.
        structured: the content has a form that was asked for, so all of it stays.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, thinking: bool | None, stops: Sequence[str] = (), structured: bool = False
    ) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        thinking = resolve_thinking(tokenizer, thinking, structured=structured)
        self._decoder = Decoder(tokenizer)
        tags = tokenizer.chat_format.think_tags
        self._tags = None if min(tokenizer.special_ids.think_open, tokenizer.special_ids.think_close) >= 0 else tags
        self._state: Literal["start", "reasoning", "content"] = (
            "start" if thinking is None else "reasoning" if thinking else "content"
        )
        self._structured = structured
        self._trims = {
            "reasoning": "\n" in "".join(tokenizer.chat_format.think_delimiters),
            "content": False,
        }  # line breaks at the tags
        self._blanks: list[str] = []  # what stands before the first word, while it may be a tag
        self._held = ""  # decoded, may be the beginning of a mark
        self._breaks = 0  # line breaks that go if the reasoning is closed here
        self._said: dict[str, list[str]] = {"reasoning": [], "content": []}
        self.stopped = False

    def push(self, token: int) -> list[Delta]:
        """The pieces of text that ``token`` lets go."""
        ids = self._tokenizer.special_ids
        if token in self._tokenizer.eos_token_ids or self.stopped:
            return []
        if self._tags is None:
            if self._state == "start":
                self._state = "reasoning" if token == ids.think_open else "content"
                if token == ids.think_open:
                    return []
            elif self._state == "reasoning" and token == ids.think_close:
                found = self._text(self._decoder.flush(), last=True)
                self._turn()
                return found
        return self._text(self._decoder.push(token))

    def close(self) -> list[Delta]:
        """The last pieces; call once, when no token will come any more."""
        if self.stopped:
            return []
        found = self._text(self._decoder.flush(), last=True)
        if self._state == "reasoning":  # it was cut, not closed
            self._say("reasoning", "\n" * self._breaks, found)
        return found

    def answer(self) -> Answer:
        """All that was said so far."""
        reasoning, content = ("".join(self._said[kind]) for kind in ("reasoning", "content"))
        return Answer(reasoning, content, closed=self._state != "reasoning")

    def _turn(self) -> None:
        """Leave the reasoning."""
        self._state, self._held, self._breaks = "content", "", 0
        self._trims["content"] = self._trims["reasoning"] and not self._structured

    def _say(self, kind: Literal["reasoning", "content"], text: str, found: list[Delta]) -> None:
        """Give out ``text``."""
        if text:
            self._said[kind].append(text)
            found.append(Delta(kind, text))

    def _text(self, text: str, *, last: bool = False) -> list[Delta]:
        """Sort new text into channels; ``last``: nothing more comes in this channel."""
        self._held += text
        found: list[Delta] = []
        if self._state == "start" and (self._tags is None or not self._opened(last)):
            return found
        if self._state == "reasoning":
            marks = (self._tags[1],) if self._tags else ()
            mark = self._release("reasoning", marks, found, last)
            if not mark:
                return found
            held = self._held
            self._turn()
            self._held = held
        if self._release("content", self._stops, found, last):
            self.stopped = True
        return found

    def _opened(self, last: bool) -> bool:
        """Decide, for text tags, whether the model opened a think block; False while it is open."""
        opening = self._tags[0] if self._tags else ""
        bare = self._held.lstrip()
        self._blanks.append(self._held[: len(self._held) - len(bare)])
        self._held = bare
        if bare.startswith(opening):
            self._state, self._held = "reasoning", bare.removeprefix(opening)
        elif last or not opening.startswith(bare):
            self._state, self._held = "content", "".join([*self._blanks, bare])
        return self._state != "start"

    def _release(
        self, kind: Literal["reasoning", "content"], marks: Sequence[str], found: list[Delta], last: bool
    ) -> bool:
        """Let go what of the held text cannot belong to a mark; True if a mark came (it is cut out).

        Of several marks the one that is complete first counts, so that the cut does not depend on the tokens.
        """
        found_at = ((self._held.find(mark), mark) for mark in marks if mark in self._held)
        at, mark = min(found_at, key=lambda pair: (pair[0] + len(pair[1]), pair[0]), default=(-1, ""))
        if mark:
            free, self._held = self._held[:at], self._held[at + len(mark) :]
        else:
            keep = 0 if last else _overlap(self._held, marks)
            free, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if self._trims[kind] and not self._said[kind]:
            free = free.lstrip("\n")
        if self._trims[kind] and kind == "reasoning":
            bare = free.rstrip("\n")
            breaks = len(free) - len(bare)
            free, self._breaks = ("\n" * self._breaks + bare, breaks) if bare else ("", self._breaks + breaks)
        self._say(kind, free, found)
        return bool(mark)


def _overlap(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that is the beginning of a mark.

    >>> _overlap("abc<", ["</x>"]), _overlap("abc", ["</x>"])
    (1, 0)
    """
    longest = 0
    for mark in marks:
        for size in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:size]):
                longest = size
                break
    return longest

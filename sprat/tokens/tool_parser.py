"""Reads the calls of tools out of an answer while it comes.

The rule. A call begins with the ``{`` of its arguments, after an opening tag and the name of a tool that there is.
From there on it is a call whatever follows: its arguments are given out as the model writes them, up to the bracket
that closes them, and what an answer that is cut off leaves open stays open. All that is no call is content, tags
included: a tag behind which no such head stands, a tool that there is not, text behind a call. Nothing is lost but
blanks before a call and after one, the strings of the format around a call, and further members of its object.

An object that has its members in another order, or its arguments as a string of JSON, is read when it is whole. One
without arguments calls with ``{}``.

How the text is cut into pieces changes nothing in what comes out: what may be the beginning of a tag is held back, and
so are blanks, until it is known what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from sprat.tokens.tool_formats import ToolFormat
from sprat.tokens.tool_json import Brackets, read_call, read_string

HALF = "\ufffd"  # what comes of a character that was cut off
HEAD_CHARS = 1024  # of what stands between the opening tag and the arguments


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of ``name``; ``index`` counts the calls of an answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the arguments of a call; all of them are the text of one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The arguments of a call are whole, or will not become so any more."""

    index: int


Piece = Content | CallBegin | CallArguments | CallEnd


class ToolCallParser:
    """The calls in one answer.

    Args:
        tool_format: how the model writes them.
        names: the tools that there are; None: any.

    >>> from sprat.tokens.tool_formats import HERMES
    >>> parser = ToolCallParser(HERMES, ["now"])
    >>> parser.push('Well. <tool_call>{"name": "now", "arg')
    [Content(text='Well.')]
    >>> parser.push('uments": {"zone": ')
    [CallBegin(index=0, name='now'), CallArguments(index=0, text='{"zone": ')]
    >>> parser.push('"CET"}}</tool_call>') + parser.close()
    [CallArguments(index=0, text='"CET"}'), CallEnd(index=0)]
    """

    def __init__(self, tool_format: ToolFormat, names: Collection[str] | None = None) -> None:
        self._format, self._names = tool_format, None if names is None else frozenset(names)
        tags = (tool_format.body[2].strip().replace("}", ""), tool_format.call[1], tool_format.calls[1])
        self._closers: tuple[str, ...] = tags if tool_format.has_tags else (tool_format.separator.strip(),)
        self._buffer, self._opening = "", ""  # text that waits; what stands before it where it may be a call
        self._step: Callable[[bool], bool] = self._read_text
        self._brackets, self._position = Brackets(), 0
        self._index, self._after_call, self._closed_by, self._is_whole = -1, False, 0, False
        self._pieces: list[Piece] = []

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._index + 1

    @property
    def has_whole_calls(self) -> bool:
        """Whether there are calls, and the arguments of each are all there."""
        return self.num_calls > 0 and self._is_whole

    def push(self, text: str) -> list[Piece]:
        """What is known now that ``text`` came."""
        self._buffer += text
        return self._run(is_end=False)

    def close(self, *, is_cut: bool = False) -> list[Piece]:
        """What is left when the answer is at its end.

        Args:
            is_cut: it was not the model that ended it: what may have been the beginning of a call is no content.
        """
        if is_cut and self._step in (self._read_head, self._read_text):
            if self._step == self._read_head or self._after_call:
                self._buffer, self._step = "", self._read_text
            elif self._format.has_tags:
                self._buffer = self._buffer[: self._held_from(self._buffer)]
        return self._run(is_end=True)

    def _run(self, *, is_end: bool) -> list[Piece]:
        self._pieces = []
        while self._step(is_end):
            pass
        return self._pieces

    def _say(self, text: str) -> None:
        """Give out content."""
        if text:
            self._after_call = False
            last = self._pieces[-1] if self._pieces else None
            if isinstance(last, Content):
                self._pieces[-1] = Content(last.text + text)
            else:
                self._pieces.append(Content(text))

    # Each step reads from the buffer and returns whether another one may follow.

    def _read_text(self, is_end: bool) -> bool:
        """Content, up to what may open a call."""
        if not self._format.has_tags:
            return self._read_start(is_end)
        buffer, tag = self._buffer, self._format.call[0]
        start = buffer.find(tag)
        if start >= 0:
            before, end = buffer[:start].rstrip().removesuffix(self._format.calls[0]).rstrip(), start + len(tag)
            self._say(before)
            self._opening, self._buffer = buffer[len(before) : end], buffer[end:]
            self._brackets, self._position, self._step = Brackets(), 0, self._read_head
            return True
        if is_end:
            self._end_text()
        else:
            hold = self._held_from(buffer)
            self._say(buffer[:hold])
            self._buffer = buffer[hold:]
        return False

    def _read_start(self, is_end: bool) -> bool:
        """Where no tag opens a call: the first bracket of an answer does, or the one behind a call."""
        text = self._buffer.lstrip()
        if text.startswith("{"):
            self._opening, self._buffer = self._buffer[: -len(text)], text
            self._brackets, self._position, self._step = Brackets(), 0, self._read_head
            return True
        if text:
            self._step = self._read_plain
            return True
        if is_end:
            self._end_text()
        return False

    def _read_plain(self, is_end: bool) -> bool:
        """Content, to the end."""
        self._say(self._buffer)
        self._buffer = ""
        return False

    def _end_text(self) -> None:
        """Give out what was held back; blanks behind the last call are none of it."""
        if not (self._after_call and self._buffer.isspace()):
            self._say(self._buffer)
        self._buffer = ""

    def _held_from(self, text: str) -> int:
        """Where the end of ``text`` begins that may yet open a call."""
        first, tag = self._format.calls[0], self._format.call[0]
        hold = len(_without_beginning(text, tag).rstrip())
        if first and text[:hold].endswith(first):
            return len(text[: hold - len(first)].rstrip())
        return min(hold, len(_without_beginning(text, first).rstrip())) if first else hold

    def _read_head(self, is_end: bool) -> bool:
        """Tool and opening bracket; or it is no call."""
        text = self._buffer.lstrip()
        self._opening += self._buffer[: len(self._buffer) - len(text)]
        self._buffer = text
        tried, is_json = self._position, self._format.is_json
        match = self._format.head.match(text, 0, HEAD_CHARS + 1) if tried <= HEAD_CHARS else None
        if match is not None:
            name = read_string(match["name"]) if is_json else match["name"].strip()
            return self._begin(name, match.end()) if self._is_tool(name) else self._give_up()
        if not is_json:
            self._position = len(text)
            is_over = is_end or len(text) > HEAD_CHARS or self._format.call[1] in text
            return self._give_up() if is_over else False
        if text and text[0] != "{":
            return self._give_up()
        self._position, is_whole = self._brackets.advance(text, tried)
        if is_whole:
            return self._read_object(self._position) or self._give_up()
        return self._give_up() if is_end else False

    def _is_tool(self, name: str) -> bool:
        return bool(name) and (self._names is None or name in self._names)

    def _begin(self, name: str, length: int) -> bool:
        """A call, whose arguments stand behind ``length`` characters."""
        self._index, self._is_whole = self._index + 1, False
        self._pieces.append(CallBegin(self._index, name))
        self._buffer, self._brackets, self._step = self._buffer[length:], Brackets(), self._read_arguments
        return True

    def _give_up(self) -> bool:
        """It is no call: the tag is content, and what stands behind it is read as if there were none."""
        tag = self._opening.rstrip()
        self._say(tag)
        self._buffer = self._opening[len(tag) :] + self._buffer
        self._opening, self._step = "", self._read_text if self._format.has_tags else self._read_plain
        return True

    def _read_object(self, length: int) -> bool:
        """Take a whole object whose head is another; False where it is no call."""
        call = read_call(self._buffer[:length])
        if call is None or not self._is_tool(call[0]):
            return False
        name, arguments = call
        self._begin(name, length)
        self._pieces.append(CallArguments(self._index, arguments))
        self._is_whole = True
        return self._end_call(self._read_closers)

    def _read_arguments(self, is_end: bool) -> bool:
        """Arguments, as they come."""
        end, is_whole = self._brackets.advance(self._buffer, 0)
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        if text:
            self._pieces.append(CallArguments(self._index, text))
        self._is_whole = is_whole and self._brackets.depth <= 0
        if self._is_whole and self._format.is_json:
            return self._end_call(self._read_rest)
        if is_whole or is_end:
            return self._end_call(self._read_closers)
        return False

    def _end_call(self, step: Callable[[bool], bool]) -> bool:
        self._pieces.append(CallEnd(self._index))
        self._opening, self._after_call, self._closed_by, self._step = "", True, 0, step
        return True

    def _read_rest(self, is_end: bool) -> bool:
        """The end of the object around name and arguments; members behind these are passed over."""
        text = self._buffer.lstrip()
        if text[:1] == ",":
            self._brackets, self._buffer, self._step = Brackets(1), text, self._skip_members
        elif text or is_end:
            self._buffer = text[1:] if text[:1] == "}" else self._buffer
            self._step = self._read_closers
        return bool(text) or is_end

    def _skip_members(self, is_end: bool) -> bool:
        end, is_whole = self._brackets.advance(self._buffer, 0)
        self._buffer = self._buffer[end:]
        if is_whole or is_end:
            self._step = self._read_closers
        return is_whole or is_end

    def _read_closers(self, is_end: bool) -> bool:
        """The strings that close a call, each of which may be missing."""
        text = self._buffer.lstrip()
        pending = [closer for closer in self._closers[self._closed_by :] if closer]
        for number, closer in enumerate(self._closers[self._closed_by :], self._closed_by + 1):
            if closer and text.startswith(closer):
                self._buffer, self._closed_by = text[len(closer) :], number
                return True
        if any(closer.startswith(text.rstrip(HALF)) for closer in pending):
            if is_end:  # a closing tag that was cut off, or blanks
                self._buffer = ""
            return False
        self._step = self._read_text
        return True


def _without_beginning(text: str, tag: str) -> str:
    """``text`` without the longest beginning of ``tag`` with which it ends, and half a character behind that.

    >>> _without_beginning("a <tool", "<tool_call>")
    'a '
    """
    known = text.rstrip(HALF)
    for length in range(min(len(tag) - 1, len(known)), 0, -1):
        if known.endswith(tag[:length]):
            return known[:-length]
    return text

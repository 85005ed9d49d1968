"""One choice of an answer: what the engine says of it, as events."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from sprat.serve.custom_tools import InputReader
from sprat.serve.engine_client import JobEvent
from sprat.serve.events import (
    ChoiceFinished,
    EndedBy,
    Event,
    FinishReason,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
)
from sprat.serve.generation import Tool

if TYPE_CHECKING:
    from sprat.tokens.tool_parser import Piece, ToolCallParser

TokenBytes = Callable[[int], bytes]


class Choice:
    """Follows one choice.

    Args:
        parser: finds calls in its content; None where none may come.
        token_bytes: what an id stands for.
        echo: what the answer begins with: the prompt.
        names: of control tokens, which may stand for no bytes.
        has_form: its content, where it is no call, is JSON, in which a tag is a letter like any other.
        tools: by the names that the model knows them by.
    """

    def __init__(
        self,
        index: int,
        parser: ToolCallParser | None,
        token_bytes: TokenBytes,
        echo: str | None = None,
        names: Mapping[int, bytes] | None = None,
        has_form: bool = False,
        tools: Mapping[str, Tool] | None = None,
    ) -> None:
        self._tools = tools or {}
        self._input: InputReader | None = None  # of the call that comes, where it is one of a custom tool
        self._has_form = has_form
        self.index, self._parser, self._token_bytes, self._echo = index, parser, token_bytes, echo
        self._names = names or {}

    def push(self, event: JobEvent) -> list[Event]:
        """A piece of text, or what the prompt was worth."""
        logprobs = tuple(self._logprob(*token) for token in event.logprobs)
        if event.kind == "prompt":
            echo, self._echo = self._echo, None
            return [] if echo is None else [TextDelta(self.index, "content", echo, logprobs)]
        return self._echoed(self._push(event, logprobs))

    def _echoed(self, events: list[Event]) -> list[Event]:
        """``events``, after the prompt where it was not said yet."""
        echo, self._echo = self._echo, None
        return events if echo is None else [TextDelta(self.index, "content", echo), *events]

    def _push(self, event: JobEvent, logprobs: tuple[TokenLogprob, ...]) -> list[Event]:
        blanks: list[Event] = []
        if self._has_form and event.kind == "content" and (text := event.text.lstrip()):
            self._has_form = False
            if self._parser is not None and not text.startswith("<"):
                blanks, self._parser = self._events(self._parser.close()), None
        if event.kind == "content" and self._parser is not None:
            events = self._events(self._parser.push(event.text))
            return [TextDelta(self.index, "content", "", logprobs), *events] if logprobs else events
        kind: Literal["reasoning", "content"] = "reasoning" if event.kind == "reasoning" else "content"
        return [*blanks, TextDelta(self.index, kind, event.text, logprobs)]

    def finish(self, event: JobEvent, ended_by: EndedBy) -> list[Event]:
        """The end, and what was held back."""
        parser, is_cut = self._parser, event.finish_reason != "stop" or bool(event.stop)
        events = self._echoed([] if parser is None else self._events(parser.close(is_cut=is_cut)))
        reason: FinishReason = "length" if event.finish_reason == "length" else "stop"
        if parser is not None and parser.has_whole_calls and event.finish_reason == "stop":
            reason = "tool_calls"
        cancelled = event.finish_reason == "cancelled"
        return [*events, ChoiceFinished(self.index, reason, event.stop, ended_by if cancelled else "")]

    def _logprob(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> TokenLogprob:
        def spelled(token: int) -> bytes:
            return self._token_bytes(token) or self._names.get(token, b"")

        others = tuple((spelled(each), value) for each, value in top)
        return TokenLogprob(spelled(token), logprob, others, hidden=not self._token_bytes(token))

    def _events(self, pieces: Sequence[Piece]) -> list[Event]:
        from sprat.tokens.tool_parser import CallArguments, CallBegin, Content

        events: list[Event] = []
        for piece in pieces:
            if isinstance(piece, Content):
                events.append(TextDelta(self.index, "content", piece.text))
            elif isinstance(piece, CallBegin):
                call_id, tool = f"call_{secrets.token_hex(12)}", self._tools.get(piece.name, Tool(piece.name))
                self._input = InputReader() if tool.is_custom else None
                named = (tool.member or tool.name, tool.is_custom, tool.namespace)
                events.append(ToolCallDelta(self.index, piece.index, "", call_id, *named))
            elif isinstance(piece, CallArguments):
                text = piece.text if self._input is None else self._input.push(piece.text)
                if text or self._input is None:
                    events.append(ToolCallDelta(self.index, piece.index, text, is_custom=self._input is not None))
        return events

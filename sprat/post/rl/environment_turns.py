"""The turns of an episode between text and tokens: the first prompt, what the model said, and what it is told next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sprat.errors import DataError
from sprat.eval.tasks import problem_messages
from sprat.post.rl.environment_worker import Row
from sprat.post.rl.rewards import Response, parse_response
from sprat.tasks import Problem
from sprat.tokens import Tokenizer, render
from sprat.tokens.chat import Message, ToolCall
from sprat.tokens.next_turn import encode_next_turn
from sprat.tokens.tool_formats import ToolFormat
from sprat.tokens.tool_parser import CallArguments, CallBegin, Content, ToolCallParser
from sprat.tokens.tool_render import select_readable_format, select_tool_format


@dataclass
class Turn:
    """What the model said in one turn: the text beside its calls, and the response that all of it is."""

    content: str
    calls: list[ToolCall]
    response: Response

    def rows(self) -> list[Row]:
        """The calls for the environment; arguments that are no JSON stay the text that they are."""
        return [{"name": call.name, "arguments": _value(call.arguments), "id": call.id} for call in self.calls]


class TurnFormat:
    """How the turns of one model are written and read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._tool_format: ToolFormat | None = None

    @property
    def tool_format(self) -> ToolFormat:
        """How calls are written so that they can be read: the model's own form, or Hermes' in plain text."""
        if self._tool_format is None:
            self._tool_format = select_readable_format(select_tool_format(self.tokenizer), is_auto=True)
        return self._tool_format

    def prompt_ids(self, problem: Problem | None, reply: Row, thinking: bool | None) -> list[int]:
        """The first prompt.

        Args:
            problem: that the environment was given; None where it has its own.
            reply: of its ``reset``.

        Raises:
            DataError: there is no question, or the model's chat format has no place for it.
        """
        messages = _first_messages(problem, reply)
        own = self.tool_format if reply["tools"] else None
        return render(self.tokenizer, messages, thinking=thinking, tools=reply["tools"], tool_format=own)

    def read(self, ids: Sequence[int], tools: Sequence[Row], thinking: bool | None, *, finished: bool) -> Turn:
        """The text of a turn, and the calls of ``tools`` in it."""
        response = parse_response(self.tokenizer, ids, thinking=thinking, finished=finished)
        if not tools or not response.closed:
            return Turn(response.content, [], response)
        names = [str(tool.get("function", tool).get("name", "")) for tool in tools]
        content, calls = read_calls(response.content, self.tool_format, names)
        return Turn(content, calls, replace(response, content=content))

    def next_ids(self, turn: Turn, rows: Sequence[Row], thinking: bool | None) -> list[int]:
        """The tokens of what the environment said behind ``turn``, up to where the model goes on.

        Raises:
            DataError: the model's chat format has no place for it.
        """
        messages = [Message(row["role"], row["content"], tool_call_id=row.get("tool_call_id", "")) for row in rows]
        own = self.tool_format if any(message.role == "tool" for message in messages) else None
        return encode_next_turn(self.tokenizer, messages, calls=turn.calls, thinking=thinking, tool_format=own)


def read_calls(text: str, tool_format: ToolFormat, names: Sequence[str]) -> tuple[str, list[ToolCall]]:
    """The text beside the calls of an answer, and the calls.

    >>> from sprat.tokens.tool_formats import HERMES
    >>> read_calls('Well.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', HERMES, ["f"])
    ('Well.', [ToolCall(name='f', arguments='{"a": 1}', id='call_0')])
    """
    parser = ToolCallParser(tool_format, names)
    content, calls = "", list[ToolCall]()
    for piece in parser.push(text) + parser.close():
        if isinstance(piece, Content):
            content += piece.text
        elif isinstance(piece, CallBegin):
            calls.append(ToolCall(piece.name, "", f"call_{piece.index}"))
        elif isinstance(piece, CallArguments):
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + piece.text)
    return content, calls


def _first_messages(problem: Problem | None, reply: Row) -> list[Message]:
    """The conversation that an episode begins with.

    A text of ``reset`` stands behind the problem's question, as in TRL; messages stand in its place.

    Raises:
        DataError: there is none.
    """
    if reply["messages"] is not None:
        return [Message(row["role"], row["content"]) for row in reply["messages"]]
    said = reply["content"] or ""
    messages = [] if problem is None else problem_messages(problem)
    if messages and said:
        return [*messages[:-1], replace(messages[-1], content=messages[-1].content + said)]
    if not messages and not said.strip():
        raise DataError("reset asked nothing, and there is no question of yours", where="reset", todo="return a text")
    return messages or [Message("user", said)]


def _value(arguments: str) -> object:
    try:
        value: object = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value

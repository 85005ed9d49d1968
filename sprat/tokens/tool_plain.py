"""Tools in the plain turns of any chat format, for models that have no form of calls which could be read.

Such is our own format, a base model's, and whatever a foreign template writes that we do not know; and a family whose
calls nothing marks (Llama 3), where the model shall choose whether to call. All of them are told of tools in the words
of Hermes, as ``llama.cpp``'s generic format and vLLM's parsers by text do with other words: the schemas stand in the
system message, or before the first question where the format has none, calls in the answer, and results, all of a row
together, in a question. Tags are text like any other, so that no vocabulary needs them; ``tool_parser`` and the grammar
of calls read text as well.

Text can be written by anybody: here a question may spell a result. Where tags are tokens of the model, it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

from sprat.errors import DataError
from sprat.tokens.chat_formats import ChatFormat
from sprat.tokens.chat_tools import Tools
from sprat.tokens.messages import Message
from sprat.tokens.tool_formats import HERMES
from sprat.tokens.tool_turns import hermes_schemas, write_calls

Turn = tuple[str, str]  # role and content


def plain_turns(chat_format: ChatFormat, messages: Sequence[Message], tools: Tools) -> list[Turn]:
    """A conversation with tools as one of questions and answers.

    Raises:
        DataError: the format has no system message, and there is no question.
    """
    turns: list[Turn] = []
    for before, message in zip([None, *messages], messages, strict=False):
        role, content = _plain(message)
        if joint := _joint(chat_format, before, message):
            turns[-1] = role, turns[-1][1] + joint + content
        else:
            turns.append((role, content))
    return _with_schemas(chat_format, turns, tools) if tools else turns


def _plain(message: Message) -> Turn:
    """A message as a question or an answer."""
    if message.role == "tool":
        return "user", f"<tool_response>\n{message.content}\n</tool_response>"
    calls = "".join(text for text, _ in write_calls(HERMES, message))
    return message.role, message.content + ("\n" if message.content and calls else "") + calls


def _joint(chat_format: ChatFormat, before: Message | None, message: Message) -> str:
    """What joins a message to the one before it; nothing where it is a turn of its own."""
    if before is None or not {before.role, message.role} <= {"user", "tool"}:
        return ""
    if before.role == message.role:
        return "\n" if message.role == "tool" else ""
    return "\n\n" if chat_format.strict_alternation else ""


def _with_schemas(chat_format: ChatFormat, turns: list[Turn], tools: Tools) -> list[Turn]:
    """``turns``, told of tools in the system message or before the first question."""
    schemas = "".join(text for text, _ in hermes_schemas(tools))
    if chat_format.system is not None:
        system = turns[0][1] if turns[0][0] == "system" else ""
        said = f"{system}\n\n{schemas}" if system else schemas
        return [("system", said), *(turns[1:] if turns[0][0] == "system" else turns)]
    first = next((index for index, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        what = "this model is told of tools in the first question, and there is none"
        raise DataError(what, where="messages", todo="begin with a question")
    return [*turns[:first], ("user", f"{schemas}\n\n{turns[first][1]}"), *turns[first + 1 :]]

"""The turns of a conversation with tools in the words of each family, in parts: ours, and the caller's.

What stands around questions and answers is the chat format's; here are schemas, calls and results. Several results in
a row are one turn where the family has it so. What a family has no place for is said in what it has: Llama 3 calls one
tool at a time, so calls beside each other are joined by ``"; "``, and it writes nothing beside a call.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sprat.errors import DataError
from sprat.tokens import tool_formats
from sprat.tokens.chat_formats import FORMATS, ChatFormat, Part, drop_past_reasoning, strip_blanks
from sprat.tokens.chat_tools import Tools
from sprat.tokens.messages import Message
from sprat.tokens.tool_formats import ToolFormat

_HERMES_BEFORE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
_HERMES_AFTER = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
_DEEPSEEK_BEFORE = "## Tools\nYou have access to the following tools:\n"
_DEEPSEEK_AFTER = """
IMPORTANT: ALWAYS adhere to this exact format for tool use:
{example}

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
{several}
"""
_SEVERAL = {
    "deepseek_v3_1": "- For multiple tool calls, chain them directly without separators or spaces",
    "deepseek_v3": "- For multiple tool calls, put each on a line of its own",
}
_LLAMA_BEFORE = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


@dataclass(frozen=True)
class TurnStyle:
    """How turns with tools are written.

    Attributes:
        keeps_reasoning: whether answers behind the last question keep their reasoning.
        blank_system: whether schemas stand behind an empty system message where there is none.
        is_plain: whether it is text in the turns of any chat format; see ``tool_plain``.
    """

    tool_format: ToolFormat
    keeps_reasoning: bool = False
    blank_system: bool = False
    is_plain: bool = False

    def opens_answer(self, messages: Sequence[Message]) -> bool:
        """Whether an answer to ``messages`` is opened; DeepSeek's goes on where the results end."""
        return not self.tool_format.calls[0] or messages[-1].role != "tool"


def write_turns(style: TurnStyle, chat_format: ChatFormat, messages: Sequence[Message], tools: Tools) -> list[Part]:
    """A conversation in parts, without what opens the next answer and with dates not yet filled in.

    Raises:
        DataError: a system message is not the first, a role is unknown, or the format has no place for one of them.
    """
    system = messages[0].content if messages[0].role == "system" else None
    turns = messages[1:] if system is not None else messages
    for turn in turns:
        if turn.role not in ("user", "assistant", "tool"):
            fault = f"unknown role {turn.role!r}" if turn.role != "system" else "a system message that is not the first"
            raise DataError(fault, where="messages", todo="use system for the first message only")
    if style.tool_format is tool_formats.HERMES:
        return _hermes_opening(style, chat_format, system, tools) + _hermes_turns(style, chat_format, turns)
    if style.tool_format is tool_formats.LLAMA3:
        return _llama_opening(chat_format, system, tools) + _llama_turns(chat_format, turns, tools)
    return _deepseek_opening(style, chat_format, system, tools) + _deepseek_turns(style, chat_format, turns)


def _system_wrapping(chat_format: ChatFormat, system: str | None) -> tuple[str, Part | None, str]:
    """What stands before a system message, the message or the one that the format has of its own, and what behind."""
    base = next(each for each in FORMATS if each.name == chat_format.name)
    opening, closing = chat_format.system or base.system or ("", "")
    prefix = chat_format.first_user_prefix
    text: Part | None = None
    if system is not None:
        text = strip_blanks(chat_format, "system", system), False
    elif len(prefix) >= len(opening) + len(closing) and prefix.startswith(opening) and prefix.endswith(closing):
        text = prefix[len(opening) : len(prefix) - len(closing)], True
    return opening, text, closing.removesuffix(chat_format.user[0])


def _plain_opening(chat_format: ChatFormat, system: str | None) -> list[Part]:
    """What stands before the first turn where there are no schemas."""
    if system is None:
        return [(chat_format.first_user_prefix.removesuffix(chat_format.user[0]), True)]
    opening, text, closing = _system_wrapping(chat_format, system)
    return [(opening, True), *([text] if text else []), (closing, True)]


def _hermes_opening(style: TurnStyle, chat_format: ChatFormat, system: str | None, tools: Tools) -> list[Part]:
    """The system message, with the schemas behind it."""
    if not tools:
        return _plain_opening(chat_format, system)
    opening, text, closing = _system_wrapping(chat_format, system)
    text = ("", True) if text is None and style.blank_system else text
    return [(opening, True), *([text, ("\n\n", True)] if text else []), *hermes_schemas(tools), (closing, True)]


def hermes_schemas(tools: Tools) -> list[Part]:
    """What says in the words of Hermes which tools there are, and how to call them."""
    parts: list[Part] = [(_HERMES_BEFORE, True)]
    for tool in tools:
        parts += [("\n", True), (_json(tool), False)]
    return [*parts, (_HERMES_AFTER, True)]


def _hermes_turns(style: TurnStyle, chat_format: ChatFormat, turns: Sequence[Message]) -> list[Part]:
    """Questions, answers with calls, and results, which are questions."""
    parts: list[Part] = []
    last_query = max((n for n, turn in enumerate(turns) if turn.role == "user" and not _is_result(turn)), default=-1)
    for index, turn in enumerate(turns):
        if turn.role == "tool":
            is_first = index == 0 or turns[index - 1].role != "tool"
            is_last = index == len(turns) - 1 or turns[index + 1].role != "tool"
            before = (chat_format.user[0] if is_first else "\n") + "<tool_response>\n"
            after = "\n</tool_response>" + (chat_format.user[1] if is_last else "")
            parts += [(before, True), (turn.content, False), (after, True)]
        elif turn.role == "user":
            parts += _question(chat_format, turn)
        else:
            reasoning, content = _split(chat_format, turn)
            parts.append((chat_format.assistant[0], True))
            if reasoning and style.keeps_reasoning and index > last_query:
                opening, closing = chat_format.think_delimiters
                parts += [(opening, True), (reasoning.strip("\n"), False), (closing, True)]
                content = content.lstrip("\n")
            parts += [(content, False), ("\n" if content and turn.tool_calls else "", True)]
            parts += [*write_calls(style.tool_format, turn), (chat_format.assistant[1], True)]
    return parts


def _is_result(turn: Message) -> bool:
    """Whether a question is a result that its caller has written as one."""
    return turn.content.startswith("<tool_response>") and turn.content.endswith("</tool_response>")


def _split(chat_format: ChatFormat, turn: Message) -> tuple[str, str]:
    """Reasoning and content of an answer of the past, whose content may hold both."""
    content = drop_past_reasoning(chat_format, "assistant", turn.content)
    opening, closing = chat_format.think_tags
    within = turn.content.partition(closing)[0].rpartition(opening)[2] if content != turn.content else ""
    return turn.reasoning or within, strip_blanks(chat_format, "assistant", content)


def _question(chat_format: ChatFormat, turn: Message) -> list[Part]:
    """A question between what stands around it."""
    return [
        (chat_format.user[0], True),
        (strip_blanks(chat_format, "user", turn.content), False),
        (chat_format.user[1], True),
    ]


def write_calls(tool_format: ToolFormat, turn: Message) -> list[Part]:
    """The calls of an answer."""
    if not turn.tool_calls:
        return []
    before, between, after = tool_format.body
    parts: list[Part] = [(tool_format.calls[0], True)]
    for number, call in enumerate(turn.tool_calls):
        arguments = _object(call.arguments) if tool_format.is_json else call.arguments
        parts += [((tool_format.separator if number else "") + tool_format.call[0] + before, True), (call.name, False)]
        parts += [(between, True), (arguments, False), (after + tool_format.call[1], True)]
    return [*parts, (tool_format.calls[1], True)]


def _deepseek_opening(style: TurnStyle, chat_format: ChatFormat, system: str | None, tools: Tools) -> list[Part]:
    """The system message, with the schemas behind it."""
    if not tools:
        return _plain_opening(chat_format, system)
    opening, text, closing = _system_wrapping(chat_format, system)
    parts: list[Part] = [(opening, True), *([text] if text else []), ("\n\n" + _DEEPSEEK_BEFORE, True)]
    for function in map(_function, tools):
        parts += [("\n### ", True), (str(function.get("name") or ""), False), ("\nDescription: ", True)]
        parts += [(str(function.get("description") or ""), False), ("\n\nParameters: ", True)]
        parts += [(_json(function.get("parameters") or {}), False), ("\n", True)]
    form = style.tool_format
    example = form.write([("tool_call_name", "tool_call_arguments")]).removesuffix(form.calls[1])
    example += "{additional_tool_calls}" + form.calls[1]
    after = _DEEPSEEK_AFTER.replace("{several}", _SEVERAL[form.name]).replace("{example}", example)
    return [*parts, (after + closing, True)]


def _deepseek_turns(style: TurnStyle, chat_format: ChatFormat, turns: Sequence[Message]) -> list[Part]:
    """Questions, answers with calls, and results, behind which the answer goes on."""
    parts: list[Part] = []
    in_groups = style.tool_format is tool_formats.DEEPSEEK_V3
    for index, turn in enumerate(turns):
        role_before = turns[index - 1].role if index else "user"
        if turn.role == "user":
            parts += _question(chat_format, turn)
        elif turn.role == "assistant":
            parts += [
                (chat_format.assistant[0] if role_before == "user" else "", True),
                (_split(chat_format, turn)[1], False),
            ]
            parts += [*write_calls(style.tool_format, turn), (chat_format.assistant[1], True)]
        else:
            before, after = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
            if in_groups:
                before = ("\n" if role_before == "tool" else "<｜tool▁outputs▁begin｜>") + before
                is_last = index == len(turns) - 1 or turns[index + 1].role != "tool"
                after += "<｜tool▁outputs▁end｜>" if is_last else ""
            parts += [(before, True), (turn.content, False), (after, True)]
    return parts


def _llama_opening(chat_format: ChatFormat, system: str | None, tools: Tools) -> list[Part]:
    """The system message, which says that there are tools."""
    if not tools:
        return _plain_opening(chat_format, system)
    opening, text, closing = _system_wrapping(chat_format, system)
    header, mark, rest = opening.partition("<|end_header_id|>\n\n")
    return [(header + mark + "Environment: ipython\n" + rest, True), *([text] if text else []), (closing, True)]


def _llama_turns(chat_format: ChatFormat, turns: Sequence[Message], tools: Tools) -> list[Part]:
    """Questions, of which the first has the schemas, answers or calls, and results as JSON."""
    if tools and (not turns or turns[0].role != "user"):
        todo = "begin with a question"
        raise DataError(
            "this model is told of tools in the first question, and there is none", where="messages", todo=todo
        )
    parts: list[Part] = []
    for index, turn in enumerate(turns):
        if turn.role == "user":
            question = _question(chat_format, turn)
            if index == 0 and tools:
                schemas = [part for tool in tools for part in ((_json(tool, indent=4), False), ("\n\n", True))]
                question[1:1] = [(_LLAMA_BEFORE, True), *schemas]
            parts += question
        elif turn.role == "tool":
            before = chat_format.user[0].replace("user", "ipython")
            parts += [(before, True), (_json(turn.content), False), (chat_format.user[1], True)]
        else:
            said: list[Part] = [(_split(chat_format, turn)[1], False)]
            said = write_calls(tool_formats.LLAMA3, turn) if turn.tool_calls else said
            parts += [(chat_format.assistant[0], True), *said, (chat_format.assistant[1], True)]
    return parts


def _function(tool: Any) -> Any:
    """The function that a tool is."""
    return tool.get("function", tool)


def _json(value: Any, indent: int | None = None) -> str:
    """JSON as templates write it."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _object(text: str) -> str:
    """The text of an object as templates write it; text that is none as it is."""
    try:
        return _json(json.loads(text))
    except (ValueError, RecursionError):
        return text

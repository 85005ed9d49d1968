"""Conversations with tools: written by our own code where the model's template would write the same, else by that.

A template is foreign code, and a process of its own for every prompt takes a tenth of a second; and it writes what a
caller says among its own text, so that nobody could tell afterwards who wrote a control token. So the three families
that have a form for calls (``tool_formats``) are written here, in parts, what the caller says as plain text. Once for
each template, probes show whether ours is its text; if not, the template goes on writing (``chat_tools``), and a
conversation with it of which a text spells a control token is refused. A model whose template knows no tools is told of
them in the words of its family, one that has no family in plain text (``tool_plain``). A template that writes calls in
a form of its own has no ``ToolFormat``: nobody could read them. Whoever has to asks for another (``tool_format``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sprat.errors import DataError
from sprat.tokens import tool_formats
from sprat.tokens.chat_formats import (
    SPRAT_TEMPLATE,
    ChatFormat,
    Part,
    fill_dates,
    render_parts,
    select_generation_prompt,
)
from sprat.tokens.chat_template import run_worker
from sprat.tokens.chat_tools import ChatTemplate, Tools, render_tool_turns, style_rows, texts_of, tool_support
from sprat.tokens.messages import Message, ToolCall
from sprat.tokens.tool_formats import ToolFormat
from sprat.tokens.tool_plain import plain_turns
from sprat.tokens.tool_turns import TurnStyle, write_turns

if TYPE_CHECKING:
    from sprat.tokens.tokenizer import Tokenizer

_STYLES = {
    "chatml": (
        TurnStyle(tool_formats.HERMES),
        TurnStyle(tool_formats.HERMES, keeps_reasoning=True),
        TurnStyle(tool_formats.HERMES, blank_system=True),
    ),
    "deepseek": (TurnStyle(tool_formats.DEEPSEEK_V3_1), TurnStyle(tool_formats.DEEPSEEK_V3)),
    "llama3": (TurnStyle(tool_formats.LLAMA3),),
}
_PLAIN = TurnStyle(tool_formats.HERMES, is_plain=True)


@dataclass(frozen=True)
class ToolTurns:
    """How turns with tools are written and read.

    Attributes:
        style: how we write them; None: only the template can.
        tool_format: the form of the model's calls; None: it has none that we know.
    """

    style: TurnStyle | None
    tool_format: ToolFormat | None


def select_tool_format(tokenizer: Tokenizer) -> ToolFormat | None:
    """The form in which a model calls tools; None where it has one of its own that we cannot read.

    The first question about a template takes a process; the answer is kept.
    """
    return find_tool_turns(tokenizer.chat_format, tokenizer.find_template("tool_use")).tool_format


def select_readable_format(own: ToolFormat | None, *, is_auto: bool) -> ToolFormat:
    """The form in which a model is to call tools so that the calls can be read.

    Args:
        own: what ``select_tool_format`` says.
        is_auto: it may choose whether to call, so that a call must be told from text.
    """
    return tool_formats.HERMES if own is None or (is_auto and not own.has_tags) else own


def render_with_tools(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Tools,
    *,
    thinking: bool | None = None,
    add_generation_prompt: bool = True,
    tool_format: ToolFormat | None = None,
) -> list[Part]:
    """A conversation with tools, in parts; see ``chat.render``.

    Where reasoning is expected the prompt opens it, and where none may be it closes it, also behind results, where some
    templates write nothing.

    Raises:
        DataError: see ``chat.render``.
    """
    chat_format = tokenizer.chat_format
    prompt = select_generation_prompt(chat_format, thinking) if add_generation_prompt else ""
    own = find_tool_turns(chat_format, tokenizer.find_template("tool_use"))
    style = own.style if tool_format in (None, own.tool_format) else _PLAIN
    if style is not None and style.is_plain:
        turns = plain_turns(chat_format, messages, tools)
        return render_parts(chat_format, turns, thinking=thinking, add_generation_prompt=add_generation_prompt)
    if style is None:
        (text,) = render_by_template(tokenizer, [(messages, add_generation_prompt)], tools)
        opening = chat_format.generation_prompt
        replaces = add_generation_prompt and thinking is not None and text.endswith(opening)
        return [(text.removesuffix(opening) + prompt if replaces else text, True)]
    parts = write_turns(style, chat_format, messages, tools)
    if add_generation_prompt and not style.opens_answer(messages):
        thinks = chat_format.default_thinking if thinking is None else thinking
        closed = chat_format.no_thinking_prompt.removeprefix(chat_format.generation_prompt)
        prompt = chat_format.think_delimiters[0] if thinks else closed if thinks is False else ""
    parts.append((prompt, True))
    return [(fill_dates(text) if is_template else text, is_template) for text, is_template in parts]


def render_by_template(
    tokenizer: Tokenizer, conversations: Sequence[tuple[Sequence[Message], bool]], tools: Tools
) -> list[str]:
    """What the model's template writes of conversations, each with or without the assistant's opening behind it.

    Raises:
        DataError: it has no tools or refuses; a text spells a control token, or holds a NUL.
    """
    template = tokenizer.find_template("tool_use")
    if template is None:
        todo = "leave out the conversations with tools, or take a model whose template has them"
        raise DataError("the model has no chat template that writes tools", where="messages", todo=todo)
    rows = [([_row(message) for message in messages], is_open) for messages, is_open in conversations]
    for text in texts_of([[row for turns, _ in rows for row in turns], list(tools)]):
        if "\0" in text or (token := tokenizer.find_control_token(text)):
            what = "holds a NUL" if "\0" in text else f"spells the control token {token!r}"
            raise DataError(f"a text beside tools {what}", where="messages", todo="leave out this conversation")
    return render_tool_turns(template, rows, tools)


def _row(message: Message) -> dict[str, Any]:
    """A message as transformers' templates take it."""
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        row["reasoning_content"] = row["thinking"] = message.reasoning  # templates read either
    if message.tool_calls:
        calls = [(call, {"name": call.name, "arguments": call.arguments}) for call in message.tool_calls]
        named = [({"id": call.id} if call.id else {}) | {"type": "function", "function": own} for call, own in calls]
        row["tool_calls"] = named
    if message.tool_call_id:
        row["tool_call_id"] = message.tool_call_id
    return row


_CALL = ToolCall("MarkCallKram", '{"MarkKeyKram": {"é": [1, "MarkValueKram\\n"]}}', "Call12345")
_SECOND = ToolCall("MarkSecondKram", "{}", "Call12346")
_RESULT = Message("tool", 'Mark "ResultKram"\né', tool_call_id="Call12345")
_USER, _ANSWER = Message("user", "MarkUserKram"), Message("assistant", "MarkAnswerKram")
_CALLS = Message("assistant", "", tool_calls=(_CALL,))
_THOUGHT = Message("assistant", "MarkContentKram", "MarkReasonKram", tool_calls=(_CALL,))
# Those that a family does not have are left out for it.
_PARALLEL = (
    (_USER, Message("assistant", "", tool_calls=(_CALL, _SECOND)), _RESULT, _RESULT),
    (_USER, Message("assistant", "MarkContentKram", tool_calls=(_CALL, _SECOND)), _RESULT, _RESULT, _ANSWER, _USER),
)
_CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    (_USER, _CALLS, _RESULT),
    (_USER, _ANSWER, _USER, _CALLS, _RESULT, _CALLS, _RESULT),
    (_USER, _CALLS, _RESULT, _ANSWER, _USER),
    (Message("system", "MarkSystemKram"), _USER, _CALLS, _RESULT, _ANSWER, _USER),
    (_USER, _THOUGHT, _RESULT, _ANSWER, _USER),
    (_USER, _THOUGHT, _RESULT),
)
_QUESTIONS: tuple[tuple[Message, ...], ...] = (
    (_USER,),
    (Message("system", "MarkSystemKram"), _USER),
    (_USER, _ANSWER, _USER),
)
_FUNCTION = {
    "name": "MarkCallKram",
    "description": 'Does "it", é.',
    "parameters": {
        "type": "object",
        "properties": {"MarkKeyKram": {"type": "string", "description": "It."}},
        "required": ["MarkKeyKram"],
    },
}
_TOOLS: tuple[dict[str, Any], ...] = (
    {"type": "function", "function": _FUNCTION},
    {"type": "function", "function": {**_FUNCTION, "name": "MarkSecondKram"}},
)


@lru_cache(maxsize=16)
def find_tool_turns(chat_format: ChatFormat, template: ChatTemplate | None) -> ToolTurns:
    """How turns with tools are written and read for a chat format whose folder has ``template``, or none."""
    styles = _STYLES.get(chat_format.name, ())
    plain = ToolTurns(_PLAIN, _PLAIN.tool_format)
    own = ToolTurns(styles[0], styles[0].tool_format) if styles else plain
    support = tool_support(template) if template is not None and template.text != SPRAT_TEMPLATE else None
    if template is None or support is None or (support.style is None and not support.has_schemas):
        return own
    foreign = ToolTurns(None, None) if support.style else plain  # whose calls only its template can write, if it can
    if not styles:
        return foreign
    talks = [*(_CONVERSATIONS if support.style else ()), *(_QUESTIONS if support.has_schemas else ())]
    if support.style and styles[0].tool_format.parallel:
        talks += _PARALLEL
    tools = _TOOLS if support.has_schemas else ()
    as_taken = support.style or (False, False)
    probes = [
        {"messages": style_rows([_row(message) for message in talk], as_taken), "tools": list(tools) or None}
        for talk in talks
    ]
    answers, _ = run_worker(
        template.text, dict(template.tokens), [{**row, "add_generation_prompt": True} for row in probes]
    )
    if not answers:  # the process died, which is no word about the template
        return own
    theirs = [fill_dates(answer.get("text", "")) for answer in answers]
    for style in styles:
        if theirs == [_text(style, chat_format, talk, tools) for talk in talks]:
            return ToolTurns(style, style.tool_format)
    written = "".join(theirs)
    for style in styles:
        if style.tool_format.is_in(written, _CALL.name if support.style else ""):
            has_both = bool(support.style) and support.has_schemas
            return ToolTurns(None if has_both else style, style.tool_format)
    return foreign


def _text(style: TurnStyle, chat_format: ChatFormat, messages: Sequence[Message], tools: Tools) -> str:
    """What we write of a probe."""
    prompt = chat_format.generation_prompt if style.opens_answer(messages) else ""
    return fill_dates("".join(text for text, _ in write_turns(style, chat_format, messages, tools)) + prompt)

"""The tokens that stand between two answers of one conversation: a user's turn, or results of tools.

An answer that was sampled is never written anew: templates leave reasoning out of the past, strip blanks, write calls
in their own order of keys, and a text has more than one tokenization. So the prompt of the next answer is the tokens
that were there, the tokens that were sampled, and behind them the tokens of this file, which depend on what is said now
and on nothing that was said before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sprat.errors import DataError
from sprat.tokens.chat_formats import Part, render_parts
from sprat.tokens.messages import Message, ToolCall
from sprat.tokens.tokenizer import Tokenizer
from sprat.tokens.tool_formats import ToolFormat
from sprat.tokens.tool_render import render_with_tools

_QUESTION, _ANSWER = Message("user", "Q"), Message("assistant", "A")


def encode_next_turn(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    calls: Sequence[ToolCall] = (),
    thinking: bool | None = None,
    tool_format: ToolFormat | None = None,
) -> list[int]:
    """Ids of ``messages``, and of what opens the next answer, behind an answer that ended with its end token.

    Args:
        messages: the user's or tools', in order.
        calls: of that answer.
        thinking, tool_format: see ``chat.render``.

    Raises:
        DataError: see ``chat.render``; or the format writes an answer otherwise where something follows it.
    """
    is_of_tools = any(message.role == "tool" for message in messages)
    own = tuple(replace(call, arguments="{}") for call in calls) if is_of_tools else ()
    before = [_QUESTION, replace(_ANSWER, tool_calls=own) if own else _ANSWER]
    options: dict[str, Any] = {"thinking": thinking, "tool_format": tool_format, "is_of_tools": is_of_tools}
    past = _parts(tokenizer, before, is_open=False, **options)
    whole = _parts(tokenizer, [*before, *messages], is_open=True, **options)
    said = "".join(text for text, _ in past)
    if not "".join(text for text, _ in whole).startswith(said):
        what = "this model's chat format writes an answer otherwise where something follows it"
        raise DataError(what, where="messages", todo="take another model, or an environment of one turn")
    closing = tokenizer.chat_format.assistant[1].removeprefix(tokenizer.chat_format.eos)
    return tokenizer.encode_parts([(closing, True), *_without_start(whole, len(said))])


def _parts(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    is_open: bool,
    thinking: bool | None,
    tool_format: ToolFormat | None,
    is_of_tools: bool,
) -> list[Part]:
    """A conversation in parts; ``is_open``: with the opening of an answer behind it."""
    if is_of_tools:
        return render_with_tools(
            tokenizer, messages, (), thinking=thinking, add_generation_prompt=is_open, tool_format=tool_format
        )
    turns = [(message.role, message.content) for message in messages]
    return render_parts(tokenizer.chat_format, turns, thinking=thinking, add_generation_prompt=is_open)


def _without_start(parts: Sequence[Part], length: int) -> list[Part]:
    """``parts`` without their first ``length`` characters."""
    rest: list[Part] = []
    for text, is_template in parts:
        cut, length = min(length, len(text)), max(0, length - len(text))
        if text[cut:]:
            rest.append((text[cut:], is_template))
    return rest

"""The chat format: messages to ids, and generated ids back to reasoning and content.

Ours reads ``<|bos|><|system|>S<|user|>Q<|assistant|><think>R</think>A<|eos|>``. The think tags are
tokens, so "thinking on" and "thinking off" are nothing but which of them the prompt already ends with:
``<think>`` makes the model think, ``<think></think>`` makes it answer at once, and nothing lets it choose.
Other formats have defaults: DeepSeek-R1's prompt always opens the reasoning, V3.1's closes it unless thinking is asked
for, so saying nothing means that (``resolve_thinking``). A model whose template knows no thinking cannot be asked to
think. Reasoning of past turns is left out, as DeepSeek-R1 does: it is long, and its answer already stands there.
What a message says is encoded as plain text; only this file writes role and think tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sprat.errors import DataError
from sprat.tokens.chat_formats import Part, render_parts
from sprat.tokens.chat_tools import Tools
from sprat.tokens.messages import Message as Message
from sprat.tokens.messages import ToolCall as ToolCall
from sprat.tokens.tokenizer import Tokenizer
from sprat.tokens.tool_formats import ToolFormat
from sprat.tokens.tool_render import render_by_template, render_with_tools


@dataclass(frozen=True)
class Answer:
    """What the model said. ``closed``: whether reasoning that was begun was also ended."""

    reasoning: str
    content: str
    closed: bool


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    thinking: bool | None = None,
    add_generation_prompt: bool = True,
    tools: Tools = (),
    continues: bool = False,
    tool_format: ToolFormat | None = None,
) -> list[int]:
    """Ids of a conversation, ready for the model to go on.

    A conversation with tools is what the model's own template makes of it, as with transformers'
    ``apply_chat_template(messages, tools=tools)``: written by our own code where that writes the same, else by the
    template itself. Where it knows none, a family that has a form for tools is told of them in it, and any other model
    in plain text. See ``tool_render``.

    Args:
        messages: the turns in order.
        thinking: True opens the reasoning, False opens and closes it, None leaves it to the model.
        add_generation_prompt: end with the assistant's opening; without it only the given turns are rendered.
        tools: JSON schemas of the functions that may be called.
        continues: the last turn is the assistant's and left open, to be gone on with: its content, or its reasoning
            where it has no content yet. ``thinking`` and ``add_generation_prompt`` then say nothing; see
            ``continued_thinking``.
        tool_format: the form in which calls shall be read; where it is not the model's own, tools are told of in plain
            text. None: the model's own.

    Raises:
        DataError: there is no message, a role stands where the format has no place for it, the model's template writes
            some of tools and not all or refuses the conversation, or the model shall think and does not know how.
    """
    if not messages:
        raise DataError("no message to answer", where="messages", todo="send at least one")
    if continues:
        parts = _continued_parts(tokenizer, messages, tools, tool_format)
    else:
        options: dict[str, Any] = {"thinking": thinking, "add_generation_prompt": add_generation_prompt}
        parts = _parts(tokenizer, messages, tools, tool_format, **options)
    return tokenizer.encode_parts(parts)


def continued_thinking(tokenizer: Tokenizer, message: Message) -> bool:
    """How an answer is sampled that goes on with ``message``: in its reasoning, or in its content."""
    return bool(message.reasoning and not message.content) and tokenizer.chat_format.thinking_prompt is not None


def _parts(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Tools,
    tool_format: ToolFormat | None,
    *,
    thinking: bool | None,
    add_generation_prompt: bool,
) -> list[Part]:
    """A conversation as text, in parts."""
    options: dict[str, Any] = {"thinking": thinking, "add_generation_prompt": add_generation_prompt}
    if _has_tools(messages, tools):
        return render_with_tools(tokenizer, messages, tools, tool_format=tool_format, **options)
    return render_parts(tokenizer.chat_format, _turns(messages), **options)


def _continued_parts(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools, tool_format: ToolFormat | None
) -> list[Part]:
    """A conversation whose last answer is left open."""
    answer = messages[-1]
    if answer.role != "assistant" or answer.tool_calls or len(messages) < 2:
        todo = "end with an assistant's message that calls nothing and has one before it"
        raise DataError("the last message cannot be gone on with", where="messages", todo=todo)
    reasoning = answer.reasoning if tokenizer.chat_format.thinking_prompt is not None else None
    options: dict[str, Any] = {"thinking": bool(reasoning), "add_generation_prompt": True}
    parts = _parts(tokenizer, messages[:-1], tools, tool_format, **options)
    if reasoning:
        closing = tokenizer.chat_format.think_delimiters[1] if answer.content else ""
        parts += [(reasoning, False), (closing, True)]
    return [*parts, (answer.content, False)]


def _turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Role and content of each."""
    return [(message.role, message.content) for message in messages]


def _has_tools(messages: Sequence[Message], tools: Tools) -> bool:
    """Whether a conversation is more than questions and answers."""
    return bool(tools) or any(message.tool_calls or message.role == "tool" for message in messages)


def resolve_thinking(tokenizer: Tokenizer, thinking: bool | None, *, structured: bool = False) -> bool | None:
    """How an answer begins that follows a prompt rendered with ``thinking``: in reasoning, in content, or either.

    ``structured``: its content has a form that was asked for, of which think tags that are ordinary text are no part.
    """
    if thinking is None:
        thinking = tokenizer.chat_format.default_thinking
    if thinking is None and structured and min(tokenizer.special_ids.think_open, tokenizer.special_ids.think_close) < 0:
        return False
    return thinking


def encode_demonstration(
    tokenizer: Tokenizer, question: str, reasoning: str, answer: str
) -> tuple[list[int], list[int]]:
    """One worked example for supervised training; empty ``reasoning`` shows a terse answer.

    Returns:
        ids, and a mask of the same length: 1 on what the assistant says (its end token included), else 0.
    """
    return encode_conversation(tokenizer, [Message("user", question), Message("assistant", answer, reasoning)])[0]


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools = ()
) -> list[tuple[list[int], list[int]]]:
    """A conversation for supervised training: each answer after the very ids with which it will be asked for.

    Where the prompt of an answer begins with all that came before, as in most formats, both are one sequence. A format
    that changes the past (reasoning of past turns is left out) has a sequence for each answer instead. A model that
    does not think is shown no think tags with a terse answer, as its own template writes none.

    Args:
        messages: the turns in order; the assistant's are learned where their ``weight`` is not 0.
        tools: JSON schemas of the functions that may be called; see ``render``.

    Returns:
        (ids, mask) of each sequence: 1 on what the assistant says and calls (its end token included), else 0.

    Raises:
        DataError: no answer is to be learned, one has nothing before it, or see ``render``.
    """
    sequences: list[tuple[list[int], list[int]]] = []
    learned = [n for n, message in enumerate(messages) if message.role == "assistant" and message.weight]
    if learned[:1] == [0]:
        raise DataError("an answer without a question", where="messages", todo="let the user speak first")
    if _has_tools(messages, tools):
        encoded = _encode_tool_answers(tokenizer, messages, learned, tools)
    else:
        encoded = [_encode_answer(tokenizer, messages[:index], messages[index]) for index in learned]
    for prompt_ids, answer_ids in encoded:
        ids, mask = sequences[-1] if sequences else ([], [])
        if ids and prompt_ids[: len(ids)] == ids:
            sequences.pop()
        else:
            mask = []
        mask = mask + [0] * (len(prompt_ids) - len(mask)) + [1] * len(answer_ids)
        sequences.append((prompt_ids + answer_ids, mask))
    if not sequences:
        raise DataError("no answer to learn", where="messages", todo="give at least one assistant turn with a weight")
    return sequences


def _encode_answer(tokenizer: Tokenizer, history: Sequence[Message], answer: Message) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of what the model says to it."""
    chat_format = tokenizer.chat_format
    thinking = None if chat_format.default_thinking is None else bool(answer.reasoning)
    turns = _turns([*history, answer])[:-1]
    prompt = render_parts(chat_format, turns, thinking=thinking, add_generation_prompt=True)
    response_parts: list[Part] = []
    if answer.reasoning:
        opening, closing = chat_format.think_delimiters
        response_parts += [(opening if thinking is None else "", True), (answer.reasoning, False), (closing, True)]
    elif thinking is None:
        response_parts.append((chat_format.no_thinking_prompt.removeprefix(chat_format.generation_prompt), True))
    response_parts.append((answer.content, False))
    prompt_ids, all_ids = tokenizer.encode_parts(prompt), tokenizer.encode_parts(prompt + response_parts)
    is_prefix = all_ids[: len(prompt_ids)] == prompt_ids
    ids = all_ids[len(prompt_ids) :] if is_prefix else tokenizer.encode_parts(response_parts)
    return prompt_ids, [*ids, tokenizer.special_ids.eos]


def _encode_tool_answers(
    tokenizer: Tokenizer, messages: Sequence[Message], learned: Sequence[int], tools: Tools
) -> list[tuple[list[int], list[int]]]:
    """``_encode_answer`` of the turns ``learned``, by the template: what it writes behind the prompt of each.

    Raises:
        DataError: see ``render``; the template asks for an answer otherwise than it writes it.
    """
    prompts = [(messages[:index], True) for index in learned]
    wholes = [(messages[: index + 1], False) for index in learned]
    texts = render_by_template(tokenizer, [*prompts, *wholes], tools)
    encoded = []
    for prompt, whole in zip(texts[: len(learned)], texts[len(learned) :], strict=True):
        if not whole.startswith(prompt):
            what = "the chat template asks for an answer otherwise than it writes one"
            raise DataError(what, where="messages", todo="leave out the conversations with tools")
        prompt_ids, all_ids = tokenizer.encode_parts([(prompt, True)]), tokenizer.encode_parts([(whole, True)])
        is_prefix = all_ids[: len(prompt_ids)] == prompt_ids
        ids = all_ids[len(prompt_ids) :] if is_prefix else tokenizer.encode_parts([(whole[len(prompt) :], True)])
        ends = [place for place, token_id in enumerate(ids) if token_id in tokenizer.eos_token_ids]
        encoded.append((prompt_ids, ids[: ends[-1] + 1] if ends else [*ids, tokenizer.special_ids.eos]))
    return encoded


def split_reasoning(
    tokenizer: Tokenizer, ids: Sequence[int], *, thinking: bool | None, structured: bool = False
) -> Answer:
    """Part generated ids, which follow a prompt rendered with ``thinking``, into reasoning and content.

    Everything from the first end token on is dropped. With ``thinking=None``, and no default of the format, there is
    reasoning only if the model opened it. Reasoning that is never closed leaves the content empty. Of line breaks only
    those are dropped that a format puts around its think tags; a ``structured`` answer keeps all of its content.
    """
    opening, closing = tokenizer.special_ids.think_open, tokenizer.special_ids.think_close
    thinking = resolve_thinking(tokenizer, thinking, structured=structured)
    answer_ids = list(itertools.takewhile(lambda token_id: token_id not in tokenizer.eos_token_ids, map(int, ids)))
    if closing < 0 or opening < 0:
        text = tokenizer.decode(answer_ids, skip_special_tokens=True)
        return _split_text(tokenizer, text, thinking=thinking, structured=structured)
    if thinking is None and answer_ids[:1] == [opening]:
        thinking, answer_ids = True, answer_ids[1:]
    if not thinking:
        return Answer("", tokenizer.decode(answer_ids, skip_special_tokens=True), closed=True)
    closed = closing in answer_ids
    cut = answer_ids.index(closing) if closed else len(answer_ids)
    reasoning = tokenizer.decode(answer_ids[:cut], skip_special_tokens=True)
    content = tokenizer.decode(answer_ids[cut + 1 :], skip_special_tokens=True)
    return _strip_newlines(tokenizer, Answer(reasoning, content, closed), structured=structured)


def _split_text(tokenizer: Tokenizer, text: str, *, thinking: bool | None, structured: bool) -> Answer:
    """``split_reasoning`` for tokenizers whose think tags are ordinary text."""
    opening, closing = tokenizer.chat_format.think_tags
    if thinking is None and text.lstrip().startswith(opening):
        thinking, text = True, text.lstrip().removeprefix(opening)
    if not thinking:
        return Answer("", text, closed=True)
    reasoning, end_tag, content = text.partition(closing)
    return _strip_newlines(tokenizer, Answer(reasoning, content, bool(end_tag)), structured=structured)


def _strip_newlines(tokenizer: Tokenizer, answer: Answer, *, structured: bool) -> Answer:
    """An answer that thought, without the line breaks that some formats put around the think tags."""
    if "\n" not in "".join(tokenizer.chat_format.think_delimiters):
        return answer
    reasoning = answer.reasoning.strip("\n") if answer.closed else answer.reasoning.lstrip("\n")
    return Answer(reasoning, answer.content if structured else answer.content.lstrip("\n"), answer.closed)

"""The chat format: messages to ids, and generated ids back to reasoning and content.

Ours reads ``<|bos|><|system|>S<|user|>Q<|assistant|><think>R</think>A<|eos|>``. The think tags are
tokens, so "thinking on" and "thinking off" are nothing but which of them the prompt already ends with:
``<think>`` makes the model think, ``<think></think>`` makes it answer at once, and nothing lets it choose.
Reasoning of past turns is left out, as DeepSeek-R1 does: it is long, and its answer already stands there.
What a message says is encoded as plain text; only this file writes role and think tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sprat.errors import DataError
from sprat.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning: str | None = None


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
    generate: bool = True,
) -> list[int]:
    """Ids of a conversation, ready for the model to go on.

    Args:
        messages: the turns in order.
        thinking: True opens the reasoning, False opens and closes it, None leaves it to the model.
        generate: end with the assistant's opening; without it only the given turns are rendered.

    Raises:
        DataError: there is no message, or a role is none of the three.
    """
    if not messages:
        raise DataError("no message to answer", where="messages", todo="send at least one")
    form = tokenizer.format
    ids = list(tokenizer.piece(form.bos))
    if form.preamble and messages[0].role != "system":
        messages = [Message("system", form.preamble), *messages]
    for message in messages:
        if message.role == "assistant":
            ids += tokenizer.piece(form.assistant[0] + form.past)
            ids += tokenizer.encode(message.content)
            ids += tokenizer.piece(form.assistant[1])
        elif message.role in ("user", "system"):
            opening, closing = form.user if message.role == "user" else form.system
            ids += tokenizer.piece(opening)
            ids += tokenizer.encode(message.content)
            ids += tokenizer.piece(closing)
        else:
            raise DataError(f"unknown role {message.role!r}", where="messages", todo="use system, user or assistant")
    if generate:
        ids += tokenizer.piece(form.assistant[0])
        if thinking is not None:
            ids += tokenizer.piece(form.think[0] if thinking else form.direct)
    return ids


def demonstration(tokenizer: Tokenizer, question: str, reasoning: str, answer: str) -> tuple[list[int], list[int]]:
    """One worked example for supervised training; empty ``reasoning`` shows a terse answer.

    Returns:
        ids, and a mask of the same length: 1 on what the assistant says (its end token included), else 0.
    """
    form = tokenizer.format
    prompt = render(tokenizer, [Message("user", question)])
    if reasoning:
        said = [*tokenizer.piece(form.think[0]), *tokenizer.encode(reasoning), *tokenizer.piece(form.think[1])]
    else:
        said = list(tokenizer.piece(form.direct))
    said += tokenizer.encode(answer)
    said.append(tokenizer.ids.eos)
    return prompt + said, [0] * len(prompt) + [1] * len(said)


def split(tokenizer: Tokenizer, ids: Sequence[int], *, thinking: bool | None) -> Answer:
    """Part generated ids, which follow a prompt rendered with ``thinking``, into reasoning and content.

    Everything from the first end token on is dropped. With ``thinking=None`` there is reasoning only if
    the model opened it. Reasoning that is never closed leaves the content empty.
    """
    eos, opening, closing = tokenizer.ids.eos, tokenizer.ids.think_open, tokenizer.ids.think_close
    row = [int(index) for index in ids]
    row = row[: row.index(eos)] if eos in row else row
    if closing < 0 or opening < 0:
        return _split_text(tokenizer, tokenizer.decode(row, skip_specials=True), thinking=thinking)
    if thinking is None and row[:1] == [opening]:
        thinking, row = True, row[1:]
    if not thinking:
        return Answer("", _trim(tokenizer, tokenizer.decode(row, skip_specials=True)), closed=True)
    closed = closing in row
    cut = row.index(closing) if closed else len(row)
    reasoning = tokenizer.decode(row[:cut], skip_specials=True)
    content = tokenizer.decode(row[cut:], skip_specials=True)
    return Answer(_trim(tokenizer, reasoning), _trim(tokenizer, content), closed)


def _split_text(tokenizer: Tokenizer, text: str, *, thinking: bool | None) -> Answer:
    """``split`` for tokenizers whose think tags are ordinary text."""
    opening, closing = tokenizer.format.think_tokens
    if thinking is None and text.lstrip().startswith(opening):
        thinking, text = True, text.lstrip().removeprefix(opening)
    if not thinking:
        return Answer("", _trim(tokenizer, text), closed=True)
    reasoning, mark, content = text.partition(closing)
    return Answer(_trim(tokenizer, reasoning), _trim(tokenizer, content), bool(mark))


def _trim(tokenizer: Tokenizer, text: str) -> str:
    """Drop the line breaks that some formats put around the think tags."""
    return text.strip("\n") if "\n" in "".join(tokenizer.format.think) else text

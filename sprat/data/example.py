"""What one record teaches: a conversation, a pair of answers of which one is preferred, or a text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

from sprat.data.record import Where
from sprat.tokens.chat import Message


@dataclass(frozen=True)
class Conversation:
    """Turns in order, the last of which is the assistant's; see ``turns`` for what holds of them.

    Attributes:
        messages: the assistant's with ``weight`` 1 are learned.
        tools: JSON schemas of the functions that may be called, as transformers' chat templates take them.
    """

    messages: tuple[Message, ...]
    where: Where
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class PreferencePair:
    """Two ways to go on from ``prompt``, as DPO learns from them: TRL's preference form with the prompt explicit."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    where: Where
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Text:
    """Plain text, all of which is learned."""

    text: str
    where: Where


Example = Conversation | PreferencePair | Text
ExampleT = TypeVar("ExampleT", bound=Example)


def content_key(example: Example) -> bytes:
    """SHA-256 of what an example says, wherever it stands and whatever of it is learned.

    >>> here, there = Where("a.jsonl", 1), Where("b.jsonl", 7)
    >>> content_key(Text("said", here)) == content_key(Text("said", there)) != content_key(Text("unsaid", here))
    True
    """
    text = json.dumps([type(example).__name__, _fields(example)], sort_keys=True, default=_fields)
    return hashlib.sha256(text.encode()).digest()


def _fields(value: Any) -> Any:
    """What a dataclass says; as text what JSON cannot say."""
    if not is_dataclass(value):
        return str(value)
    return {name: field for name, field in vars(value).items() if name not in ("where", "weight")}

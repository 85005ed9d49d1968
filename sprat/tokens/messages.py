"""The turns of a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant calls: ``arguments`` is the text of a JSON object, ``id`` what its answer names."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        tool_calls: what an assistant's turn calls; its content may then be empty.
        tool_call_id: of a tool's turn, the call that it answers; empty where it does not say.
        weight: of an assistant's turn in training, 0 or 1: whether it is learned. Of other roles nothing is learned.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    weight: float = 1.0

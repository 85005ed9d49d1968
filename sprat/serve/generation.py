"""What every protocol asks for: one form, whatever the body looked like.

A protocol's parser makes a ``Generation`` of a body; from there on nothing knows by which protocol it came. Sampling
settings are the engine's own names. ``paths`` says where the caller wrote what the engine may refuse, so that an error
names the caller's field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sprat.tokens.chat import Message


@dataclass(frozen=True)
class Tool:
    """A function that the model may call; ``parameters`` is a JSON schema of an object, None: it takes none.

    ``strict``: arguments must follow the schema; without it they are a JSON object. ``is_custom``: its caller knows it
    by one text, which is its only argument (``custom_tools``). ``path``: where the caller wrote what that must match.
    ``namespace``: of the caller's, in which the tool is called ``member``; ``name`` is how the model knows it.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    is_custom: bool = False
    path: str = ""
    namespace: str = ""
    member: str = ""


@dataclass(frozen=True)
class ToolChoice:
    """Whether tools are called: as the model likes (``auto``), not at all, at least one, or the one ``named``."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str = ""


@dataclass(frozen=True)
class Generation:
    """One request.

    Attributes:
        model: as the caller wrote it.
        messages: the conversation; empty where ``prompt`` is given.
        prompt: text, or ids, to go on with as it is (completions).
        echo: begin the answer with the prompt.
        suffix: text that stands behind what is written.
        continues: the last message is the assistant's and is gone on with (DeepSeek's ``prefix``).
        thinking: whether to think; None: as the model likes. A wish, as the effort: a model that cannot ignores both.
        thinking_wishes: the JSON paths of what asks for thinking.
        effort: how hard, where that was said: ``none`` … ``ultra``.
        max_think_tokens: tokens of thinking at most.
        max_tokens: None: the room that is left in the context.
        sampling: settings of ``engine.Sampling`` that were asked for, by its names; the rest is the model's default.
        n: choices.
        logprobs: whether log-probabilities are wanted; ``sampling`` has ``top_logprobs``.
        response_format: None, or ``{"type": "json_object"}``, or ``{"type": "json_schema", "schema": …}``, or
            ``{"type": "regex", "pattern": …}``.
        tools, tool_choice, parallel_tool_calls: what may be called.
        stream, include_usage: whether the caller reads as it comes, and wants the usage in a chunk of its own.
        user: whom the caller asks for; never a tenant.
        paths: name of a setting (``max_tokens``, ``stop``, ``thinking``, ``messages``, …) → the caller's JSON path.
        ignored: fields of the body that mean nothing here, for ``x-ignored-fields``.
    """

    model: str
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    echo: bool = False
    suffix: str = ""
    continues: bool = False
    thinking: bool | None = None
    thinking_wishes: tuple[str, ...] = ()
    effort: str = ""
    max_think_tokens: int | None = None
    max_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    logprobs: bool = False
    response_format: Mapping[str, Any] | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    stream: bool = False
    include_usage: bool = False
    user: str = ""
    paths: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def with_ignored(self, names: tuple[str, ...]) -> Generation:
        """The same, with what of its body was ignored."""
        return replace(self, ignored=names)


def left_out(kind: str) -> str:
    """What a model reads in the place of a picture or a file that a tool answered with.

    >>> left_out("image")
    '[image: left out, as this model reads text alone]'
    """
    return f"[{kind}: left out, as this model reads text alone]"

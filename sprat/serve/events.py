"""One stream of events for every answer, and for every protocol.

    Started → (TextDelta | ToolCallDelta)* → ChoiceFinished, for each choice → Finished

or ``Failed`` in the place of what did not come any more. A protocol is a translator of these events: into chunks where
the caller streams, into one object (``collect``) where not. Both read the same events, so they cannot differ in text,
reasoning, calls, finish reason or usage. Events of several choices are interleaved; those of one choice are in order:
its reasoning, then its content, then its calls, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from sprat.serve.errors import RequestError

FinishReason = Literal["stop", "length", "tool_calls"]
EndedBy = Literal["", "cancel", "disconnect", "shutdown"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, as bytes, its log-probability (nats), and the likeliest tokens of its place, best first.

    The first token of a prompt has none. One that is ``hidden`` (the end of a turn) stands in no text, and has its name
    for bytes.
    """

    token: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has begun: tokens of the prompt, and how many of them it did not have to compute."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of text; ``logprobs`` are those of the tokens that came with it, where asked for (text may be empty)."""

    choice: int
    kind: Literal["reasoning", "content"]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a call: ``id``, ``name`` and ``namespace`` come once, with the first one of an ``index``.

    Of a call of a custom tool ``arguments`` are its input: plain text, no JSON.
    """

    choice: int
    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""
    is_custom: bool = False
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """A choice is whole. ``stop``: the stop string that ended it; ``ended_by``: who did, where it was not the model."""

    choice: int
    reason: FinishReason
    stop: str = ""
    ended_by: EndedBy = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole request: its prompt once, what was written in all choices."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that was answered; what it cost is recorded before anybody can read this."""

    usage: Usage
    seconds: float
    cost: dict[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that broke off."""

    error: RequestError


Event = Started | TextDelta | ToolCallDelta | ChoiceFinished | Finished | Failed


@dataclass
class CollectedCall:
    """A call as it is answered whole; of a custom tool, with its input as ``arguments``."""

    id: str
    name: str
    arguments: str = ""
    is_custom: bool = False
    namespace: str = ""


@dataclass
class CollectedChoice:
    """One choice as it is answered whole; ``call_logprobs`` are those that came once a call had begun."""

    reasoning: str = ""
    content: str = ""
    calls: list[CollectedCall] = field(default_factory=list)
    reasoning_logprobs: list[TokenLogprob] = field(default_factory=list)
    content_logprobs: list[TokenLogprob] = field(default_factory=list)
    call_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: ChoiceFinished | None = None


class Collector:
    """The answer so far, of the events so far.

    >>> collector = Collector(1)
    >>> collector.push(TextDelta(0, "content", "Hel"))
    >>> collector.push(TextDelta(0, "content", "lo"))
    >>> collector.choices[0].content
    'Hello'
    """

    def __init__(self, n: int) -> None:
        self.choices = [CollectedChoice() for _ in range(n)]
        self.finished: Finished | None = None

    def push(self, event: Event) -> None:
        """Follow one event.

        Raises:
            RequestError: it says that the answer broke off.
        """
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            self.finished = event
        elif isinstance(event, TextDelta):
            choice = self.choices[event.choice]
            if event.kind == "reasoning":
                choice.reasoning += event.text
                choice.reasoning_logprobs += event.logprobs
            else:
                choice.content += event.text
                (choice.call_logprobs if choice.calls else choice.content_logprobs).extend(event.logprobs)
        elif isinstance(event, ToolCallDelta):
            calls = self.choices[event.choice].calls
            if event.index == len(calls):
                calls.append(CollectedCall(event.id, event.name, "", event.is_custom, event.namespace))
            calls[event.index].arguments += event.arguments
        elif isinstance(event, ChoiceFinished):
            self.choices[event.choice].finish = event


def collect(events: Iterable[Event], n: int = 1) -> Collector:
    """The whole answer of a request with ``n`` choices; raises as ``Collector.push``."""
    collector = Collector(n)
    for event in events:
        collector.push(event)
    return collector

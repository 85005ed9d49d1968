"""The four protocols, as an exchange takes them: how a body is read, and how events are written."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sprat.serve import (
    anthropic,
    anthropic_answers,
    openai_chat,
    openai_completions,
    openai_responses,
    openai_responses_answers,
)
from sprat.serve.events import Collector, Event
from sprat.serve.generation import Generation
from sprat.serve.openai_chat import Head

Extension = Callable[[], dict[str, Any]]
Batches = AsyncIterator[list[Event] | None]


@dataclass(frozen=True)
class Wire:
    """A protocol: how a body is read, and how events are written.

    Attributes:
        prefix: of the ids of answers.
        parse: a body → requests, of which all but completions have one.
    """

    prefix: str
    parse: Callable[[dict[str, Any]], Sequence[Generation]]
    whole: Callable[[Generation, Collector, Head, dict[str, Any]], dict[str, Any]]
    stream: Callable[[Generation, Batches, Head, Extension], AsyncIterator[str]]


CHAT = Wire("chatcmpl-", lambda body: [openai_chat.parse_chat(body)], openai_chat.whole, openai_chat.stream_events)
COMPLETIONS = Wire(
    "cmpl-", openai_completions.parse_completion, openai_completions.whole, openai_completions.stream_events
)
MESSAGES = Wire(
    "msg_",
    lambda body: [anthropic.parse_messages(body)],
    lambda request, collector, head, _: anthropic_answers.whole(collector, message_id=head.id, model=head.model),
    lambda request, batches, head, _: anthropic_answers.stream_events(
        _each(batches), message_id=head.id, model=head.model, request_id=head.request_id
    ),
)
RESPONSES = Wire(
    "resp_",
    lambda body: [openai_responses.parse_responses(body)],
    lambda request, collector, head, _: openai_responses_answers.whole(
        openai_responses_answers.echo(head.body), collector, response_id=head.id, created=int(time.time())
    ),
    lambda request, batches, head, _: openai_responses_answers.stream_events(
        openai_responses_answers.echo(head.body), _each(batches), response_id=head.id, created=int(time.time())
    ),
)


async def _each(batches: Batches) -> AsyncIterator[Event | None]:
    """Events one by one."""
    async for batch in batches:
        if batch is None:
            yield None
        else:
            for event in batch:
                yield event

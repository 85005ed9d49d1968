"""Anthropic's own client reads what we answer, whole and streamed, and may send all of it back."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from pydantic import TypeAdapter

from sprat.serve.anthropic import parse_count_tokens, parse_messages
from sprat.serve.anthropic_answers import stream_events, token_count, whole
from sprat.serve.errors import RequestError, anthropic_body
from sprat.serve.events import ChoiceFinished, Failed, Finished, Started, TextDelta, ToolCallDelta, Usage, collect
from sprat.serve.fields import parse_json
from sprat.tokens.chat import Message
from tests.unit.serve.sdks import Replies, answers, called, nothing_extra, replying, said, sent, streamed

anthropic: Any = pytest.importorskip("anthropic")
types: Any = pytest.importorskip("anthropic.types")

STREAM_EVENT = TypeAdapter(types.RawMessageStreamEvent)
HEAD = {"message_id": "msg_1", "model": "m"}
ASK: dict[str, Any] = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {"a": {}}}}
random_answers = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def replies() -> Iterator[Replies]:
    with replying() as replies:
        yield replies


@functools.cache
def client(url: str) -> Any:
    return anthropic.Anthropic(api_key="key", base_url=url, max_retries=0)


def stream_of(events: Any) -> str:
    return streamed(lambda source: stream_events(source, **HEAD), events)


def whole_of(events: Any) -> dict[str, Any]:
    return whole(collect(events), **HEAD)


def read_stream(replies: Replies, events: Any) -> Any:
    """The message that the SDK makes of a stream."""
    replies.say(stream_of(events))
    with client(replies.url).messages.stream(**ASK) as stream:
        return stream.get_final_message()


@given(answers())
@random_answers
def test_every_event_is_of_a_type_of_the_sdk_and_blocks_never_mingle(events: Any) -> None:
    open_block, blocks = None, 0
    names = []
    for name, body in sent(stream_of(events)):
        assert name == body["type"]
        names.append(name)
        if name == "ping":
            continue
        nothing_extra(STREAM_EVENT.validate_python(body, strict=True))
        if name == "content_block_start":
            assert (open_block, body["index"]) == (None, blocks)
            open_block, blocks = blocks, blocks + 1
        elif name.startswith("content_block"):
            assert body["index"] == open_block
            open_block = None if name == "content_block_stop" else open_block
    assert names[:2] == ["message_start", "ping"] and names[-2:] == ["message_delta", "message_stop"]
    assert open_block is None and blocks > 0


@given(events=answers())
@random_answers
def test_a_stream_adds_up_to_the_whole_answer(replies: Replies, events: Any) -> None:
    body = whole_of(events)
    nothing_extra(types.Message.model_validate(body, strict=True))
    replies.say(body)
    message = client(replies.url).messages.create(**ASK)
    assert message.to_dict() == body
    assert read_stream(replies, events).model_dump(exclude_none=True) == message.model_dump(exclude_none=True)
    assert "".join(block.text for block in message.content if block.type == "text") == said(events, "content")
    assert "".join(block.thinking for block in message.content if block.type == "thinking") == said(events, "reasoning")
    usage = events[-1].usage
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == usage.prompt_tokens
    assert (message.usage.output_tokens, message.usage.cache_creation_input_tokens) == (usage.completion_tokens, 0)


@given(events=answers())
@random_answers
def test_an_answer_may_be_sent_back_as_the_sdk_has_it(replies: Replies, events: Any) -> None:
    message = read_stream(replies, events)
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "3"}
        for block in message.content
        if block.type == "tool_use"
    ]
    follow = {"role": "user", "content": [*results, {"type": "text", "text": "Go on"}]}
    parsed = []
    for turn in (
        {"role": "assistant", "content": message.content},
        {"role": "assistant", "content": message.model_dump()["content"]},
        message.to_dict(),
        message.model_dump(),
    ):
        replies.say(whole_of(events))
        client(replies.url).messages.create(**{**ASK, "messages": [*ASK["messages"], turn, follow]})
        parsed.append(parse_messages(parse_json(json.dumps(replies.asked).encode())).messages)
    assert all(turns == parsed[0] for turns in parsed)
    user, assistant, *tools, last = parsed[0]
    assert (user, last) == (Message("user", "Hi"), Message("user", "Go on"))
    assert (assistant.content, assistant.reasoning or "") == (said(events, "content"), said(events, "reasoning"))
    calls = called(events)
    assert [(call.id, call.name) for call in assistant.tool_calls] == [(call_id, name) for call_id, name, _ in calls]
    assert [turn.tool_call_id for turn in tools] == [call_id for call_id, _, _ in calls]
    if events[-2].reason == "tool_calls":
        assert [json.loads(call.arguments) for call in assistant.tool_calls] == [json.loads(text) for *_, text in calls]


def test_an_answer_cut_off_at_every_place_is_the_same_streamed_and_whole(replies: Replies) -> None:
    parts: list[Any] = [TextDelta(0, "reasoning", letter) for letter in "Hm\u2028"]
    parts += [TextDelta(0, "content", letter) for letter in "A \u00e9"]
    for index, arguments in enumerate(('{"a": 12.5, "b": [true, "x\\u00e9"]}', '{"c": {"d": null}}')):
        parts += [ToolCallDelta(0, index, id=f"call_{index}", name="add")]
        parts += [ToolCallDelta(0, index, letter) for letter in arguments]
    for cut in range(len(parts) + 1):
        events = [Started(5, 2), *parts[:cut], ChoiceFinished(0, "length"), Finished(Usage(5, 2, cut, 0), 0.1)]
        message = types.Message.model_validate(whole_of(events), strict=True)
        assert read_stream(replies, events).model_dump(exclude_none=True) == message.model_dump(exclude_none=True)


@pytest.mark.parametrize(
    ("reason", "stop", "ended_by", "expected"),
    [
        ("stop", "", "", ("end_turn", None)),
        ("stop", "END", "", ("stop_sequence", "END")),
        ("length", "", "", ("max_tokens", None)),
        ("tool_calls", "", "", ("tool_use", None)),
        ("stop", "", "cancel", ("pause_turn", None)),
        ("length", "", "shutdown", ("pause_turn", None)),
    ],
)
def test_why_an_answer_ended_is_said_in_their_words(
    reason: Any, stop: str, ended_by: Any, expected: tuple[str, str | None], replies: Replies
) -> None:
    end = ChoiceFinished(0, reason, stop, ended_by)
    events = [Started(5, 2), TextDelta(0, "content", "x"), end, Finished(Usage(5, 2, 1, 0), 0.1)]
    message = read_stream(replies, events)
    assert (message.stop_reason, message.stop_sequence) == expected
    assert (whole_of(events)["stop_reason"], whole_of(events)["stop_sequence"]) == expected


def test_a_silent_stream_pings_and_a_broken_one_ends_with_an_error(replies: Replies) -> None:
    broken = RequestError(503, "the engine is starting again", kind="server_error")
    stream = stream_of([None, Started(3, 0), TextDelta(0, "content", "Hel"), None, Failed(broken)])
    names = [name for name, _ in sent(stream)]
    block = ["content_block_start", "content_block_delta"]
    assert names == ["ping", "message_start", "ping", *block, "ping", "error"]
    nothing_extra(types.ErrorResponse.model_validate(sent(stream)[-1][1], strict=True))
    replies.say(stream)
    with (
        pytest.raises(anthropic.APIStatusError, match="the engine is starting again"),
        client(replies.url).messages.stream(**ASK) as open_stream,
    ):
        open_stream.until_done()


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 408, 409, 413, 415, 429, 500, 503, 504])
def test_an_error_is_one_of_their_types(status: int, replies: Replies) -> None:
    body = anthropic_body(RequestError(status, "no"), "req_1")
    if status != 413:  # request_too_large, of which their documentation knows, and the types do not
        nothing_extra(types.ErrorResponse.model_validate(body, strict=True))
    replies.say(body, status)
    with pytest.raises(anthropic.APIStatusError) as caught:
        client(replies.url).messages.create(**ASK)
    assert (caught.value.status_code, caught.value.body["error"]["message"]) == (status, "no")


def test_a_prompt_that_does_not_fit_is_said_in_their_words() -> None:
    error = RequestError(400, "9 tokens, and 8 fit", code="context_length_exceeded")
    assert anthropic_body(error)["error"]["message"].startswith("prompt is too long: ")


def test_tokens_are_counted_for_the_same_conversation(replies: Replies) -> None:
    replies.say(token_count(17))
    counted = client(replies.url).messages.count_tokens(
        model="m", messages=ASK["messages"], system="Be brief.", tools=[TOOL], thinking={"type": "disabled"}
    )
    assert counted.input_tokens == 17
    generation = parse_count_tokens(replies.asked)
    assert generation.messages == (Message("system", "Be brief."), Message("user", "Hi"))
    assert (generation.tools[0].name, generation.max_tokens, generation.thinking) == ("add", None, False)

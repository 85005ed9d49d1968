"""OpenAI's own client reads our Responses, whole and streamed, and may send all of it back."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from sprat.serve.errors import RequestError
from sprat.serve.events import (
    ChoiceFinished,
    Failed,
    Finished,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
    collect,
)
from sprat.serve.fields import parse_json
from sprat.serve.openai_responses import parse_responses
from sprat.serve.openai_responses_answers import echo, stream_events, whole
from sprat.tokens.chat import Message
from tests.unit.serve.sdks import Replies, answers, called, nothing_extra, replying, said, sent, spoiled, streamed

openai: Any = pytest.importorskip("openai")
types: Any = pytest.importorskip("openai.types.responses")

STREAM_EVENT = TypeAdapter(types.ResponseStreamEvent)
ARGUMENTS_DONE = types.ResponseFunctionCallArgumentsDoneEvent
ASK: dict[str, Any] = {"model": "m", "input": "Hi"}
FULL: dict[str, Any] = {
    **ASK, "instructions": "Be brief.", "temperature": 0.5, "top_p": 0.9, "max_output_tokens": 7, "user": "u",
    "metadata": {"a": "b"}, "parallel_tool_calls": False, "reasoning": {"effort": "low"}, "top_logprobs": 2,
    "tools": [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": None}],
    "tool_choice": {"type": "function", "name": "add"}, "safety_identifier": "s", "prompt_cache_key": "k",
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
}  # fmt: skip
IDS = {"response_id": "resp_1", "created": 1_750_000_000}
END = Finished(Usage(5, 2, 1, 0), 0.1)
random_answers = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def replies() -> Iterator[Replies]:
    with replying() as replies:
        yield replies


@functools.cache
def client(url: str) -> Any:
    return openai.OpenAI(api_key="key", base_url=url, max_retries=0)


def stream_of(events: Any, ask: dict[str, Any] = ASK) -> str:
    return streamed(lambda source: stream_events(echo(ask), source, **IDS), events)


def whole_of(events: Any, ask: dict[str, Any] = ASK) -> dict[str, Any]:
    return whole(echo(ask), collect(events), **IDS)


def known_fields(body: dict[str, Any]) -> dict[str, Any]:
    """Without the name of a call that ends, which some versions of the client require and others do not know."""
    ends_call = body["type"] == "response.function_call_arguments.done"
    drop = {"name"} if ends_call and "name" not in ARGUMENTS_DONE.model_fields else set()
    return {name: value for name, value in body.items() if name not in drop}


@given(answers(with_logprobs=True), st.sampled_from([ASK, FULL]))
@random_answers
def test_every_event_is_of_a_type_of_the_sdk_and_items_are_whole_when_they_are_done(
    events: Any, ask: dict[str, Any]
) -> None:
    items: list[dict[str, Any]] = []
    texts: list[str] = []
    bodies = sent(stream_of(events, ask))
    for number, (name, body) in enumerate(bodies):
        assert (name, number) == (body["type"], body["sequence_number"])
        nothing_extra(STREAM_EVENT.validate_python(known_fields(body), strict=True))
        if name == "response.output_item.added":
            assert body["output_index"] == len(items) == len(texts)
            items.append(body["item"])
            texts.append("")
        elif name.endswith(".delta"):
            assert (body["output_index"], body["item_id"]) == (len(items) - 1, items[-1]["id"])
            texts[-1] += body["delta"]
        elif name.endswith((".text.done", "_text.done", "arguments.done")):
            assert body.get("text", body.get("arguments")) == texts[-1]
        elif name == "response.output_item.done":
            items[-1] = body["item"]
    assert [name for name, _ in bodies][:2] == ["response.created", "response.in_progress"]
    last, response = bodies[-1][0], bodies[-1][1]["response"]
    assert last == f"response.{response['status']}"
    assert response["output"] == items
    assert response == whole_of(events, ask)
    assert "[DONE]" not in stream_of(events, ask)


@given(events=answers(), ask=st.sampled_from([ASK, FULL]))
@random_answers
def test_the_sdk_makes_the_same_of_a_stream_and_of_the_whole(
    replies: Replies, events: Any, ask: dict[str, Any]
) -> None:
    body = whole_of(events, ask)
    nothing_extra(types.Response.model_validate(body, strict=True))
    replies.say(body)
    response = client(replies.url).responses.create(**ask)
    assert response.to_dict() == body
    assert response.output_text == said(events, "content")
    usage = events[-1].usage
    assert response.usage.input_tokens_details.cached_tokens == usage.cached_tokens
    assert response.usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert response.usage.output_tokens_details.reasoning_tokens == usage.reasoning_tokens
    replies.say(stream_of(events, ask))
    if response.status == "completed" and ask is ASK:
        with client(replies.url).responses.stream(**ask) as stream:
            final = stream.get_final_response()
        assert final.model_dump(exclude_none=True) == response.model_dump(exclude_none=True)
    else:
        *_, last = client(replies.url).responses.create(**ask, stream=True)
        assert last.response == response


@given(events=answers())
@random_answers
def test_an_answer_may_be_sent_back_as_the_sdk_has_it(replies: Replies, events: Any) -> None:
    replies.say(whole_of(events))
    response = client(replies.url).responses.create(**ASK)
    outputs = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "3"}
        for item in response.output
        if item.type == "function_call"
    ]
    parsed = []
    for dumped in (
        response.output,
        [item.model_dump() for item in response.output],
        [item.to_dict() for item in response.output],
    ):
        conversation = [{"role": "user", "content": "Hi"}, *dumped, *outputs, {"role": "user", "content": "Go on"}]
        client(replies.url).responses.create(model="m", input=conversation)
        parsed.append(parse_responses(parse_json(json.dumps(replies.asked).encode())).messages)
    assert all(turns == parsed[0] for turns in parsed)
    user, *turns, last = parsed[0]
    assert (user, last) == (Message("user", "Hi"), Message("user", "Go on"))
    tools = [turn for turn in turns if turn.role == "tool"]
    assert [(turn.tool_call_id, turn.content) for turn in tools] == [(name, "3") for name, *_ in called(events)]
    assistant = turns[0] if turns else Message("assistant", "")
    assert (assistant.content, assistant.reasoning or "") == (said(events, "content"), said(events, "reasoning"))
    calls = called(events)
    assert [(call.id, call.name) for call in assistant.tool_calls] == [(call_id, name) for call_id, name, _ in calls]
    if events[-2].reason == "tool_calls":
        assert [call.arguments for call in assistant.tool_calls] == [arguments for *_, arguments in calls]
    assert all(isinstance(json.loads(call.arguments), dict) for call in assistant.tool_calls)


@pytest.mark.parametrize(
    ("reason", "ended_by", "status", "why"),
    [
        ("stop", "", "completed", None),
        ("length", "", "incomplete", "max_output_tokens"),
        ("length", "shutdown", "incomplete", None),
        ("stop", "cancel", "incomplete", None),
    ],
)
def test_why_an_answer_ended_is_said_in_its_status(reason: Any, ended_by: Any, status: str, why: str | None) -> None:
    events = [Started(5, 2), TextDelta(0, "content", "x"), ChoiceFinished(0, reason, "", ended_by), END]
    body = whole_of(events)
    assert (body["status"], (body["incomplete_details"] or {}).get("reason")) == (status, why)
    assert body["output"][0]["status"] == status


@pytest.mark.parametrize(
    ("parts", "reason", "items"),
    [
        ([], "stop", ["message"]),
        ([], "length", []),
        ([TextDelta(0, "reasoning", "Hm")], "stop", ["reasoning", "message"]),
        ([TextDelta(0, "reasoning", "Hm")], "length", ["reasoning"]),
        ([ToolCallDelta(0, 0, "{}", "c", "add")], "tool_calls", ["function_call"]),
    ],
)
def test_an_answer_without_a_word_has_an_empty_message_where_it_is_complete(
    parts: list[Any], reason: Any, items: list[str]
) -> None:
    events = [Started(5, 2), *parts, ChoiceFinished(0, reason), END]
    body = whole_of(events)
    assert [item["type"] for item in body["output"]] == items
    assert sent(stream_of(events))[-1][1]["response"] == body
    done = [event["item"] for name, event in sent(stream_of(events)) if name == "response.output_item.done"]
    assert done == body["output"]


def test_log_probabilities_come_with_their_tokens() -> None:
    token = TokenLogprob(b"\xc3", -0.25, ((b"\xc3", -0.25), (b"a", float("-inf"))))
    events = [Started(1, 0), TextDelta(0, "content", "", (token,)), TextDelta(0, "content", "\u00e9", (token,))]
    events = [*events, ChoiceFinished(0, "stop"), END]
    response = types.Response.model_validate(whole_of(events), strict=True)
    first, second = response.output[0].content[0].logprobs
    assert (first.token, first.bytes, first.logprob) == ("\ufffd", [0xC3], -0.25)
    assert [(top.token, top.logprob) for top in second.top_logprobs] == [("\ufffd", -0.25), ("a", -9999.0)]
    deltas = [body for name, body in sent(stream_of(events)) if name == "response.output_text.delta"]
    assert [(body["delta"], len(body["logprobs"])) for body in deltas] == [("\u00e9", 2)]


@pytest.mark.parametrize("text", ["", "Well."])
def test_log_probabilities_of_calls_make_no_message(text: str) -> None:
    """They come with each token of a call, as deltas without text."""
    empty = TextDelta(0, "content", "", (TokenLogprob(b"x", -0.5),))
    said = [replace(empty, text=text)] if text else []
    call = [ToolCallDelta(0, 0, "{", "c", "add"), empty, ToolCallDelta(0, 0, "}"), empty]
    events = [Started(1, 0), *said, empty, *call, ChoiceFinished(0, "tool_calls"), END]
    body = whole_of(events)
    kinds = ["message", "function_call"] if text else ["function_call"]
    assert [item["type"] for item in body["output"]] == kinds
    assert not text or len(body["output"][0]["content"][0]["logprobs"]) == 2
    rows = sent(stream_of(events))
    assert rows[-1][1]["response"] == body
    assert [row["item"]["type"] for name, row in rows if name == "response.output_item.added"] == kinds


@pytest.mark.parametrize("begun", [True, False])
def test_a_broken_stream_ends_as_failed(begun: bool, replies: Replies) -> None:
    broken = Failed(RequestError(503, "the engine is starting again"))
    begin = [Started(3, 0), TextDelta(0, "content", "Hel")] if begun else []
    stream = stream_of([None, *begin, None, broken])
    assert stream.count(": keep-alive\n\n") == 2
    replies.say(stream)
    events = list(client(replies.url).responses.create(**ASK, stream=True))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    nothing_extra(events)
    last = events[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert (last.response.error.code, last.response.error.message) == ("server_error", "the engine is starting again")


@given(spoiled(FULL | {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]}))
@settings(deadline=None, max_examples=300)
def test_whatever_is_sent_is_refused_by_its_path_or_answered_in_their_types(body: dict[str, Any]) -> None:
    try:
        generation = parse_responses(body)
    except RequestError as error:
        assert error.status == 400 and error.param and error.message.startswith(f"{error.param}: ")
        return
    assert generation.messages
    events = [Started(1, 0), TextDelta(0, "content", "x"), ChoiceFinished(0, "stop"), END]
    nothing_extra(types.Response.model_validate(whole_of(events, body), strict=True))

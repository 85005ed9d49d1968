"""Tools that take a text: its pieces add up to it, OpenAI's own client reads them, and all of it may be sent back."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from sprat.serve.choices import Choice
from sprat.serve.custom_tools import InputReader, custom_tool
from sprat.serve.engine_client import JobEvent
from sprat.serve.errors import RequestError
from sprat.serve.events import (
    ChoiceFinished,
    Collector,
    Event,
    Finished,
    Started,
    TextDelta,
    ToolCallDelta,
    Usage,
    collect,
)
from sprat.serve.generation import Generation, ToolChoice
from sprat.serve.openai_chat import Head, parse_chat, stream_events, whole
from sprat.serve.openai_responses import parse_responses
from sprat.serve.openai_responses_answers import echo
from sprat.serve.openai_responses_answers import stream_events as responses_stream
from sprat.serve.openai_responses_answers import whole as responses_whole
from sprat.tokens.tool_formats import HERMES
from sprat.tokens.tool_parser import ToolCallParser
from tests.unit.serve.sdks import Replies, nothing_extra, pieces_of, replying, sent, streamed

openai: Any = pytest.importorskip("openai")
types: Any = pytest.importorskip("openai.types.responses")
chat_types: Any = pytest.importorskip("openai.types.chat")

STREAM_EVENT = TypeAdapter(types.ResponseStreamEvent)
ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
SAY = {"type": "custom", "custom": {"name": "say", "description": "Says.", "format": {"type": "text"}}}
PICK = {"type": "custom", "custom": {"name": "pick", "format": {
    "type": "grammar", "grammar": {"syntax": "regex", "definition": "a|b"}}}}  # fmt: skip
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
RESPONSES_SAY = {"type": "custom", "name": "say", "format": {"type": "text"}}
CUTS = st.lists(st.integers(0, 200), max_size=6)
few = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def replies() -> Iterator[Replies]:
    with replying() as replies:
        yield replies


@functools.cache
def client(url: str) -> Any:
    return openai.OpenAI(api_key="key", base_url=url, max_retries=0)


@given(st.text() | st.text(alphabet='\\"\n\u00e9\U0001f600ud83{}', max_size=12), CUTS, st.booleans(), st.booleans())
@settings(deadline=None, max_examples=500)
def test_the_pieces_of_an_input_add_up_to_what_json_says(
    text: str, cuts: Sequence[int], ascii_only: bool, spaced: bool
) -> None:
    separators = (" , ", " : ") if spaced else None
    written = json.dumps({"input": text}, ensure_ascii=ascii_only, separators=separators)
    reader = InputReader()
    pieces = [reader.push(piece) for piece in pieces_of(written, cuts)]
    assert "".join(pieces) == text
    for piece in pieces:
        piece.encode()  # no half character


@pytest.mark.parametrize("written", ["{}", '{"text": "x"}', "[1]", '{"input": 5}', "say it"])
def test_what_is_no_input_is_given_as_it_stands(written: str) -> None:
    reader = InputReader()
    assert "".join(map(reader.push, written)) == written


def test_half_a_pair_of_escapes_is_no_letter() -> None:
    reader = InputReader()
    assert reader.push('{"input": "a\\ud83dx\\udc00"}') == "a\ufffdx\ufffd"


def said(tools: dict[str, Any], text: str) -> list[Event]:
    """The events of a text that comes character by character."""
    choice = Choice(0, ToolCallParser(HERMES, list(tools)), lambda token: b"", tools=tools)
    events = [event for character in text for event in choice.push(JobEvent("content", text=character))]
    return [*events, *choice.finish(JobEvent("done", finish_reason="stop"), "")]


def test_calls_of_custom_tools_are_told_by_their_text_and_others_by_their_arguments() -> None:
    tools = {"say": custom_tool("say", "", None, ""), "add": parse_chat({**ASK, "tools": [ADD]}).tools[0]}
    first = '<tool_call>\n{"name": "say", "arguments": {"input": "a\\n\\"b\\""}}\n</tool_call>'
    second = '<tool_call>\n{"name": "add", "arguments": {"input": "x"}}\n</tool_call>'
    collector = Collector(1)
    for event in said(tools, f"{first}\n{second}\n{first}"):
        collector.push(event)
    calls = [(call.name, call.is_custom, call.arguments) for call in collector.choices[0].calls]
    assert calls == [("say", True, 'a\n"b"'), ("add", False, '{"input": "x"}'), ("say", True, 'a\n"b"')]
    assert collector.choices[0].finish == ChoiceFinished(0, "tool_calls")


@st.composite
def answers(draw: st.DrawFn) -> list[Event]:
    """Calls of a function in a namespace and of a custom tool, in pieces, whole or cut off."""
    parts: list[Event] = [TextDelta(0, "content", text) for text in draw(st.lists(st.just("Well. "), max_size=1))]
    for index, is_custom in enumerate(draw(st.lists(st.booleans(), min_size=1, max_size=3))):
        text = draw(st.text(max_size=20)) if is_custom else '{"a": 1}'
        named = ("say", True, "") if is_custom else ("add", False, draw(st.sampled_from(["", "mcp__math"])))
        parts.append(ToolCallDelta(0, index, "", f"call_{index}", *named))
        parts += [ToolCallDelta(0, index, piece, is_custom=is_custom) for piece in pieces_of(text, draw(CUTS)) if piece]
    end = draw(st.sampled_from([ChoiceFinished(0, "tool_calls"), ChoiceFinished(0, "length")]))
    return [Started(5, 2), *parts, end, Finished(Usage(5, 2, 9, 0), 0.1)]


SENT = {  # what their API sends, and the type that some versions of the client give no such field
    "custom_tool_call": ("status", types.ResponseCustomToolCall),
    "response.function_call_arguments.done": ("name", types.ResponseFunctionCallArgumentsDoneEvent),
}
NOT_TYPED = {kind: field for kind, (field, model) in SENT.items() if field not in model.model_fields}


def as_typed(body: Any) -> Any:
    """A body without what their API sends and the types of some versions of the client lack."""
    if isinstance(body, list):
        return [as_typed(item) for item in body]
    if not isinstance(body, dict):
        return body
    drop = NOT_TYPED.get(str(body.get("type")))
    return {name: as_typed(value) for name, value in body.items() if name != drop}


@given(answers())
@few
def test_responses_say_them_in_their_own_items_and_events(replies: Replies, events: list[Event]) -> None:
    ask = {"model": "m", "input": "Hi", "tools": [RESPONSES_SAY]}
    ids = {"response_id": "resp_1", "created": 1_750_000_000}
    body = responses_whole(echo(ask), collect(events), **ids)
    stream = streamed(lambda source: responses_stream(echo(ask), source, **ids), events)
    texts: dict[str, str] = {}
    for name, data in sent(stream):
        nothing_extra(STREAM_EVENT.validate_python(as_typed(data), strict=True))
        if name.endswith(".delta"):
            texts[data["item_id"]] = texts.get(data["item_id"], "") + data["delta"]
        elif name == "response.custom_tool_call_input.done":
            assert data["input"] == texts.get(data["item_id"], "")
    assert sent(stream)[-1][1]["response"] == body
    expected = collect(events).choices[0].calls
    items = [item for item in body["output"] if item["type"] != "message"]
    assert [(item["type"], item["name"], item.get("input", item.get("arguments"))) for item in items] == [
        ("custom_tool_call" if call.is_custom else "function_call", call.name, call.arguments) for call in expected
    ]
    assert [item.get("namespace", "") for item in items] == [call.namespace for call in expected]
    replies.say(body)
    response = client(replies.url).responses.create(**ask)
    assert response.to_dict() == body
    if body["status"] == "completed":
        replies.say(stream)
        with client(replies.url).responses.stream(**ask) as answer:
            final = answer.get_final_response()
        assert final.model_dump(exclude_none=True) == response.model_dump(exclude_none=True)
    outputs = [
        {"type": f"{item.type}_output", "call_id": item.call_id, "output": "3"}
        for item in response.output
        if item.type != "message"
    ]
    client(replies.url).responses.create(
        model="m", input=[{"role": "user", "content": "Hi"}, *response.output, *outputs]
    )
    turns = parse_responses(replies.asked).messages
    calls = turns[1].tool_calls
    assert [(call.id, call.name) for call in calls] == [
        (call.id, f"{call.namespace}__{call.name}" if call.namespace else call.name) for call in expected
    ]
    told = [json.loads(call.arguments) for call in calls]
    assert told == [{"input": call.arguments} if call.is_custom else {"a": 1} for call in expected]
    assert [turn.role for turn in turns[2:]] == ["tool"] * len(expected)


@given(answers())
@few
def test_chat_completions_say_them_in_their_own_form(replies: Replies, events: list[Event]) -> None:
    generation, head = Generation("m"), Head("chatcmpl-1", "m")
    expected = collect(events).choices[0].calls
    body = whole(generation, collect(events), head, {})
    completion = chat_types.ChatCompletion.model_validate(body, strict=True)
    nothing_extra(completion.choices[0].message.tool_calls)
    replies.say(body)
    message = client(replies.url).chat.completions.create(**ASK).choices[0].message
    for call, row in zip(expected, message.tool_calls, strict=True):
        if call.is_custom:
            assert (row.type, row.custom.name, row.custom.input) == ("custom", call.name, call.arguments)
        else:
            assert (row.type, row.function.name, row.function.arguments) == ("function", call.name, call.arguments)

    async def batches(source: Any) -> Any:
        async for event in source:
            yield [event]

    replies.say(streamed(lambda source: stream_events(generation, batches(source), head, dict), events))
    calls: dict[int, list[Any]] = {}
    for chunk in client(replies.url).chat.completions.create(**ASK, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            row = delta.to_dict()
            call = calls.setdefault(row["index"], [row.get("id"), row.get("type"), "", ""])
            said = row[call[1]]
            call[2] += said.get("name", "")
            call[3] += said["input" if call[1] == "custom" else "arguments"]
    assert [tuple(call) for call in calls.values()] == [
        (call.id, "custom" if call.is_custom else "function", call.name, call.arguments) for call in expected
    ]
    answers = [{"role": "tool", "tool_call_id": call.id, "content": "3"} for call in expected]
    client(replies.url).chat.completions.create(model="m", messages=[*ASK["messages"], message, *answers])
    turn = parse_chat(replies.asked).messages[1]
    told = [json.loads(call.arguments) for call in turn.tool_calls]
    assert told == [{"input": call.arguments} if call.is_custom else {"a": 1} for call in expected]


def test_a_custom_tool_is_chosen_by_its_own_kind() -> None:
    tools = [SAY, ADD, PICK]
    chosen = parse_chat({**ASK, "tools": tools, "tool_choice": {"type": "custom", "custom": {"name": "pick"}}})
    assert chosen.tool_choice == ToolChoice("named", "pick")
    assert [tool.path for tool in chosen.tools] == ["", "", "tools[2].custom.format.grammar.definition"]
    allowed: dict[str, Any] = {"mode": "required", "tools": [{"type": "custom", "custom": {"name": "say"}}]}
    some = parse_chat({**ASK, "tools": tools, "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}})
    assert [tool.name for tool in some.tools] == ["say"]


def test_the_schema_of_an_input_matches_the_pattern_as_a_whole() -> None:
    """As JSON schemas read a pattern: it is sought anywhere, so it is bound at both ends."""
    pattern = (custom_tool("f", "", "a|b", "").parameters or {})["properties"]["input"]["pattern"]
    assert [bool(re.search(pattern, text)) for text in ("a", "b", "ab", "xa", "bx", "")] == [True] * 2 + [False] * 4


@pytest.mark.parametrize(
    ("tool", "path"),
    [
        ({"type": "custom"}, "tools[0].custom"),
        ({"type": "custom", "custom": {"name": "a b"}}, "tools[0].custom.name"),
        ({"type": "custom", "custom": {"name": "f", "format": {"type": "grammar"}}}, "tools[0].custom.format.grammar"),
        ({"type": "custom", "custom": {"name": "f", "format": {"type": "grammar", "grammar": {
            "syntax": "lark", "definition": "start: A"}}}}, "tools[0].custom.format.grammar.syntax"),
        ({"type": "custom", "custom": {"name": "f", "format": {"type": "grammar", "grammar": {
            "syntax": "regex", "definition": ""}}}}, "tools[0].custom.format.grammar.definition"),
        ({"type": "custom", "custom": {"name": "f", "format": {"type": "grammar", "grammar": {
            "syntax": "regex", "definition": "x" * 20_000}}}}, "tools[0].custom.format.grammar.definition"),
    ],
)  # fmt: skip
def test_a_tool_that_cannot_be_had_is_refused_by_its_path(tool: dict[str, Any], path: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat({**ASK, "tools": [tool]})
    assert caught.value.param == path and caught.value.status == 400

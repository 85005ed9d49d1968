"""Chat completions: what OpenAI's own client makes of our chunks and objects, and what may be asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.serve.errors import RequestError
from sprat.serve.events import Event, Started, collect
from sprat.serve.generation import Generation, ToolChoice
from sprat.serve.openai_chat import Head, parse_chat, stream_events, whole
from tests.unit.serve.sdks import answers, called, said

types = pytest.importorskip("openai.types.chat")
HEAD = Head("chatcmpl-1", "tiny")
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def stream(generation: Generation, events: Sequence[Event], head: Head, size: int = 1) -> list[dict[str, Any]]:
    """The chunks of a whole stream, whose events come ``size`` at a time, with silence before."""

    async def batches() -> AsyncIterator[list[Event] | None]:
        yield None
        for start in range(0, len(events), size):
            yield list(events[start : start + size])

    async def read() -> str:
        return "".join([text async for text in stream_events(generation, batches(), head, lambda: {"seed": 1})])

    text = asyncio.run(read())
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@settings(max_examples=60, deadline=None)
@given(answers(with_logprobs=True), st.booleans(), st.integers(1, 5))
def test_chunks_and_the_whole_answer_say_the_same_to_openais_own_types(
    events: list[Event], include_usage: bool, size: int
) -> None:
    generation = Generation("tiny", logprobs=True)
    head = Head("chatcmpl-1", "tiny", include_usage)
    answer = types.ChatCompletion.model_validate(whole(generation, collect(events), HEAD, {"seed": 1}))
    chunks = stream(generation, events, head, size)
    parsed = [types.ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks]
    content = reasoning = ""
    calls: dict[int, list[str]] = {}
    logprobs: list[Any] = []
    for chunk in parsed:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += (choice.delta.model_extra or {}).get("reasoning_content") or ""
            logprobs += (choice.logprobs and choice.logprobs.content) or []
            for call in choice.delta.tool_calls or ():
                if call.id is not None:
                    assert call.index not in calls, "an id comes once"
                    calls[call.index] = [call.id, call.function.name, ""]
                calls[call.index][2] += call.function.arguments
    message = answer.choices[0].message
    assert content == (message.content or "") == said(events, "content")
    assert reasoning == (message.model_extra.get("reasoning_content") or "") == said(events, "reasoning")
    assert [tuple(call) for call in calls.values()] == called(events)
    assert [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or ()] == called(events)
    assert logprobs == answer.choices[0].logprobs.content
    finishes = [choice.finish_reason for chunk in parsed for choice in chunk.choices if choice.finish_reason]
    assert finishes == [answer.choices[0].finish_reason]
    usages = [chunk.usage for chunk in parsed if chunk.usage is not None]
    assert usages == [answer.usage], "exactly one chunk carries the usage"
    assert bool(parsed[-1].choices) is not include_usage


def test_any_message_that_openais_client_returned_may_be_sent_back() -> None:
    @settings(max_examples=40, deadline=None)
    @given(answers())
    def check(events: list[Event]) -> None:
        answer = types.ChatCompletion.model_validate(whole(Generation("tiny"), collect(events), HEAD, {}))
        for row in (answer.choices[0].message.model_dump(), answer.choices[0].message.to_dict()):
            generation = parse_chat({**ASK, "messages": [*ASK["messages"], row, {"role": "user", "content": "?"}]})
            turn = generation.messages[1]
            assert (turn.content, turn.reasoning or "") == (said(events, "content"), said(events, "reasoning"))
            expected = called(events)
            assert [(call.id, call.name) for call in turn.tool_calls] == [call[:2] for call in expected]
            for call, (_, _, arguments) in zip(turn.tool_calls, expected, strict=True):
                assert isinstance(json.loads(call.arguments), dict)  # of a call that was cut off, what is whole
                if answer.choices[0].finish_reason != "length":
                    assert call.arguments == (arguments or "{}")

    check()


def test_deepseeks_documented_call_is_understood() -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": "Hello!"}],
        "thinking": {"type": "enabled"},
        "reasoning_effort": "high",
        "stream": False,
    }
    generation = parse_chat(body)
    assert (generation.thinking, generation.effort, generation.ignored) == (True, "high", ())


@pytest.mark.parametrize(
    ("fields", "thinking", "effort"),
    [
        ({}, None, ""),
        ({"thinking": {"type": "disabled"}}, False, ""),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}, False, "max"),
        ({"thinking": {"type": "adaptive"}}, None, ""),
        ({"reasoning_effort": "none"}, None, "none"),
        ({"reasoning_effort": "ultra"}, None, "ultra"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False, ""),
    ],
)
def test_how_thinking_is_said(fields: dict[str, Any], thinking: bool | None, effort: str) -> None:
    generation = parse_chat({**ASK, **fields})
    assert (generation.thinking, generation.effort) == (thinking, effort)


def test_a_budget_of_thinking_is_the_engines_bound() -> None:
    assert parse_chat({**ASK, "thinking": {"type": "enabled", "budget_tokens": 64}}).max_think_tokens == 64


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "hi", "prefix": True}]}, "messages[0].prefix"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"n": 9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}],
          "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"seed": 2**63}, "seed"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_by_its_path(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_chat({**ASK, **fields})
    assert (refused.value.status, refused.value.param) == (400, path)
    assert path in refused.value.message


def test_unknown_fields_and_nulls_are_ignored_and_listed() -> None:
    generation = parse_chat({**ASK, "temprature": 0, "logit_bias": None, "store": True, "seed": 3})
    assert set(generation.ignored) == {"temprature", "logit_bias", "store"}
    assert generation.sampling["seed"] == 3


def test_the_last_assistants_message_is_gone_on_with_where_it_is_a_prefix() -> None:
    last = {"role": "assistant", "content": "The answer is"}
    messages = [*ASK["messages"], last]
    assert not parse_chat({**ASK, "messages": messages}).continues
    assert parse_chat({**ASK, "messages": [*ASK["messages"], {**last, "prefix": True}]}).continues


def test_who_names_both_limits_means_the_newer() -> None:
    generation = parse_chat({**ASK, "max_tokens": 5, "max_completion_tokens": 7})
    assert (generation.max_tokens, generation.paths["max_tokens"]) == (7, "max_completion_tokens")


def test_a_named_tool_is_chosen() -> None:
    tools = [{"type": "function", "function": {"name": name, "strict": True}} for name in ("f", "g")]
    choice = {"type": "function", "function": {"name": "g"}}
    generation = parse_chat({**ASK, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False})
    assert generation.tool_choice == ToolChoice("named", "g")
    assert [tool.strict for tool in generation.tools] == [True, True] and not generation.parallel_tool_calls


def test_a_call_that_was_cut_off_comes_back_as_far_as_it_is_whole() -> None:
    function = {"name": "f", "arguments": '{"a": [1, 2], "city": "Par'}
    said = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    rows = [*ASK["messages"], said, {"role": "tool", "tool_call_id": "c", "content": "invalid arguments"}]
    assert parse_chat({**ASK, "messages": rows}).messages[1].tool_calls[0].arguments == '{"a": [1, 2]}'
    function["arguments"] = "[1]"
    with pytest.raises(RequestError) as caught:
        parse_chat({**ASK, "messages": rows})
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_of_allowed_tools_the_model_is_shown_those_alone(mode: str) -> None:
    """As OpenAI's reference has it: ``{"type": "allowed_tools", "allowed_tools": {"mode", "tools"}}``."""
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g", "h")]
    allowed: dict[str, Any] = {"mode": mode, "tools": [tools[2], tools[0]]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    generation = parse_chat({**ASK, "tools": tools, "tool_choice": choice})
    assert generation.tool_choice == ToolChoice(mode)  # type: ignore[arg-type]
    assert [tool.name for tool in generation.tools] == ["f", "h"] and not generation.ignored
    for rows, path in (([], "tools"), ([{"type": "function", "function": {"name": "x"}}], "tools[0].function.name")):
        with pytest.raises(RequestError) as caught:
            parse_chat({**ASK, "tools": tools, "tool_choice": {**choice, "allowed_tools": {**allowed, "tools": rows}}})
        assert caught.value.param == f"tool_choice.allowed_tools.{path}"


def test_a_form_has_no_beginning_where_a_message_is_gone_on_with() -> None:
    rows = [*ASK["messages"], {"role": "assistant", "content": '{"a":', "prefix": True}]
    with pytest.raises(RequestError) as caught:
        parse_chat({**ASK, "messages": rows, "response_format": {"type": "json_object"}})
    assert caught.value.param == "response_format"
    assert parse_chat({**ASK, "messages": rows, "response_format": {"type": "text"}}).continues


def test_a_stream_of_several_choices_begins_and_ends_each() -> None:
    events: list[Event] = [Started(3, 0)]
    assert [c["choices"][0]["index"] for c in stream_begin(Generation("tiny", n=3), events)] == [0, 1, 2]


def stream_begin(generation: Generation, events: list[Event]) -> list[dict[str, Any]]:
    from sprat.serve.openai_chat import ChunkWriter

    text = ChunkWriter(generation, HEAD).write(events[0])
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]

"""A wrong request is refused with the name of the field; a right one is understood."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.engine.sequence import Usage
from sprat.serve.errors import RequestError
from sprat.serve.protocol import parse_chat_request, usage_body

GOOD: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "1 + 1"}]}


def body(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
            "messages.0.content.0.type",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool": 1}]}, "messages.0.tool"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [*GOOD["messages"], {"role": "system", "content": "x"}, *GOOD["messages"]]}, "messages"),
        ({"messages": [*GOOD["messages"], {"role": "developer", "content": "x"}, *GOOD["messages"]]}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"seed": -1}, "seed"),
        ({"n": 2}, "n"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"thinking": True}, "thinking"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
        ({"temprature": 0}, "temprature"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat_request(body(**changes))
    assert caught.value.status == 400
    assert caught.value.body()["error"]["param"] == param
    assert set(caught.value.body()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b'"\\ud800"'])
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat_request(raw)
    assert caught.value.status == 400


def test_half_a_character_is_refused_and_not_a_crash() -> None:
    with pytest.raises(RequestError):
        parse_chat_request(b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}')


def test_a_misspelt_field_is_told_its_right_name() -> None:
    with pytest.raises(RequestError, match="did you mean 'temperature'"):
        parse_chat_request(body(temprature=0))


@pytest.mark.parametrize(
    ("changes", "thinks"),
    [
        ({}, None),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "max"}, True),
    ],
)
def test_thinking_is_switched_in_deepseeks_or_openais_way_or_left_to_the_model(
    changes: dict[str, Any], thinks: bool | None
) -> None:
    assert parse_chat_request(body(**changes)).enable_thinking is thinks


# The fields of CompletionCreateParams in the openai package 3.57.0, but for model and messages, and the rest.
OPENAI = (
    "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_completion_tokens",
    "max_tokens", "metadata", "modalities", "moderation", "n", "parallel_tool_calls", "prediction", "presence_penalty",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "response_format",
    "safety_identifier", "seed", "service_tier", "stop", "store", "stream", "stream_options", "temperature",
    "tool_choice", "tools", "top_logprobs", "top_p", "user", "verbosity", "web_search_options",
)  # fmt: skip
# Of its ChatCompletionMessageParam and ChatCompletionMessage, but for role and content, and the rest.
OPENAI_TURN = ("annotations", "audio", "function_call", "name", "refusal", "tool_calls", "tool_call_id")


@pytest.mark.parametrize("field", [*OPENAI, "top_k", "thinking"])
def test_null_is_as_if_the_field_were_left_out(field: str) -> None:
    ask, plain = parse_chat_request(body(**{field: None})), parse_chat_request(body())
    assert (ask.requested_max_tokens, ask.stop_strings, ask.enable_thinking, bool(ask.stream)) == (
        None,
        (),
        None,
        bool(plain.stream),
    )
    asked = dict.fromkeys(("include_usage", "include_obfuscation"))
    assert parse_chat_request(body(stream=True, stream_options=asked)).stream


@pytest.mark.parametrize("field", [*OPENAI_TURN, "reasoning_content"])
@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_null_in_a_turn_is_as_if_the_field_were_left_out(role: str, field: str) -> None:
    turn = {"role": role, "content": "a", field: None}
    ask = parse_chat_request(body(messages=[turn, *GOOD["messages"]]))
    assert [message.text for message in ask.messages] == ["a", "1 + 1"]


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": {}}, {"top_logprobs": 0}, {"tool_choice": "none"}, {"tool_choice": "auto"}, {"functions": []},
        {"function_call": "none"}, {"parallel_tool_calls": True}, {"parallel_tool_calls": False}, {"store": False},
        {"metadata": {}}, {"modalities": ["text"]}, {"service_tier": "auto"}, {"service_tier": "default"},
        {"safety_identifier": "s"}, {"prompt_cache_key": "k"}, {"prompt_cache_retention": "in_memory"},
        {"verbosity": "medium"}, {"stop": []}, {"tools": []},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [], "annotations": []}, *GOOD["messages"]]},
    ],
)  # fmt: skip
def test_values_that_ask_for_nothing_are_accepted(changes: dict[str, Any]) -> None:
    assert parse_chat_request(body(**changes)).messages[-1].text == "1 + 1"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"logit_bias": {"7": 100}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities.1"),
        ({"audio": {"voice": "ash", "format": "wav"}}, "audio"),
        ({"prediction": {"type": "content", "content": "a"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options"),
        ({"store": True}, "store"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
        ({"verbosity": "low"}, "verbosity"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}, *GOOD["messages"]]},
            "messages.0.tool_calls",
        ),
        ({"messages": [{"role": "assistant", "refusal": "no"}, *GOOD["messages"]]}, "messages.0.refusal"),
    ],
)
def test_what_is_not_offered_is_refused_as_that(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match="does not offer it; leave it out") as caught:
        parse_chat_request(body(**changes))
    error = caught.value.body()["error"]
    assert (error["code"], error["param"]) == ("not_offered", param)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        "json",
    ],
)
def test_who_asks_for_a_form_is_told_where_there_is_one(form: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat_request(body(response_format=form))
    assert caught.value.status == 400 and str(caught.value.param).startswith("response_format")
    import sprat.engine

    example = re.search(r"sprat\.Sampling\(.*\)\)", str(caught.value))
    assert example is not None
    made = eval(example[0], {"sprat": sprat, "schema": {"type": "object"}})
    assert made.response == sprat.engine.Response.json({"type": "object"})


def test_contradicting_switches_are_refused() -> None:
    with pytest.raises(RequestError, match="not both"):
        parse_chat_request(body(thinking={"type": "enabled"}, reasoning_effort="none"))


def test_what_clients_send_by_habit_is_accepted() -> None:
    ask = parse_chat_request(
        body(
            n=1, frequency_penalty=0, presence_penalty=0.0, logprobs=False, tools=[], user="u", seed=7, temperature=0,
            stop="x", max_tokens=3, max_completion_tokens=5, response_format={"type": "text"}, stream=True,
            stream_options={"include_usage": True}, metadata={"a": "b"},
            messages=[
                {"role": "system", "content": "s"},
                {"role": "user", "name": "u", "content": [
                    {"type": "text", "text": t, "prompt_cache_breakpoint": None} for t in "ab"
                ]},
                {"role": "assistant", "content": None, "reasoning_content": "r"},
                {"role": "user", "content": "c"},
            ],
        )
    )  # fmt: skip
    assert ask.requested_max_tokens == 5
    assert ask.stop_strings == ("x",)
    assert [message.text for message in ask.messages] == ["s", "ab", "", "c"]


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(["messages", "temperature", "stop", "thinking", "seed", "stream_options", "tools", "user", "x"]),
)
def test_any_json_is_either_understood_or_refused(value: Any, field: str) -> None:
    try:
        ask = parse_chat_request(json.dumps({**GOOD, field: value}).encode())
    except RequestError as error:
        assert error.status == 400
    else:
        assert ask.messages[-1].role == "user"


@given(*[st.integers(0, 10**9)] * 4)
def test_hit_plus_miss_is_always_the_prompt(prompt: int, completion: int, reasoning: int, hit: int) -> None:
    usage = usage_body(Usage(prompt, completion, reasoning, hit, prompt - hit))
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"] == prompt
    assert usage["total_tokens"] == prompt + completion

"""A wrong request is refused with the name of the field; a right one is understood."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.serve.protocol import RequestError, parse, usage_body

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
        parse(body(**changes))
    assert caught.value.status == 400
    assert caught.value.body()["error"]["param"] == param
    assert set(caught.value.body()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b'"\\ud800"'])
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse(raw)
    assert caught.value.status == 400


def test_half_a_character_is_refused_and_not_a_crash() -> None:
    with pytest.raises(RequestError):
        parse(b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}')


def test_a_misspelt_field_is_told_its_right_name() -> None:
    with pytest.raises(RequestError, match="did you mean 'temperature'"):
        parse(body(temprature=0))


@pytest.mark.parametrize(
    ("changes", "thinks"),
    [
        ({}, None),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
    ],
)
def test_thinking_is_switched_in_deepseeks_or_openais_way_or_left_to_the_model(
    changes: dict[str, Any], thinks: bool | None
) -> None:
    assert parse(body(**changes)).thinks is thinks


# The fields that OpenAI's schema of 2025 calls nullable, of those that are known here, and stream_options' one.
NULLABLE = (
    "temperature", "top_p", "n", "stream", "stop", "seed", "max_tokens", "max_completion_tokens", "frequency_penalty",
    "presence_penalty", "logprobs", "metadata", "reasoning_effort", "stream_options",
)  # fmt: skip


@pytest.mark.parametrize("field", [*NULLABLE, "top_k"])
def test_null_is_as_if_the_field_were_left_out(field: str) -> None:
    ask, plain = parse(body(**{field: None})), parse(body())
    assert (ask.limit, ask.stops, ask.thinks, bool(ask.stream)) == (None, (), None, bool(plain.stream))
    assert parse(body(stream=True, stream_options={"include_usage": None})).stream


def test_contradicting_switches_are_refused() -> None:
    with pytest.raises(RequestError, match="not both"):
        parse(body(thinking={"type": "enabled"}, reasoning_effort="none"))


def test_what_clients_send_by_habit_is_accepted() -> None:
    ask = parse(
        body(
            n=1, frequency_penalty=0, presence_penalty=0.0, logprobs=False, tools=[], user="u", seed=7, temperature=0,
            stop="x", max_tokens=3, max_completion_tokens=5, response_format={"type": "text"}, stream=True,
            stream_options={"include_usage": True}, metadata={"a": "b"},
            messages=[
                {"role": "system", "content": "s"},
                {"role": "user", "name": "u", "content": [{"type": "text", "text": t} for t in "ab"]},
                {"role": "assistant", "content": None, "reasoning_content": "r"},
                {"role": "user", "content": "c"},
            ],
        )
    )  # fmt: skip
    assert ask.limit == 5
    assert ask.stops == ("x",)
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
        ask = parse(json.dumps({**GOOD, field: value}).encode())
    except RequestError as error:
        assert error.status == 400
    else:
        assert ask.messages[-1].role == "user"


@given(*[st.integers(0, 10**9)] * 4)
def test_hit_plus_miss_is_always_the_prompt(prompt: int, completion: int, reasoning: int, hit: int) -> None:
    usage = usage_body(prompt, completion, reasoning, hit)
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"] == prompt
    assert usage["total_tokens"] == prompt + completion

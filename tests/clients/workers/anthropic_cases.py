"""Messages through Anthropic's SDK, every answer and event validated strictly against its own types."""

from __future__ import annotations

import json
from typing import Any, Literal

import anthropic
from cases import Target, raised, run
from conversations import (
    ANTHROPIC_TOOLS,
    BOTH_ANSWER,
    FORECAST_SCHEMA,
    HELLO,
    HELLO_ANSWER,
    MODEL,
    SUM,
    SUM_ANSWER,
    SUM_REASONING,
    TIME_AND_WEATHER,
    TIME_CALL,
    TIME_RESULT,
    WEATHER,
    WEATHER_ANSWER,
    WEATHER_CALL,
    WEATHER_RESULT,
    fits_forecast,
    user,
)
from pydantic import BaseModel

GREEDY = {"temperature": 0}
THINKING = {"type": "enabled", "budget_tokens": 1024}


class Forecast(BaseModel):
    city: Literal["Paris", "Oslo"]
    sky: Literal["sunny", "cloudy", "rain"]
    warm: bool


def client(target: Target, base: str = "", **settings: Any) -> anthropic.Anthropic:
    """The SDK, which checks every answer and every event strictly."""
    settings = {"max_retries": 0, "timeout": 60, "api_key": target.key, **settings}
    return anthropic.Anthropic(base_url=target.url + base, _strict_response_validation=True, **settings)


def ask(target: Target, base: str = "", **fields: Any) -> Any:
    """One message at temperature 0; the newest SDK has no such argument any more, and older ones send it."""
    extra = {name: fields.pop(name) for name in ("temperature", "top_k", "top_p") if name in fields}
    fields = {"model": MODEL, "messages": user(HELLO), "max_tokens": 1200, **fields}
    return client(target, base).messages.create(**fields, extra_body={"temperature": 0, **extra})


def case_message(target: Target) -> None:
    for base in ("", "/anthropic"):
        answer = ask(target, base)
        assert answer.type == "message" and answer.role == "assistant" and answer.model == MODEL and answer.id
        assert [(block.type, block.text) for block in answer.content] == [("text", HELLO_ANSWER)]
        assert answer.stop_reason == "end_turn" and answer.stop_sequence is None
        assert answer.usage.output_tokens > 0
        assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) > 0


def case_events(target: Target) -> None:
    events = list(ask(target, stream=True))
    kinds = [event.type for event in events if event.type != "ping"]
    middle = ["content_block_delta"] * (len(kinds) - 5)
    assert kinds == ["message_start", "content_block_start", *middle, "content_block_stop", "message_delta",
                     "message_stop"], kinds  # fmt: skip
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert all(delta.type == "text_delta" for delta in deltas)
    assert "".join(delta.text for delta in deltas) == HELLO_ANSWER
    start = events[0].message
    assert start.content == [] and start.stop_reason is None
    whole = ask(target).usage
    last = next(event for event in events if event.type == "message_delta")
    assert last.delta.stop_reason == "end_turn" and last.usage.output_tokens == whole.output_tokens
    total = start.usage.input_tokens + (start.usage.cache_read_input_tokens or 0)
    assert total == whole.input_tokens + (whole.cache_read_input_tokens or 0)


def case_stream_helper(target: Target) -> None:
    with client(target).messages.stream(model=MODEL, messages=user(HELLO), max_tokens=99, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == HELLO_ANSWER == final.content[0].text and final.usage.output_tokens > 0


def case_beta_messages(target: Target) -> None:
    answer = client(target).beta.messages.create(
        model=MODEL, messages=user(HELLO), max_tokens=99, extra_body=GREEDY, betas=["interleaved-thinking-2025-05-14"]
    )
    assert answer.content[0].text == HELLO_ANSWER


def case_system_and_blocks(target: Target) -> None:
    cached = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    blocks = [{"role": "user", "content": [{"type": "text", "text": HELLO, "cache_control": {"type": "ephemeral"}}]}]
    for fields in (
        {"system": "Be brief."}, {"system": cached}, {"messages": blocks},
        {"messages": [*user(HELLO), *user(SUM)]},
        {"messages": [*user(HELLO), {"role": "assistant", "content": "Hi"}, *user(HELLO)]},
        {"metadata": {"user_id": "u"}, "service_tier": "auto", "top_k": 5, "top_p": 0.9},
    ):  # fmt: skip
        assert ask(target, max_tokens=5, **fields).usage.output_tokens > 0, fields
    assert ask(target, messages=blocks).content[0].text == HELLO_ANSWER


def case_what_claude_code_sends(target: Target) -> None:
    """The system between and behind the turns, wishes about thinking, a picture that a tool read."""
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    use = {"type": "tool_use", "id": "t", "name": WEATHER_CALL["name"], "input": json.loads(WEATHER_CALL["arguments"])}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [image]}
    turns = [*user(WEATHER), {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    for fields in (
        {"messages": [*user(HELLO), {"role": "system", "content": "Be brief."}]},
        {"thinking": {"type": "adaptive", "display": "omitted"}, "output_config": {"effort": "high"}},
        {"messages": turns, "tools": [*ANTHROPIC_TOOLS, {"type": "web_search_20250305", "name": "web_search"}]},
    ):
        answer = client(target).beta.messages.create(
            **{"model": MODEL, "messages": user(HELLO), "max_tokens": 32000, "stream": False, "timeout": 60, **fields},
            extra_body={"context_management": {"edits": []}, "temperature": 0},
            betas=["context-management-2025-06-27", "mid-conversation-system-2026-04-07"],
        )
        assert answer.usage.output_tokens > 0, fields
    system = {"role": "system", "content": "Be brief."}
    first = client(target).messages.count_tokens(model=MODEL, messages=user(HELLO), system="Be brief.")
    last = client(target).messages.count_tokens(model=MODEL, messages=[*user(HELLO), system])
    assert first.input_tokens == last.input_tokens


def case_assistant_last_is_continued(target: Target) -> None:
    answer = ask(target, messages=[*user(HELLO), {"role": "assistant", "content": "Hello! How can"}])
    assert answer.content[0].text == " I help you today?", answer


def case_stops(target: Target) -> None:
    answer = ask(target, stop_sequences=["How", "never"])
    assert answer.stop_reason == "stop_sequence" and answer.stop_sequence == "How"
    assert answer.content[0].text == "Hello! "
    assert ask(target, max_tokens=3).stop_reason == "max_tokens"


def case_thinking(target: Target) -> None:
    answer = ask(target, messages=user(SUM), thinking=THINKING)
    thought, text = answer.content
    assert (thought.type, thought.thinking) == ("thinking", SUM_REASONING) and text.text == SUM_ANSWER
    assert isinstance(thought.signature, str)
    quiet = ask(target, messages=user(SUM), thinking={"type": "disabled"})
    assert [block.type for block in quiet.content] == ["text"]
    adaptive = ask(target, messages=user(SUM), thinking={"type": "adaptive"}, output_config={"effort": "high"})
    assert adaptive.content[-1].text == SUM_ANSWER


def case_thinking_events(target: Target) -> None:
    events = list(ask(target, messages=user(SUM), thinking=THINKING, stream=True))
    starts = [event.content_block.type for event in events if event.type == "content_block_start"]
    assert starts == ["thinking", "text"]
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert "".join(delta.thinking for delta in deltas if delta.type == "thinking_delta") == SUM_REASONING
    assert "".join(delta.text for delta in deltas if delta.type == "text_delta") == SUM_ANSWER
    assert sum(delta.type == "signature_delta" for delta in deltas) == 1
    indices = [event.index for event in events if event.type == "content_block_stop"]
    assert indices == [0, 1]


def case_history_sent_back_as_it_came(target: Target) -> None:
    answer = ask(target, messages=user(SUM), thinking=THINKING)
    dumped = [block.model_dump() for block in answer.content]
    for content in (answer.content, dumped, [block.to_dict() for block in answer.content]):
        turns = [*user(SUM), {"role": "assistant", "content": content}, *user(HELLO)]
        assert ask(target, messages=turns, max_tokens=1200, thinking=THINKING).usage.output_tokens > 0
    redacted = [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": SUM_ANSWER}]
    turns = [*user(SUM), {"role": "assistant", "content": redacted}, *user(HELLO)]
    assert ask(target, messages=turns, max_tokens=5).usage.output_tokens > 0


def case_tools(target: Target) -> None:
    answer = ask(target, tools=ANTHROPIC_TOOLS, tool_choice={"type": "any"})
    assert answer.stop_reason == "tool_use"
    for block in answer.content:
        assert block.type == "tool_use" and block.id and block.input["city"] in ("Paris", "Oslo")
    named = ask(target, tools=ANTHROPIC_TOOLS, tool_choice={"type": "tool", "name": "get_time"})
    assert [block.name for block in named.content] == ["get_time"] and named.content[0].input.keys() == {"city"}
    one = {"type": "any", "disable_parallel_tool_use": True}
    assert sum(block.type == "tool_use" for block in ask(target, tools=ANTHROPIC_TOOLS, tool_choice=one).content) == 1
    none = ask(target, messages=user(WEATHER), tools=ANTHROPIC_TOOLS, tool_choice={"type": "none"}, max_tokens=20)
    assert all(block.type == "text" for block in none.content)


def case_tool_round_trip(target: Target) -> None:
    results = {WEATHER_CALL["name"]: WEATHER_RESULT, TIME_CALL["name"]: TIME_RESULT}
    for question, expected in ((WEATHER, WEATHER_ANSWER), (TIME_AND_WEATHER, BOTH_ANSWER)):
        answer = ask(target, messages=user(question), tools=ANTHROPIC_TOOLS)
        uses = [block for block in answer.content if block.type == "tool_use"]
        assert answer.stop_reason == "tool_use" and uses[0].name == WEATHER_CALL["name"], answer
        texts = [{"type": "tool_result", "tool_use_id": use.id, "content": results[use.name]} for use in uses]
        blocks = [{**row, "content": [{"type": "text", "text": row["content"]}]} for row in texts]
        for content in (texts, blocks, [{**row, "is_error": False} for row in texts]):
            turns = [*user(question), {"role": "assistant", "content": answer.content},
                     {"role": "user", "content": content}]  # fmt: skip
            last = ask(target, messages=turns, tools=ANTHROPIC_TOOLS)
            assert last.content[0].text == expected and last.stop_reason == "end_turn", last


def case_tool_events(target: Target) -> None:
    events = list(ask(target, messages=user(TIME_AND_WEATHER), tools=ANTHROPIC_TOOLS, stream=True))
    blocks = {event.index: event.content_block for event in events if event.type == "content_block_start"}
    inputs = dict.fromkeys(blocks, "")
    for event in events:
        if event.type == "content_block_delta" and event.delta.type == "input_json_delta":
            inputs[event.index] += event.delta.partial_json
    uses = [index for index, block in blocks.items() if block.type == "tool_use"]
    assert [blocks[index].name for index in uses] == [WEATHER_CALL["name"], TIME_CALL["name"]]
    assert [json.loads(inputs[index]) for index in uses] == [
        json.loads(WEATHER_CALL["arguments"]), json.loads(TIME_CALL["arguments"]),
    ]  # fmt: skip
    with client(target).messages.stream(
        model=MODEL, messages=user(WEATHER), tools=ANTHROPIC_TOOLS, max_tokens=200, extra_body=GREEDY
    ) as stream:
        final = stream.get_final_message()
    assert final.content[-1].input == json.loads(WEATHER_CALL["arguments"]) and final.stop_reason == "tool_use"


def case_structured(target: Target) -> None:
    form = {"format": {"type": "json_schema", "schema": FORECAST_SCHEMA}}
    assert fits_forecast(json.loads(ask(target, output_config=form).content[0].text))
    parsed = client(target).messages.parse(
        model=MODEL, messages=user(HELLO), max_tokens=200, output_format=Forecast
    )  # fmt: skip
    assert isinstance(parsed.parsed_output, Forecast)


def case_count_tokens(target: Target) -> None:
    for base in ("", "/anthropic"):
        for fields in ({}, {"system": "Be brief."}, {"tools": ANTHROPIC_TOOLS}):
            counted = client(target, base).messages.count_tokens(model=MODEL, messages=user(WEATHER), **fields)
            usage = ask(target, base, messages=user(WEATHER), max_tokens=2, **fields).usage
            assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0), fields
    beta = client(target).beta.messages.count_tokens(model=MODEL, messages=user(HELLO))
    assert beta.input_tokens > 0


def case_cache_is_counted_apart(target: Target) -> None:
    system = "It is sunny in Paris, and 12:30 in Oslo, says the model of the tests. " * 20
    first, second = (ask(target, system=system, max_tokens=2).usage for _ in range(2))
    assert second.cache_read_input_tokens > 0
    total = first.input_tokens + (first.cache_read_input_tokens or 0)
    assert second.input_tokens + second.cache_read_input_tokens == total


def case_errors(target: Target) -> None:
    wrong = client(target, api_key="wrong")
    error = raised(anthropic.AuthenticationError, lambda: wrong.messages.create(
        model=MODEL, messages=user(HELLO), max_tokens=9))  # fmt: skip
    assert error.body["type"] == "error" and error.body["error"]["type"] == "authentication_error", error.body
    error = raised(anthropic.NotFoundError, lambda: ask(target, model="none-such"))
    assert error.body["error"]["type"] == "not_found_error" and "none-such" in error.body["error"]["message"]
    error = raised(anthropic.BadRequestError, lambda: ask(target, messages=user("word " * 20000)))
    assert error.body["error"]["type"] == "invalid_request_error"
    assert "prompt is too long" in error.body["error"]["message"], error.body
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    for fields in (
        {"messages": []}, {"max_tokens": 0}, {"messages": [{"role": "king", "content": "x"}]},
        {"messages": [{"role": "user", "content": [image]}]}, {"thinking": {"type": "enabled", "budget_tokens": -1}},
        {"tools": [{"name": "a"}], "tool_choice": {"type": "any"}}, {"temperature": 99},
        {"tool_choice": {"type": "tool", "name": "none_such"}, "tools": ANTHROPIC_TOOLS},
    ):  # fmt: skip
        error = raised(anthropic.BadRequestError, lambda fields=fields: ask(target, **fields))
        assert error.body["error"]["message"], fields


def case_batches_are_not_found(target: Target) -> None:
    sdk = client(target)
    for call in (lambda: sdk.messages.batches.list(), lambda: sdk.messages.batches.retrieve("msgbatch_1")):
        error = raised(anthropic.NotFoundError, call)
        assert error.body["type"] == "error" and error.body["error"]["type"] == "not_found_error", error.body


def case_bearer_token(target: Target) -> None:
    sdk = anthropic.Anthropic(base_url=target.url, auth_token=target.key, api_key=None, max_retries=0)
    answer = sdk.messages.create(model=MODEL, messages=user(HELLO), max_tokens=99, extra_body=GREEDY)
    assert answer.content[0].text == HELLO_ANSWER and answer._request_id


def case_models(target: Target) -> None:
    sdk = anthropic.Anthropic(base_url=target.url + "/anthropic", api_key=target.key, max_retries=0)
    assert [model.id for model in sdk.models.list()] == [MODEL]
    assert sdk.models.retrieve(MODEL).id == MODEL


if __name__ == "__main__":
    run(globals())

"""Tools through openai's SDK: forced, named, of the model's own accord, in parallel, streamed, and their results."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from cases import Target, raised, run
from conversations import (
    BOTH_ANSWER,
    HELLO,
    HELLO_ANSWER,
    MODEL,
    SUM,
    TIME_AND_WEATHER,
    TIME_CALL,
    TIME_RESULT,
    TOOLS,
    WEATHER,
    WEATHER_ANSWER,
    WEATHER_CALL,
    WEATHER_RESULT,
    user,
)
from openai_chat_cases import ask, check_usage, client
from pydantic import BaseModel

STRICT = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
VALID = {"get_weather": {"city", "unit"}, "get_time": {"city"}}


class GetTime(BaseModel):
    """The time of a city."""

    city: Literal["Paris", "Oslo"]


def check_calls(calls: Any) -> None:
    """Each call is one of the tools', with arguments that its schema allows."""
    assert calls and len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert call.type == "function" and call.id
        arguments = json.loads(call.function.arguments)
        assert arguments.keys() == VALID[call.function.name], call
        assert arguments["city"] in ("Paris", "Oslo"), call


def join(chunks: Any) -> tuple[dict[int, dict[str, str]], list[str]]:
    """Calls by index, joined of their pieces as openai's documentation does it, and the finish reasons."""
    calls: dict[int, dict[str, str]] = {}
    finishes = []
    for chunk in chunks:
        for choice in chunk.choices:
            finishes += [choice.finish_reason] if choice.finish_reason else []
            for piece in choice.delta.tool_calls or []:
                if piece.index not in calls:
                    assert piece.id and piece.function.name, "the first piece has id and name"
                    calls[piece.index] = {"id": piece.id, "name": piece.function.name, "arguments": ""}
                else:
                    assert not piece.id and not piece.function.name, "id and name come once"
                calls[piece.index]["arguments"] += piece.function.arguments or ""
    return calls, finishes


def case_required(target: Target) -> None:
    for tools in (TOOLS, STRICT):
        choice = ask(target, messages=user(HELLO), tools=tools, tool_choice="required").choices[0]
        assert choice.finish_reason == "tool_calls", choice
        check_calls(choice.message.tool_calls)
        assert not choice.message.content


def case_named(target: Target) -> None:
    for name in VALID:
        chosen = {"type": "function", "function": {"name": name}}
        choice = ask(target, messages=user(SUM), tools=TOOLS, tool_choice=chosen).choices[0]
        check_calls(choice.message.tool_calls)
        assert [call.function.name for call in choice.message.tool_calls] == [name]
        assert choice.finish_reason in ("stop", "tool_calls"), choice


def case_auto(target: Target) -> None:
    for fields in ({}, {"tool_choice": "auto"}):
        answer = ask(target, messages=user(WEATHER), tools=TOOLS, **fields)
        [call] = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls"
        assert call.function.name == WEATHER_CALL["name"]
        assert json.loads(call.function.arguments) == json.loads(WEATHER_CALL["arguments"])
        check_usage(answer.usage)


def case_none_and_no_need(target: Target) -> None:
    choice = ask(target, messages=user(WEATHER), tools=TOOLS, tool_choice="none", max_tokens=30).choices[0]
    assert not choice.message.tool_calls and choice.finish_reason in ("stop", "length")
    assert ask(target, messages=user(HELLO), tools=[]).choices[0].message.content == HELLO_ANSWER


def case_parallel(target: Target) -> None:
    calls = ask(target, messages=user(TIME_AND_WEATHER), tools=TOOLS).choices[0].message.tool_calls
    check_calls(calls)
    assert [call.function.name for call in calls] == [WEATHER_CALL["name"], TIME_CALL["name"]]
    single = ask(target, messages=user(TIME_AND_WEATHER), tools=TOOLS, parallel_tool_calls=False)
    assert len(single.choices[0].message.tool_calls) == 1, single


def case_streamed(target: Target) -> None:
    fields: dict[str, Any] = {"messages": user(TIME_AND_WEATHER), "tools": TOOLS}
    calls, finishes = join(ask(target, **fields, stream=True))
    assert finishes == ["tool_calls"] and sorted(calls) == [0, 1]
    whole = ask(target, **fields).choices[0].message.tool_calls
    assert [(calls[i]["name"], calls[i]["arguments"]) for i in (0, 1)] == [
        (call.function.name, call.function.arguments) for call in whole
    ]
    calls, finishes = join(ask(target, messages=user(HELLO), tools=TOOLS, tool_choice="required", stream=True))
    assert finishes == ["tool_calls"] and calls
    assert all(json.loads(call["arguments"]).keys() == VALID[call["name"]] for call in calls.values())


def case_stream_helper(target: Target) -> None:
    tool = openai.pydantic_function_tool(GetTime)
    with client(target).chat.completions.stream(
        model=MODEL, messages=user(HELLO), tools=[tool], tool_choice="required"
    ) as stream:  # fmt: skip
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds, kinds
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, GetTime)


def case_parse(target: Target) -> None:
    tool = openai.pydantic_function_tool(GetTime)
    answer = client(target).chat.completions.parse(
        model=MODEL, messages=user(HELLO), tools=[tool], tool_choice="required"
    )  # fmt: skip
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, GetTime)


def case_round_trip(target: Target) -> None:
    results = {WEATHER_CALL["name"]: WEATHER_RESULT, TIME_CALL["name"]: TIME_RESULT}
    for question, expected in ((WEATHER, WEATHER_ANSWER), (TIME_AND_WEATHER, BOTH_ANSWER)):
        message = ask(target, messages=user(question), tools=TOOLS).choices[0].message
        answered = [
            {"role": "tool", "tool_call_id": call.id, "content": results[call.function.name]}
            for call in message.tool_calls
        ]
        for sent in (message, message.model_dump(), message.to_dict(), {**message.model_dump(), "content": ""}):
            choice = ask(target, messages=[*user(question), sent, *answered], tools=TOOLS).choices[0]
            assert choice.message.content == expected, choice
            assert choice.finish_reason == "stop" and not choice.message.tool_calls
        parts = [{**row, "content": [{"type": "text", "text": row["content"]}]} for row in answered]
        choice = ask(target, messages=[*user(question), message, *parts], tools=TOOLS).choices[0]
        assert choice.message.content == expected, choice


def case_thinking_then_a_call(target: Target) -> None:
    thinking = {"thinking": {"type": "enabled"}}
    message = ask(target, messages=user(WEATHER), tools=TOOLS, extra_body=thinking).choices[0].message
    assert message.reasoning_content and message.tool_calls[0].function.name == WEATHER_CALL["name"], message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": WEATHER_RESULT}
    for sent in (message, message.model_dump(), {**message.model_dump(), "reasoning_content": None}):
        answer = ask(target, messages=[*user(WEATHER), sent, result], tools=TOOLS, extra_body=thinking, max_tokens=99)
        assert answer.choices[0].message.role == "assistant"


def case_several_choices(target: Target) -> None:
    answer = ask(target, tools=TOOLS, tool_choice="required", n=2, temperature=1, seed=3)
    assert len(answer.choices) == 2
    for choice in answer.choices:
        check_calls(choice.message.tool_calls)


def case_custom_tools(target: Target) -> None:
    form = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "(red|blue)"}}
    color = {"type": "custom", "custom": {"name": "color", "description": "Sets a color.", "format": form}}
    choice = {"type": "custom", "custom": {"name": "color"}}
    answer = ask(target, tools=[*TOOLS, color], tool_choice=choice).choices[0]
    [call] = answer.message.tool_calls
    assert (call.type, call.custom.name) == ("custom", "color") and call.custom.input in ("red", "blue")
    assert answer.finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "Done."}
    for sent in (answer.message, answer.message.model_dump(), answer.message.to_dict()):
        again = ask(target, messages=[*user(HELLO), sent, result], tools=[*TOOLS, color], max_tokens=9)
        assert again.usage.completion_tokens > 0
    said = {"name": "", "input": ""}
    chunks = client(target, strict=False).chat.completions.create(  # whose types know functions alone in a stream
        model=MODEL, messages=user(HELLO), tools=[color], tool_choice=choice, temperature=0, stream=True
    )
    for piece in (piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or ()):
        said = {name: text + piece.to_dict()["custom"].get(name, "") for name, text in said.items()}
    assert said == {"name": "color", "input": call.custom.input}, said


def case_wrong_tools(target: Target) -> None:
    unnamed = {"type": "function", "function": {"name": "none_such"}}
    for fields in (
        {"tools": TOOLS, "tool_choice": unnamed},
        {"tools": [{"type": "function", "function": {"name": "a b!", "parameters": {}}}]},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 5}, "strict": True}}],
         "tool_choice": "required"},
        {"tools": [TOOLS[0], TOOLS[0]]},
        {"messages": [*user(WEATHER), {"role": "tool", "content": "18", "tool_call_id": 7}], "tools": TOOLS},
    ):  # fmt: skip
        error = raised(openai.BadRequestError, lambda fields=fields: ask(target, **fields))
        assert error.message and error.type == "invalid_request_error", fields


if __name__ == "__main__":
    run(globals())

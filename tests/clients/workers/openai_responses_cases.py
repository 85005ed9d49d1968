"""The Responses API through openai's SDK, every event validated strictly against its own types."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from cases import Target, raised, run
from conversations import (
    FORECAST_SCHEMA,
    FUNCTIONS,
    HELLO,
    HELLO_ANSWER,
    MODEL,
    SUM,
    SUM_ANSWER,
    SUM_REASONING,
    WEATHER,
    WEATHER_ANSWER,
    WEATHER_CALL,
    WEATHER_RESULT,
    fits_forecast,
    user,
)
from openai_chat_cases import client
from pydantic import BaseModel

TOOLS = [{"type": "function", "strict": True, **function} for function in FUNCTIONS]
COLOR = {"type": "custom", "name": "color", "description": "Sets a color.", "format": {
    "type": "grammar", "syntax": "regex", "definition": "(red|blue)"}}  # fmt: skip


class Forecast(BaseModel):
    city: Literal["Paris", "Oslo"]
    sky: Literal["sunny", "cloudy", "rain"]
    warm: bool


def ask(target: Target, **fields: Any) -> Any:
    """One response at temperature 0."""
    fields = {"model": MODEL, "input": HELLO, "temperature": 0, **fields}
    return client(target).responses.create(**fields)


def case_text(target: Target) -> None:
    answer = ask(target)
    assert answer.object == "response" and answer.status == "completed" and answer.output_text == HELLO_ANSWER
    assert answer.error is None and answer.incomplete_details is None and answer.model == MODEL
    usage = answer.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens and usage.output_tokens > 0
    assert 0 <= usage.input_tokens_details.cached_tokens <= usage.input_tokens
    assert usage.output_tokens_details.reasoning_tokens == 0


def case_events(target: Target) -> None:
    events = list(ask(target, stream=True))
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed", kinds
    for kind in ("response.output_item.added", "response.content_part.added", "response.output_text.done",
                 "response.content_part.done", "response.output_item.done"):  # fmt: skip
        assert kinds.count(kind) == 1, (kind, kinds)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    [done] = [event.text for event in events if event.type == "response.output_text.done"]
    assert text == done == events[-1].response.output_text == HELLO_ANSWER
    assert events[0].response.id == events[-1].response.id and events[0].response.status == "in_progress"
    items = {event.item_id for event in events if hasattr(event, "item_id")}
    assert items == {events[-1].response.output[0].id}
    whole = ask(target).usage
    assert events[-1].response.usage.output_tokens == whole.output_tokens


def case_stream_helper(target: Target) -> None:
    with client(target).responses.stream(model=MODEL, input=HELLO, temperature=0) as stream:
        list(stream)
        assert stream.get_final_response().output_text == HELLO_ANSWER


def case_no_done_line(target: Target) -> None:
    with client(target).responses.with_streaming_response.create(model=MODEL, input=HELLO, stream=True) as response:
        lines = [line for line in response.iter_lines() if line]
    assert not any("[DONE]" in line for line in lines)
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    datas = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert kinds == [data["type"] for data in datas], "each event is named as its type"


def case_incomplete(target: Target) -> None:
    answer = ask(target, max_output_tokens=3)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert ask(target, max_output_tokens=3, stream=True)
    kinds = [event.type for event in ask(target, max_output_tokens=3, stream=True)]
    assert kinds[-1] == "response.incomplete", kinds


def case_structured(target: Target) -> None:
    form = {"format": {"type": "json_schema", "name": "forecast", "strict": True, "schema": FORECAST_SCHEMA}}
    assert fits_forecast(json.loads(ask(target, text=form, temperature=1).output_text))
    parsed = client(target).responses.parse(model=MODEL, input=HELLO, text_format=Forecast)
    assert isinstance(parsed.output_parsed, Forecast)


def case_instructions_and_items(target: Target) -> None:
    for given in (
        user(HELLO),
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": HELLO}]}],
        [{"role": "developer", "content": "Be brief."}, *user(HELLO)],
        [*user(HELLO), {"role": "assistant", "content": "Hi"}, *user(HELLO)],
    ):
        assert ask(target, input=given, max_output_tokens=20).usage.output_tokens > 0, given
    bare = ask(target).usage.input_tokens
    assert ask(target, instructions="Be brief.").usage.input_tokens > bare


def case_items_sent_back(target: Target) -> None:
    first = ask(target, input=SUM, reasoning={"effort": "high"})
    for items in (first.output, [item.model_dump() for item in first.output], [i.to_dict() for i in first.output]):
        again = ask(target, input=[*user(SUM), *items, *user(HELLO)], max_output_tokens=20)
        assert again.usage.output_tokens > 0


def case_reasoning(target: Target) -> None:
    answer = ask(target, input=SUM, reasoning={"effort": "high", "summary": "auto"})
    [thought] = [item for item in answer.output if item.type == "reasoning"]
    texts = [part.text for part in (thought.content or thought.summary)]
    assert "".join(texts) == SUM_REASONING and answer.output_text == SUM_ANSWER
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    kinds = [event.type for event in ask(target, input=SUM, reasoning={"effort": "high"}, stream=True)]
    assert any("reasoning" in kind for kind in kinds) and kinds[-1] == "response.completed"


def case_tools(target: Target) -> None:
    answer = ask(target, input=WEATHER, tools=TOOLS, tool_choice="required")
    calls = [item for item in answer.output if item.type == "function_call"]
    assert calls and calls[0].call_id and json.loads(calls[0].arguments)["city"] in ("Paris", "Oslo")
    named = ask(target, tools=TOOLS, tool_choice={"type": "function", "name": "get_time"})
    assert [item.name for item in named.output if item.type == "function_call"] == ["get_time"]


def case_tool_round_trip(target: Target) -> None:
    answer = ask(target, input=WEATHER, tools=TOOLS)
    [call] = [item for item in answer.output if item.type == "function_call"]
    assert call.name == WEATHER_CALL["name"], answer
    result = {"type": "function_call_output", "call_id": call.call_id, "output": WEATHER_RESULT}
    last = ask(target, input=[*user(WEATHER), *answer.output, result], tools=TOOLS)
    assert last.output_text == WEATHER_ANSWER, last


def case_tool_events(target: Target) -> None:
    events = list(ask(target, input=WEATHER, tools=TOOLS, tool_choice="required", stream=True))
    pieces: dict[str, str] = {}
    for event in events:
        if event.type == "response.function_call_arguments.delta":
            pieces[event.item_id] = pieces.get(event.item_id, "") + event.delta
    done = {e.item_id: e.arguments for e in events if e.type == "response.function_call_arguments.done"}
    assert done and pieces == done
    calls = [item for item in events[-1].response.output if item.type == "function_call"]
    assert {call.id: call.arguments for call in calls} == done


def case_custom_tools(target: Target) -> None:
    answer = ask(target, tools=[COLOR], tool_choice="required", parallel_tool_calls=False)
    [call] = [item for item in answer.output if item.type == "custom_tool_call"]
    assert (call.name, call.input) in (("color", "red"), ("color", "blue")) and call.call_id and call.id
    chosen = ask(target, tools=[*TOOLS, COLOR], tool_choice={"type": "custom", "name": "color"})
    assert chosen.output[-1].type == "custom_tool_call" and chosen.output[-1].input in ("red", "blue")
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "Done."}
    for items in (answer.output, [item.model_dump() for item in answer.output], [i.to_dict() for i in answer.output]):
        again = ask(target, input=[*user(HELLO), *items, result], tools=[COLOR], max_output_tokens=9)
        assert again.usage.output_tokens > 0
    assert ask(target, tools=[{"type": "custom", "name": "say"}], max_output_tokens=3).usage.output_tokens > 0


def case_custom_tool_events(target: Target) -> None:
    fields = {"tools": [COLOR], "tool_choice": "required", "parallel_tool_calls": False}
    events = list(ask(target, stream=True, **fields))
    text = "".join(event.delta for event in events if event.type == "response.custom_tool_call_input.delta")
    [done] = [event for event in events if event.type == "response.custom_tool_call_input.done"]
    [item] = [event.item for event in events if event.type == "response.output_item.done"]
    assert text == done.input == item.input in ("red", "blue") and done.item_id == item.id
    assert events[-1].type == "response.completed" and events[-1].response.output[-1].input == text
    with client(target).responses.stream(model=MODEL, input=HELLO, temperature=0, **fields) as stream:
        assert stream.get_final_response().output[-1].input in ("red", "blue")


def case_custom_tools_that_are_not_had(target: Target) -> None:
    lark = {**COLOR, "format": {"type": "grammar", "syntax": "lark", "definition": "start: RED"}}
    error = raised(openai.BadRequestError, lambda: ask(target, tools=[lark]))
    assert error.param == "tools[0].format.syntax", error
    wrong = {**COLOR, "format": {"type": "grammar", "syntax": "regex", "definition": "(?=red)"}}
    error = raised(openai.BadRequestError, lambda: ask(target, tools=[*TOOLS, wrong]))
    assert error.param == "tools[2].format.definition", error


def case_input_tokens(target: Target) -> None:
    call = {"type": "function_call", "call_id": "c", **WEATHER_CALL}
    result = {"type": "function_call_output", "call_id": "c", "output": WEATHER_RESULT}
    for fields in (
        {}, {"instructions": "Be brief."}, {"tools": TOOLS}, {"tools": [*TOOLS, COLOR], "tool_choice": "required"},
        {"reasoning": {"effort": "high"}}, {"input": [*user(WEATHER), call, result], "tools": TOOLS},
    ):  # fmt: skip
        counted = client(target).responses.input_tokens.count(**{"model": MODEL, "input": HELLO, **fields})
        assert counted.object == "response.input_tokens"
        assert counted.input_tokens == ask(target, max_output_tokens=2, **fields).usage.input_tokens, fields
    error = raised(openai.NotFoundError, lambda: client(target).responses.input_tokens.count(model="none", input=HELLO))
    assert error.code == "model_not_found"


def case_what_has_a_state(target: Target) -> None:
    for fields in ({"previous_response_id": "resp_1"}, {"background": True}, {"conversation": "conv_1"}):
        error = raised(openai.BadRequestError, lambda fields=fields: ask(target, **fields))
        assert error.param == next(iter(fields)), error
    raised(openai.NotFoundError, lambda: client(target).responses.retrieve("resp_1"))
    assert ask(target, store=True, include=[], truncation="disabled").output_text == HELLO_ANSWER
    for tool in ({"type": "web_search"}, {"type": "code_interpreter", "container": {"type": "auto"}}):
        error = raised(openai.BadRequestError, lambda tool=tool: ask(target, tools=[tool]))
        assert error.param.startswith("tools[0]"), error


def case_errors(target: Target) -> None:
    error = raised(openai.BadRequestError, lambda: ask(target, input="word " * 20000))
    assert error.code == "context_length_exceeded"
    assert raised(openai.NotFoundError, lambda: ask(target, model="none")).code == "model_not_found"
    assert raised(openai.BadRequestError, lambda: ask(target, input=[])).param == "input"


if __name__ == "__main__":
    run(globals())

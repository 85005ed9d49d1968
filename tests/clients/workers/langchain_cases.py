"""langchain-openai and langchain-deepseek: what they report is what the server counted, also summed over a stream."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any, Literal

os.environ["LANGSMITH_TRACING"] = "false"

import openai  # noqa: E402
from cases import Target, raised, run  # noqa: E402
from conversations import (  # noqa: E402
    HELLO,
    HELLO_ANSWER,
    MODEL,
    SUM,
    SUM_ANSWER,
    SUM_REASONING,
    TIME_AND_WEATHER,
    TOOLS,
    WEATHER,
    WEATHER_ANSWER,
    WEATHER_CALL,
    WEATHER_RESULT,
)
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage  # noqa: E402
from langchain_deepseek import ChatDeepSeek  # noqa: E402
from langchain_openai import ChatOpenAI, OpenAIEmbeddings  # noqa: E402
from pydantic import BaseModel  # noqa: E402


class Forecast(BaseModel):
    """What the weather will be."""

    city: Literal["Paris", "Oslo"]
    warm: bool


def both(target: Target, **settings: Any) -> list[Any]:
    """The two chat models, at temperature 0."""
    settings = {"model": MODEL, "api_key": target.key, "temperature": 0, "max_retries": 0, "timeout": 60, **settings}
    return [ChatOpenAI(base_url=target.url + "/v1", **settings), ChatDeepSeek(base_url=target.url, **settings)]


def case_invoke(target: Target) -> None:
    for chat in both(target):
        answer = chat.invoke([("human", HELLO)])
        assert answer.content == HELLO_ANSWER and answer.response_metadata["finish_reason"] == "stop"
        usage = answer.usage_metadata
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0


def case_summed_usage_of_a_stream(target: Target) -> None:
    for settings in ({}, {"stream_usage": True}, {"stream_usage": False}):
        for chat in both(target, **settings):
            whole = chat.invoke(HELLO).usage_metadata
            total, text = None, ""
            for chunk in chat.stream(HELLO):
                total, text = chunk if total is None else total + chunk, text + chunk.text
            assert text == HELLO_ANSWER
            summed = {key: total.usage_metadata[key] for key in ("input_tokens", "output_tokens", "total_tokens")}
            assert summed == {key: whole[key] for key in summed}, (type(chat).__name__, settings, summed, whole)


def case_async_and_batch(target: Target) -> None:
    for chat in both(target):
        assert asyncio.run(chat.ainvoke(HELLO)).content == HELLO_ANSWER
    for chat in both(target):
        assert [answer.content for answer in chat.batch([HELLO, SUM])] == [HELLO_ANSWER, SUM_ANSWER]


def case_reasoning(target: Target) -> None:
    _, chat = both(target, extra_body={"thinking": {"type": "enabled"}})
    answer = chat.invoke(SUM)
    assert answer.additional_kwargs["reasoning_content"] == SUM_REASONING and answer.content == SUM_ANSWER
    assert answer.usage_metadata["output_token_details"]["reasoning"] > 0
    total = None
    for chunk in chat.stream(SUM):
        total = chunk if total is None else total + chunk
    assert total.additional_kwargs["reasoning_content"] == SUM_REASONING and total.content == SUM_ANSWER
    again = chat.invoke([HumanMessage(SUM), answer, HumanMessage(HELLO)], max_tokens=99)
    assert again.usage_metadata["output_tokens"] > 0
    for model in both(target, reasoning_effort="high"):
        assert model.invoke(SUM).content == SUM_ANSWER


def case_cached_tokens(target: Target) -> None:
    text = SystemMessage("It is sunny in Paris, and 12:30 in Oslo, as langchain says. " * 20)
    for chat in both(target, max_tokens=3):
        chat.invoke([text, HumanMessage(HELLO)])
        usage = chat.invoke([text, HumanMessage(HELLO)]).usage_metadata
        assert usage["input_token_details"]["cache_read"] > 0, usage


def case_tools_round_trip(target: Target) -> None:
    for chat in both(target):
        bound = chat.bind_tools(TOOLS)
        answer = bound.invoke(WEATHER)
        [call] = answer.tool_calls
        assert call["name"] == WEATHER_CALL["name"] and call["args"] == json.loads(WEATHER_CALL["arguments"])
        turns = [HumanMessage(WEATHER), answer, ToolMessage(WEATHER_RESULT, tool_call_id=call["id"])]
        assert bound.invoke(turns).content == WEATHER_ANSWER
        total = None
        for chunk in bound.stream(TIME_AND_WEATHER):
            total = chunk if total is None else total + chunk
        assert len(total.tool_calls) == 2 and not total.invalid_tool_calls, total
        forced = chat.bind_tools(TOOLS, tool_choice="any").invoke(HELLO)
        assert forced.tool_calls and not forced.invalid_tool_calls
        named = chat.bind_tools(TOOLS, tool_choice="get_time", strict=True).invoke(HELLO)
        assert [call["name"] for call in named.tool_calls] == ["get_time"]


def case_structured(target: Target) -> None:
    chat, deepseek = both(target, extra_body={"thinking": {"type": "disabled"}})
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(Forecast, method=method).invoke(HELLO), Forecast), method
    assert isinstance(deepseek.with_structured_output(Forecast).invoke(HELLO), Forecast)
    assert isinstance(deepseek.with_structured_output(Forecast, strict=True).invoke(HELLO), Forecast)


def case_history(target: Target) -> None:
    for chat in both(target, max_tokens=9):
        answer = chat.invoke(HELLO)
        again = chat.invoke([SystemMessage("Be brief."), HumanMessage(HELLO), answer, HumanMessage(SUM)])
        assert again.usage_metadata["output_tokens"] > 0
        parts = [AIMessage([{"type": "text", "text": "Hi"}]), HumanMessage([{"type": "text", "text": HELLO}])]
        assert chat.invoke([HumanMessage(HELLO), *parts]).usage_metadata["output_tokens"] > 0


def case_logprobs(target: Target) -> None:
    chat, _ = both(target, logprobs=True, top_logprobs=2)
    rows = chat.invoke(HELLO).response_metadata["logprobs"]["content"]
    assert "".join(row["token"] for row in rows) == HELLO_ANSWER


def case_responses_api(target: Target) -> None:
    chat = ChatOpenAI(
        base_url=target.url + "/v1",
        model=MODEL,
        api_key=target.key,
        temperature=0,
        use_responses_api=True,
        max_retries=0,
    )
    assert chat.invoke(HELLO).text == HELLO_ANSWER
    assert "".join(chunk.text for chunk in chat.stream(HELLO)) == HELLO_ANSWER
    assert chat.bind_tools(TOOLS, tool_choice="any").invoke(HELLO).tool_calls


def case_context_error(target: Target) -> None:
    for chat in both(target):
        error = raised(openai.BadRequestError, lambda chat=chat: chat.invoke("word " * 20000))
        assert error.code == "context_length_exceeded", error


def case_embeddings(target: Target) -> None:
    embeddings = OpenAIEmbeddings(
        base_url=target.url + "/v1", model=MODEL, api_key=target.key, check_embedding_ctx_length=False
    )
    first, second = embeddings.embed_documents([HELLO, SUM])
    assert len(first) == len(second) > 8
    assert all(abs(a - b) < 1e-5 for a, b in zip(embeddings.embed_query(HELLO), first, strict=True))


if __name__ == "__main__":
    run(globals())

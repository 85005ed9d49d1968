"""litellm, with a server of OpenAI's form (``openai/``), of DeepSeek's (``deepseek/``) and of Anthropic's."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any, Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm  # noqa: E402
from cases import Target, raised, run  # noqa: E402
from conversations import (  # noqa: E402
    HELLO,
    HELLO_ANSWER,
    MODEL,
    SUM,
    SUM_ANSWER,
    SUM_REASONING,
    TOOLS,
    WEATHER,
    WEATHER_ANSWER,
    WEATHER_CALL,
    WEATHER_RESULT,
    user,
)
from pydantic import BaseModel  # noqa: E402

BASES = {"openai": "/v1", "deepseek": ""}


class Forecast(BaseModel):
    city: Literal["Paris", "Oslo"]
    warm: bool


def ask(target: Target, provider: str = "openai", **fields: Any) -> Any:
    """One completion at temperature 0."""
    fields = {"messages": user(HELLO), "temperature": 0, "timeout": 60, "num_retries": 0, **fields}
    base = target.url + BASES.get(provider, "")
    name = f"{provider}/{fields.pop('model', MODEL)}"
    return litellm.completion(model=name, api_base=base, api_key=fields.pop("api_key", target.key), **fields)


def case_chat_and_usage(target: Target) -> None:
    for provider in BASES:
        answer = ask(target, provider)
        assert answer.choices[0].message.content == HELLO_ANSWER and answer.choices[0].finish_reason == "stop"
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def case_stream_and_usage(target: Target) -> None:
    for provider in BASES:
        whole = ask(target, provider).usage
        chunks = list(ask(target, provider, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == HELLO_ANSWER
        usages = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
        assert len(usages) == 1 and usages[0].completion_tokens == whole.completion_tokens, usages
        built = litellm.stream_chunk_builder(chunks, messages=user(HELLO))
        assert built.usage.prompt_tokens == whole.prompt_tokens and built.choices[0].message.content == HELLO_ANSWER


def case_async(target: Target) -> None:
    answer = asyncio.run(litellm.acompletion(
        model=f"openai/{MODEL}", api_base=target.url + "/v1", api_key=target.key, messages=user(HELLO), temperature=0
    ))  # fmt: skip
    assert answer.choices[0].message.content == HELLO_ANSWER


def case_reasoning(target: Target) -> None:
    for provider, fields in (
        ("deepseek", {"thinking": {"type": "enabled"}}), ("deepseek", {"reasoning_effort": "high"}),
        ("openai", {"extra_body": {"thinking": {"type": "enabled"}}}),
    ):  # fmt: skip
        message = ask(target, provider, messages=user(SUM), **fields).choices[0].message
        assert (message.reasoning_content, message.content) == (SUM_REASONING, SUM_ANSWER), (provider, message)
        chunks = list(ask(target, provider, messages=user(SUM), stream=True, **fields))
        thoughts = [getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks if c.choices]
        assert "".join(thoughts) == SUM_REASONING, provider


def case_tools_round_trip(target: Target) -> None:
    for provider in BASES:
        message = ask(target, provider, messages=user(WEATHER), tools=TOOLS).choices[0].message
        [call] = message.tool_calls
        assert call.function.name == WEATHER_CALL["name"], (provider, message)
        assert json.loads(call.function.arguments) == json.loads(WEATHER_CALL["arguments"])
        result = {"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": WEATHER_RESULT}
        for sent in (message, message.model_dump()):
            answer = ask(target, provider, messages=[*user(WEATHER), sent, result], tools=TOOLS)
            assert answer.choices[0].message.content == WEATHER_ANSWER, (provider, answer)
        forced = ask(target, provider, tools=TOOLS, tool_choice="required").choices[0].message
        assert forced.tool_calls


def case_structured(target: Target) -> None:
    for provider in BASES:
        answer = ask(target, provider, response_format={"type": "json_object"}, max_tokens=300, temperature=1, seed=1)
        assert answer.choices[0].message.content.lstrip().startswith("{"), (provider, answer)
    answer = ask(target, response_format=Forecast)
    Forecast.model_validate_json(answer.choices[0].message.content)


def case_history_sent_back(target: Target) -> None:
    for provider in BASES:
        message = ask(target, provider, messages=user(SUM)).choices[0].message
        for sent in (message, message.model_dump()):
            answer = ask(target, provider, messages=[*user(SUM), sent, *user(HELLO)], max_tokens=5)
            assert answer.usage.completion_tokens > 0


def case_context_error(target: Target) -> None:
    for provider in (*BASES, "anthropic"):
        long = user("word " * 20000)
        error = raised(litellm.ContextWindowExceededError, lambda p=provider, m=long: ask(target, p, messages=m))
        assert error.status_code == 400, provider


def case_errors(target: Target) -> None:
    for provider in BASES:
        raised(litellm.AuthenticationError, lambda p=provider: ask(target, p, api_key="wrong"))
        raised(litellm.NotFoundError, lambda p=provider: ask(target, p, model="none-such"))
        raised(litellm.BadRequestError, lambda p=provider: ask(target, p, messages=[{"role": "king", "content": "a"}]))


def case_embedding(target: Target) -> None:
    answer = litellm.embedding(
        model=f"openai/{MODEL}", input=[HELLO, SUM], api_base=target.url + "/v1", api_key=target.key
    )
    assert len(answer.data) == 2 and len(answer.data[0]["embedding"]) > 8


def case_text_completion(target: Target) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="The sum is", max_tokens=5, api_base=target.url + "/v1",
        api_key=target.key,
    )  # fmt: skip
    assert answer.choices[0].text


def case_responses(target: Target) -> None:
    answer = litellm.responses(
        model=f"openai/{MODEL}", input=HELLO, temperature=0, api_base=target.url + "/v1", api_key=target.key
    )
    assert answer.output[-1].content[0].text == HELLO_ANSWER


def case_anthropic_form(target: Target) -> None:
    answer = ask(target, "anthropic", max_tokens=99)
    assert answer.choices[0].message.content == HELLO_ANSWER and answer.usage.completion_tokens > 0
    message = ask(target, "anthropic", messages=user(WEATHER), tools=TOOLS, max_tokens=99).choices[0].message
    assert message.tool_calls[0].function.name == WEATHER_CALL["name"], message


if __name__ == "__main__":
    run(globals())

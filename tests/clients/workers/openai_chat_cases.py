"""Chat completions through openai's SDK, its answers validated strictly against its own types."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
from cases import Target, raised, run
from conversations import (
    FORECAST_SCHEMA,
    HELLO,
    HELLO_ANSWER,
    MODEL,
    SUM,
    SUM_ANSWER,
    SUM_REASONING,
    fits_forecast,
    user,
)
from pydantic import BaseModel

STRICT_SCHEMA = {"name": "forecast", "strict": True, "schema": FORECAST_SCHEMA}


class Forecast(BaseModel):
    city: Literal["Paris", "Oslo"]
    sky: Literal["sunny", "cloudy", "rain"]
    warm: bool


def client(target: Target, base: str = "/v1", *, strict: bool = True, **settings: Any) -> openai.OpenAI:
    """The SDK, which checks every answer and every chunk strictly.

    ``strict`` must be off where OpenAI's service itself answers what its types do not say: null as the log-probability
    of the first token, and embeddings in base64, which the SDK asks for by itself.
    """
    settings = {"max_retries": 0, "timeout": 60, "api_key": target.key, **settings}
    return openai.OpenAI(base_url=target.url + base, _strict_response_validation=strict, **settings)


def ask(target: Target, base: str = "/v1", **fields: Any) -> Any:
    """One chat completion at temperature 0."""
    fields = {"model": MODEL, "messages": user(HELLO), "temperature": 0, **fields}
    return client(target, base).chat.completions.create(**fields)


def check_usage(usage: Any) -> None:
    """What DeepSeek's and OpenAI's documentation say of a usage object."""
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens > 0 and usage.completion_tokens > 0
    assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_cache_hit_tokens
    assert 0 <= usage.completion_tokens_details.reasoning_tokens <= usage.completion_tokens


def case_chat(target: Target) -> None:
    answer = ask(target)
    assert answer.object == "chat.completion" and answer.id and answer.created > 0 and answer.model == MODEL
    [choice] = answer.choices
    assert choice.index == 0 and choice.finish_reason == "stop" and choice.message.role == "assistant"
    assert choice.message.content == HELLO_ANSWER, choice
    assert choice.message.tool_calls is None and choice.message.refusal is None
    check_usage(answer.usage)


def case_every_base(target: Target) -> None:
    for base in ("", "/v1", "/beta", "/v1/"):
        assert ask(target, base).choices[0].message.content == HELLO_ANSWER, base


def case_stream(target: Target) -> None:
    chunks = list(ask(target, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == HELLO_ANSWER
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert [each for each in finishes if each] == ["stop"] and finishes[-1] == "stop"


def case_one_chunk_has_the_usage(target: Target) -> None:
    whole = ask(target).usage
    for options in (None, {"include_usage": False}, {"include_usage": True}):
        chunks = list(ask(target, stream=True, stream_options=options))
        usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
        assert len(usages) == 1, (options, usages)
        check_usage(usages[0])
        assert usages[0].prompt_tokens == whole.prompt_tokens
        assert usages[0].completion_tokens == whole.completion_tokens
        if options == {"include_usage": True}:
            assert chunks[-1].usage is not None and chunks[-1].choices == []
        else:
            assert chunks[-1].usage is not None and chunks[-1].choices[0].finish_reason == "stop"


def case_stream_helper(target: Target) -> None:
    with client(target).chat.completions.stream(model=MODEL, messages=user(HELLO), temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds and kinds[-1] != "error"
    assert final.choices[0].message.content == HELLO_ANSWER


def case_async_client(target: Target) -> None:
    async def both() -> tuple[Any, str]:
        async with openai.AsyncOpenAI(base_url=target.url + "/v1", api_key=target.key, timeout=60) as sdk:
            request: dict[str, Any] = {"model": MODEL, "messages": user(HELLO), "temperature": 0}
            whole = sdk.chat.completions.create(**request)
            text = ""
            async for chunk in await sdk.chat.completions.create(**request, stream=True):
                text += chunk.choices[0].delta.content or "" if chunk.choices else ""
            return await whole, text

    whole, text = asyncio.run(both())
    assert whole.choices[0].message.content == text == HELLO_ANSWER


def case_json_schema_strict(target: Target) -> None:
    form = {"type": "json_schema", "json_schema": STRICT_SCHEMA}
    for seed in range(3):
        choice = ask(target, response_format=form, temperature=1, seed=seed).choices[0]
        assert choice.finish_reason == "stop" and fits_forecast(json.loads(choice.message.content)), choice


def case_parse_with_pydantic(target: Target) -> None:
    answer = client(target).chat.completions.parse(model=MODEL, messages=user(HELLO), response_format=Forecast)
    assert isinstance(answer.choices[0].message.parsed, Forecast), answer
    with client(target).chat.completions.stream(
        model=MODEL, messages=user(HELLO), response_format=Forecast
    ) as stream:  # fmt: skip
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Forecast)


def case_json_object(target: Target) -> None:
    choice = ask(target, response_format={"type": "json_object"}, max_tokens=400, temperature=1, seed=1).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    else:  # a model without an aim may write on; what it wrote is the beginning of an object
        assert choice.finish_reason == "length" and choice.message.content.lstrip().startswith("{"), choice
    text = ask(target, response_format={"type": "text"}).choices[0].message
    assert text.content == HELLO_ANSWER


def case_schema_with_thinking(target: Target) -> None:
    form = {"type": "json_schema", "json_schema": STRICT_SCHEMA}
    answer = ask(target, messages=user(SUM), response_format=form, extra_body={"thinking": {"type": "enabled"}})
    message = answer.choices[0].message
    assert message.reasoning_content == SUM_REASONING, message
    assert fits_forecast(json.loads(message.content)), message


def case_thinking(target: Target) -> None:
    answer = ask(target, messages=user(SUM), extra_body={"thinking": {"type": "enabled"}})
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == (SUM_REASONING, SUM_ANSWER), message
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    quiet = ask(target, messages=user(SUM), extra_body={"thinking": {"type": "disabled"}})
    assert quiet.choices[0].message.content == SUM_ANSWER
    assert quiet.usage.completion_tokens_details.reasoning_tokens == 0


def case_thinking_streams(target: Target) -> None:
    chunks = list(ask(target, messages=user(SUM), stream=True, extra_body={"thinking": {"type": "enabled"}}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    thoughts = [delta.model_extra.get("reasoning_content") or "" for delta in deltas]
    texts = [delta.content or "" for delta in deltas]
    assert "".join(thoughts) == SUM_REASONING and "".join(texts) == SUM_ANSWER
    first_text = next(index for index, text in enumerate(texts) if text)
    assert not any(thoughts[first_text:]), "reasoning after content"


def case_reasoning_effort(target: Target) -> None:
    for effort in ("minimal", "low", "medium", "high", "xhigh", "max", "ultra"):
        answer = ask(target, messages=user(SUM), extra_body={"reasoning_effort": effort})
        assert answer.choices[0].message.content == SUM_ANSWER, (effort, answer)
    none = ask(target, messages=user(SUM), reasoning_effort="none").choices[0].message
    assert not none.model_extra.get("reasoning_content")
    both = ask(target, messages=user(SUM), reasoning_effort="high", extra_body={"thinking": {"type": "enabled"}})
    assert both.choices[0].message.reasoning_content == SUM_REASONING


def case_lengths(target: Target) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(target, **{name: 3})
        assert answer.choices[0].finish_reason == "length", answer
        assert answer.usage.completion_tokens == 3
    assert ask(target, max_tokens=None).choices[0].finish_reason == "stop"


def case_stop_strings(target: Target) -> None:
    for stop in ("How", ["can", "How"]):
        choice = ask(target, stop=stop).choices[0]
        assert choice.finish_reason == "stop" and choice.message.content == "Hello! ", choice
    streamed = "".join(c.choices[0].delta.content or "" for c in ask(target, stop=["How"], stream=True) if c.choices)
    assert streamed == "Hello! "


def case_several_choices_and_seeds(target: Target) -> None:
    fields: dict[str, Any] = {"n": 3, "temperature": 2.0, "seed": 5, "max_tokens": 12}
    answer = ask(target, **fields)
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    again = ask(target, **fields)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]
    texts = {0: "", 1: "", 2: ""}
    for chunk in ask(target, **fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert [texts[index] for index in range(3)] == [c.message.content for c in answer.choices]


def case_logprobs(target: Target) -> None:
    choice = ask(target, logprobs=True, top_logprobs=4).choices[0]
    rows = choice.logprobs.content
    assert b"".join(bytes(row.bytes) for row in rows).decode() == HELLO_ANSWER
    for row in rows:
        assert row.logprob <= 0 and len(row.top_logprobs) == 4
        assert [top.logprob for top in row.top_logprobs] == sorted((t.logprob for t in row.top_logprobs), reverse=True)
        assert row.token == row.top_logprobs[0].token
    streamed = [
        row for chunk in ask(target, logprobs=True, top_logprobs=4, stream=True) for choice in chunk.choices
        if choice.logprobs and choice.logprobs.content for row in choice.logprobs.content
    ]  # fmt: skip
    assert [row.bytes for row in streamed] == [row.bytes for row in rows]
    assert ask(target, logprobs=False).choices[0].logprobs is None


def case_sampling_settings(target: Target) -> None:
    extra = {"min_p": 0.05, "top_k": 20, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 2}
    answer = ask(
        target, temperature=0.7, top_p=0.9, frequency_penalty=0.5, presence_penalty=-0.5, logit_bias={"300": -100},
        seed=7, max_tokens=40, extra_body=extra,
    )  # fmt: skip
    assert answer.usage.completion_tokens == 40 and answer.choices[0].finish_reason == "length"


def case_settings_of_other_servers_are_ignored(target: Target) -> None:
    raw = client(target).chat.completions.with_raw_response.create(
        model=MODEL, messages=user(HELLO), temperature=0, user="someone", store=False, metadata={"a": "b"},
        service_tier="auto", prompt_cache_key="k", safety_identifier="s", verbosity="low", modalities=["text"],
        extra_body={"never_heard_of": 1, "stop": None, "tools": None, "user_id": "someone"},
    )  # fmt: skip
    assert raw.parse().choices[0].message.content == HELLO_ANSWER
    assert "never_heard_of" in raw.headers["x-ignored-fields"]
    assert raw.headers["x-request-id"]


def case_roles_and_parts(target: Target) -> None:
    text = [{"type": "text", "text": HELLO}]
    for messages in (
        [{"role": "developer", "content": "Be brief."}, *user(HELLO)],
        [{"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be kind."}, *user(HELLO)],
        [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, {"role": "user", "content": text}],
        [*user(HELLO), {"role": "system", "content": "Be brief."}, *user(SUM)],
        [{"role": "user", "name": "ann", "content": HELLO}, {"role": "user", "name": "bob", "content": SUM}],
        [*user(HELLO), {"role": "assistant", "content": None, "refusal": "no"}, *user(HELLO)],
        [*user(HELLO), {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]}, *user(HELLO)],
        [*user(HELLO), {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, *user(HELLO)],
    ):
        answer = ask(target, messages=messages, max_tokens=5)
        assert answer.usage.completion_tokens > 0, messages
    assert ask(target, messages=[{"role": "user", "content": text}]).choices[0].message.content == HELLO_ANSWER


def case_history_sent_back_as_it_came(target: Target) -> None:
    thinking = {"thinking": {"type": "enabled"}}
    message = ask(target, messages=user(SUM), extra_body=thinking).choices[0].message
    empty = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None}
    for sent in (
        message, message.model_dump(), message.to_dict(), message.model_dump(exclude_none=True),
        {**empty, **message.model_dump()}, {**message.model_dump(), "annotations": []},
        {"role": "assistant", "content": message.content, "reasoning_content": None},
    ):  # fmt: skip
        answer = ask(target, messages=[*user(SUM), sent, *user(HELLO)], max_tokens=5, extra_body=thinking)
        assert answer.choices[0].message.role == "assistant", sent


def case_context_error(target: Target) -> None:
    error = raised(openai.BadRequestError, lambda: ask(target, messages=user("word " * 20000)))
    assert error.status_code == 400 and error.code == "context_length_exceeded", error
    assert error.type == "invalid_request_error" and "maximum context length is" in error.message
    long = raised(openai.BadRequestError, lambda: ask(target, max_tokens=10**7))
    assert long.code == "context_length_exceeded" or long.param == "max_tokens", long
    list_error = raised(openai.BadRequestError, lambda: list(ask(target, messages=user("word " * 20000), stream=True)))
    assert list_error.code == "context_length_exceeded"


def case_errors_name_the_field(target: Target) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    wrong: dict[str, dict[str, Any]] = {
        "temperature": {"temperature": 9}, "top_p": {"top_p": -1}, "n": {"n": 1000}, "stop": {"stop": ["a"] * 65},
        "top_logprobs": {"logprobs": True, "top_logprobs": 10**4}, "max_tokens": {"max_tokens": 0},
        "messages[0].role": {"messages": [{"role": "king", "content": "x"}]}, "messages": {"messages": []},
        "messages[0].content[1]": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, image]}]},
        "response_format": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}},
        "tool_choice": {"tool_choice": "required"}, "logit_bias": {"logit_bias": {"9999999": 1}},
        "tools[0]": {"tools": [{"type": "function"}]},
    }  # fmt: skip
    for param, fields in wrong.items():
        error = raised(openai.BadRequestError, lambda fields=fields: ask(target, **fields))
        assert (error.param or "").startswith(param), (param, error.param, error.message)
        assert error.message and error.type == "invalid_request_error", error


def case_missing_model_and_wrong_key(target: Target) -> None:
    error = raised(openai.NotFoundError, lambda: ask(target, model="none-such"))
    assert error.code == "model_not_found" and "none-such" in error.message, error
    wrong = client(target, api_key="wrong")
    error = raised(openai.AuthenticationError, lambda: wrong.chat.completions.create(model=MODEL, messages=user("a")))
    assert error.code == "invalid_api_key", error


def case_a_client_that_does_not_wait(target: Target) -> None:
    hasty = client(target, timeout=0.02)
    raised(openai.APITimeoutError, lambda: hasty.chat.completions.create(
        model=MODEL, messages=user(HELLO), max_tokens=1500, extra_body={"ignore_eos": True}))  # fmt: skip
    with client(target).chat.completions.create(
        model=MODEL, messages=user(HELLO), stream=True, max_tokens=1500, extra_body={"ignore_eos": True}
    ) as stream:  # fmt: skip
        next(iter(stream))
    assert ask(target).choices[0].message.content == HELLO_ANSWER


if __name__ == "__main__":
    run(globals())

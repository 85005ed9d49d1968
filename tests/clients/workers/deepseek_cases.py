"""The calls that DeepSeek's documentation shows, with nothing changed but the address, the key and the model's name."""

from __future__ import annotations

import json
from typing import Any

from cases import Target, run
from conversations import HELLO, MODEL, SUM, SUM_ANSWER, SUM_REASONING, TOOLS, WEATHER, WEATHER_ANSWER, WEATHER_RESULT
from openai import BadRequestError, OpenAI


def client(target: Target, base: str = "") -> OpenAI:
    """As the documentation makes it: the bare address, without /v1."""
    return OpenAI(api_key=target.key, base_url=target.url + base, max_retries=0, timeout=60)


def case_first_call(target: Target) -> None:
    response = client(target).chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "You are a helpful assistant"}, {"role": "user", "content": "Hello"}],
        stream=False,
        reasoning_effort="high",
        extra_body={"thinking": {"type": "enabled"}},
        max_tokens=200,
    )
    assert response.choices[0].message.role == "assistant" and response.usage.completion_tokens > 0


def case_thinking_mode(target: Target) -> None:
    messages: list[Any] = [{"role": "user", "content": SUM}]
    request: dict[str, Any] = {"reasoning_effort": "high", "extra_body": {"thinking": {"type": "enabled"}}}
    response = client(target).chat.completions.create(model=MODEL, messages=messages, temperature=0, **request)
    assert response.choices[0].message.reasoning_content == SUM_REASONING
    assert response.choices[0].message.content == SUM_ANSWER
    messages.append(response.choices[0].message)
    messages.append({"role": "user", "content": HELLO})
    response = client(target).chat.completions.create(model=MODEL, messages=messages, max_tokens=60, **request)
    assert response.choices[0].message.role == "assistant"


def case_thinking_mode_streamed(target: Target) -> None:
    response = client(target).chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": SUM}], temperature=0, stream=True, reasoning_effort="high",
        extra_body={"thinking": {"type": "enabled"}},
    )  # fmt: skip
    reasoning_content = content = ""
    for chunk in response:
        if chunk.choices[0].delta.reasoning_content:
            reasoning_content += chunk.choices[0].delta.reasoning_content
        else:
            content += chunk.choices[0].delta.content or ""
    assert (reasoning_content, content) == (SUM_REASONING, SUM_ANSWER)


def case_settings_without_effect_in_thinking_mode(target: Target) -> None:
    response = client(target).chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": SUM}], temperature=0.1, top_p=0.9, presence_penalty=0.1,
        frequency_penalty=0.1, max_tokens=60, extra_body={"thinking": {"type": "enabled"}},
    )  # fmt: skip
    assert response.choices[0].finish_reason in ("stop", "length")


def case_chat_prefix_completion(target: Target) -> None:
    messages = [
        {"role": "user", "content": HELLO},
        {"role": "assistant", "content": "Hello! How can", "prefix": True},
    ]
    response = client(target, "/beta").chat.completions.create(
        model=MODEL, messages=messages, stop=["```"], temperature=0
    )
    assert response.choices[0].message.content == " I help you today?", response
    thinking = [{"role": "user", "content": SUM},
                {"role": "assistant", "content": "", "reasoning_content": "2 and 3", "prefix": True}]  # fmt: skip
    response = client(target, "/beta").chat.completions.create(
        model=MODEL, messages=thinking, temperature=0, max_tokens=60, extra_body={"thinking": {"type": "enabled"}}
    )
    assert response.choices[0].message.role == "assistant"


def case_fim_completion(target: Target) -> None:
    """A model without tokens to fill in the middle says so; without ``suffix`` the call is an ordinary one."""
    try:
        client(target, "/beta").completions.create(
            model=MODEL, prompt="def fib(a):", suffix="    return fib(a-1) + fib(a-2)", max_tokens=128
        )
        raise AssertionError("answered as if the model knew FIM")
    except BadRequestError as error:
        assert error.param == "suffix", error
    plain = client(target, "/beta").completions.create(model=MODEL, prompt="def fib(a):", max_tokens=8)
    assert plain.usage.completion_tokens <= 8


def case_json_mode(target: Target) -> None:
    messages = [
        {"role": "system", "content": "The user will provide some text. Output JSON."},
        {"role": "user", "content": HELLO},
    ]
    response = client(target).chat.completions.create(
        model=MODEL, messages=messages, response_format={"type": "json_object"}, max_tokens=300, seed=1
    )
    choice = response.choices[0]
    if choice.finish_reason == "stop":
        json.loads(choice.message.content)
    assert choice.message.content.lstrip().startswith("{")


def case_function_calling(target: Target) -> None:
    messages: list[Any] = [{"role": "user", "content": WEATHER}]
    sdk = client(target)
    message = sdk.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, temperature=0).choices[0].message
    tool = message.tool_calls[0]
    messages.append(message)
    messages.append({"role": "tool", "tool_call_id": tool.id, "content": WEATHER_RESULT})
    message = sdk.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, temperature=0).choices[0].message
    assert message.content == WEATHER_ANSWER, message


def case_strict_function_calling(target: Target) -> None:
    strict = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    message = client(target, "/beta").chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": WEATHER}], tools=strict, tool_choice="required"
    ).choices[0].message  # fmt: skip
    assert json.loads(message.tool_calls[0].function.arguments)["city"] in ("Paris", "Oslo")


def case_multi_round(target: Target) -> None:
    sdk, messages = client(target), [{"role": "user", "content": HELLO}]
    response = sdk.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    messages.append(response.choices[0].message)
    messages.append({"role": "user", "content": SUM})
    second = sdk.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=40)
    assert second.usage.prompt_tokens > response.usage.prompt_tokens


def case_context_caching(target: Target) -> None:
    text = "It is sunny in Paris, and 12:30 in Oslo. " * 20
    messages = [{"role": "system", "content": text}, {"role": "user", "content": HELLO}]
    usages = [
        client(target).chat.completions.create(model=MODEL, messages=messages, max_tokens=4).usage for _ in range(2)
    ]
    assert usages[1].prompt_cache_hit_tokens > 0
    assert usages[1].prompt_cache_hit_tokens + usages[1].prompt_cache_miss_tokens == usages[1].prompt_tokens


def case_list_models(target: Target) -> None:
    assert [model.id for model in client(target).models.list()] == [MODEL]


if __name__ == "__main__":
    run(globals())

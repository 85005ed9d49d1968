"""A server with room for one answer and a short queue: SDKs wait as long as it says, and then get theirs."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import anthropic
import openai
from cases import Target, run
from conversations import HELLO, MODEL, user

LONG: dict[str, Any] = {"model": MODEL, "messages": user(HELLO), "max_tokens": 400}


def case_refusals_say_when_to_come_again(target: Target) -> None:
    async def crowd() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=target.url + "/v1", api_key=target.key, max_retries=0, timeout=60
        ) as sdk:

            async def one() -> Any:
                began = time.monotonic()
                try:
                    await sdk.chat.completions.create(**LONG, extra_body={"ignore_eos": True})
                    return None
                except openai.APIStatusError as error:
                    return error, time.monotonic() - began

            return await asyncio.gather(*(one() for _ in range(12)))

    refused = [row for row in asyncio.run(crowd()) if row]
    assert 1 <= len(refused) <= 11, refused
    for error, _ in refused:
        assert error.status_code in (429, 503), error
        assert isinstance(error, openai.RateLimitError | openai.InternalServerError)
        assert 1 <= float(error.response.headers["retry-after"]) <= 60, error.response.headers
        assert error.body["message"] and error.body["code"], error.body


def case_sdk_retries_bring_everybody_through(target: Target) -> None:
    async def crowd() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=target.url + "/v1", api_key=target.key, max_retries=8, timeout=60
        ) as sdk:
            fields = {**LONG, "max_tokens": 8}
            return await asyncio.gather(
                *(sdk.chat.completions.create(**fields) for _ in range(120)), return_exceptions=True
            )

    answers = asyncio.run(crowd())
    well = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert len(well) >= 0.95 * 120, (len(well), [a for a in answers if isinstance(a, BaseException)][:3])


def case_anthropic_is_told_too(target: Target) -> None:
    async def crowd() -> list[Any]:
        sdk = anthropic.AsyncAnthropic(base_url=target.url, api_key=target.key, max_retries=0, timeout=60)
        async with sdk:
            calls = (sdk.messages.create(**LONG) for _ in range(12))
            return await asyncio.gather(*calls, return_exceptions=True)

    refused = [each for each in asyncio.run(crowd()) if isinstance(each, BaseException)]
    assert refused
    for error in refused:
        assert isinstance(error, anthropic.RateLimitError | anthropic.InternalServerError), error
        assert error.response.headers["retry-after"]
        assert error.body["error"]["type"] in ("rate_limit_error", "overloaded_error"), error.body


if __name__ == "__main__":
    run(globals())

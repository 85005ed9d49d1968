"""What else openai's SDK asks for: completions, embeddings, models, and what we do not have."""

from __future__ import annotations

import math
from typing import Any

import openai
from cases import Target, raised, run
from conversations import HELLO, MODEL
from openai.types import Completion
from openai_chat_cases import ask, client


def complete(target: Target, base: str = "/v1", *, strict: bool = True, **fields: Any) -> Any:
    """One text completion at temperature 0."""
    fields = {"model": MODEL, "prompt": "The sum is", "temperature": 0, "max_tokens": 8, **fields}
    return client(target, base, strict=strict).completions.create(**fields)


def case_completion(target: Target) -> None:
    answer = complete(target)
    assert answer.object == "text_completion" and answer.choices[0].text
    assert answer.usage.completion_tokens <= 8 and answer.usage.prompt_tokens > 0
    assert answer.choices[0].finish_reason in ("stop", "length")
    # The types know no chunk without a finish reason, though the service that they are of sends null until the last
    chunks = list(complete(target, strict=False, stream=True))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == answer.choices[0].text
    assert sum(chunk.usage is not None for chunk in chunks) == 1
    finishes = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert finishes[-1] == answer.choices[0].finish_reason and set(finishes[:-1]) <= {None}
    for chunk in chunks:
        data = chunk.to_dict()
        for choice in data["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        Completion.model_validate(data, strict=True)


def case_completion_of_several_prompts(target: Target) -> None:
    prompts = ["The sum is", "It is sunny"]
    answer = complete(target, prompt=prompts, n=2)
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2, 3]
    first = complete(target, prompt=prompts[1]).choices[0].text
    assert answer.choices[2].text == first
    ids = complete(target, prompt=[300, 301, 302])
    assert ids.usage.prompt_tokens == 3


def case_echo_and_logprobs(target: Target) -> None:
    plain = complete(target).choices[0].text
    assert complete(target, echo=True).choices[0].text == "The sum is" + plain
    logprobs = complete(target, logprobs=2).choices[0].logprobs
    assert "".join(logprobs.tokens) == plain
    assert len(logprobs.token_logprobs) == len(logprobs.tokens) == len(logprobs.text_offset)
    assert all(len(tops) >= 2 for tops in logprobs.top_logprobs)
    echoed = complete(target, strict=False, echo=True, logprobs=1, max_tokens=1).choices[0].logprobs
    assert echoed.token_logprobs[0] is None and all(value <= 0 for value in echoed.token_logprobs[1:])


def case_scoring_without_writing(target: Target) -> None:
    answer = complete(target, strict=False, echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].text == "The sum is" and answer.usage.completion_tokens == 0


def case_suffix_without_fim_tokens(target: Target) -> None:
    error = raised(openai.BadRequestError, lambda: complete(target, suffix=" and that is all."))
    assert error.param == "suffix", error


def case_completion_errors(target: Target) -> None:
    error = raised(openai.BadRequestError, lambda: complete(target, prompt="word " * 20000))
    assert error.code == "context_length_exceeded"
    for prompt in ([-1], [10**9], [[]], ""):
        fields = {"prompt": prompt}
        error = raised(openai.BadRequestError, lambda fields=fields: complete(target, **fields))
        assert error.param.startswith("prompt"), (prompt, error)


def case_embeddings(target: Target) -> None:
    sdk = client(target, strict=False)
    answer = sdk.embeddings.create(model=MODEL, input=[HELLO, "It is sunny in Paris.", HELLO])
    assert [row.index for row in answer.data] == [0, 1, 2] and answer.usage.prompt_tokens > 0
    first, second, third = (row.embedding for row in answer.data)
    assert math.isclose(math.fsum(x * x for x in first), 1, rel_tol=1e-3)
    assert all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(first, third, strict=True))
    assert any(not math.isclose(a, b, abs_tol=1e-3) for a, b in zip(first, second, strict=True))
    strict = client(target).embeddings.create(model=MODEL, input=HELLO, encoding_format="float")
    floats = strict.data[0].embedding
    assert all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(first, floats, strict=True))
    few = sdk.embeddings.create(model=MODEL, input=HELLO, dimensions=5).data[0].embedding
    length = math.sqrt(math.fsum(x * x for x in first[:5]))
    assert len(few) == 5 and all(math.isclose(x, y / length, abs_tol=1e-5) for x, y in zip(few, first, strict=False))
    for wrong in (0, len(first) + 1):
        error = raised(openai.BadRequestError, lambda wrong=wrong: sdk.embeddings.create(
            model=MODEL, input=HELLO, dimensions=wrong))  # fmt: skip
        assert error.param == "dimensions", error
    ids = sdk.embeddings.create(model=MODEL, input=[300, 301, 302])
    assert ids.usage.prompt_tokens == 3
    error = raised(openai.BadRequestError, lambda: sdk.embeddings.create(model=MODEL, input=""))
    assert error.param == "input"


def case_models(target: Target) -> None:
    for base in ("", "/v1", "/beta"):
        sdk = client(target, base)
        listed = sdk.models.list().data
        assert [model.id for model in listed] == [MODEL] and listed[0].object == "model"
        assert sdk.models.retrieve(MODEL).id == MODEL
        assert raised(openai.NotFoundError, lambda sdk=sdk: sdk.models.retrieve("none")).code == "model_not_found"


def case_raw_responses(target: Target) -> None:
    raw = client(target).models.with_raw_response.list()
    assert raw.headers["x-request-id"] and raw.http_response.status_code == 200
    assert ask(target)._request_id
    with client(target).chat.completions.with_streaming_response.create(
        model=MODEL, messages=[{"role": "user", "content": HELLO}], stream=True
    ) as response:  # fmt: skip
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith(("data: ", ":")) for line in lines)
    mine = client(target, default_headers={"x-request-id": "mine-1"}).models.with_raw_response.list()
    assert mine.headers["x-request-id"]


def case_what_we_do_not_have(target: Target) -> None:
    sdk = client(target)
    for call in (
        lambda: sdk.images.generate(prompt="a"),
        lambda: sdk.moderations.create(input="a"),
        lambda: sdk.files.list(),
        lambda: sdk.batches.list(),
        lambda: sdk.audio.speech.create(model=MODEL, voice="alloy", input="a"),
        lambda: sdk.fine_tuning.jobs.list(),
        lambda: sdk.vector_stores.list(),
        lambda: sdk.chat.completions.retrieve("chatcmpl-1"),
    ):
        error = raised(openai.APIStatusError, call)
        assert error.status_code in (404, 405), error
        assert isinstance(error.body, dict) and error.body["message"], error.body


if __name__ == "__main__":
    run(globals())

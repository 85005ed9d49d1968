"""A stream says what the whole answer says, in every protocol, however the tokens are drafted and whatever is asked.

Each case is asked for by two tenants, whole by one and as a stream by the other, so that both find the same cache.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from sprat.kernels import native
from tests.serve import answers
from tests.serve.answers import PATHS, Answer
from tests.serve.cases import FORM, FUNCTIONS, Case, case
from tests.serve.lively import FAMILIES, KEYS, Lively, lively_server

CASES = int(os.environ.get("SPRAT_SERVE_CASES", "100"))  # the whole bar is 300
SCHEMAS = {function["name"]: function["parameters"] for function in FUNCTIONS}
LENGTH: tuple[Any, ...] = ("length", ("max_tokens", None), ("incomplete", "max_output_tokens"))


@pytest.fixture(scope="module")
def lively() -> Iterator[Lively]:
    with lively_server(tuple(FAMILIES)) as server:
        yield server


def ask(lively: Lively, each: Case, *, stream: bool = False, mode: str = "", key: str = KEYS[0]) -> Answer:
    """The answer to a case."""
    reply = lively.post(PATHS[each.protocol], each.ask(stream=stream, mode=mode), key)
    assert reply.status_code == 200, (reply.text, each)
    return answers.streamed(each.protocol, reply.text) if stream else answers.whole(each.protocol, reply.json())


def test_a_stream_says_what_the_whole_answer_says(lively: Lively) -> None:
    """Text, reasoning, calls, finish, log-probabilities and usage."""
    seen: Counter[Any] = Counter()
    for number in range(CASES):
        each = case(number)
        whole, streamed = ask(lively, each), ask(lively, each, stream=True, key=KEYS[1])
        if isinstance(each.body.get("prompt"), list):  # whether one prompt finds the other's blocks is a race
            for usage in (streamed.usage, whole.usage):
                hit, miss = (usage.pop(f"prompt_cache_{name}_tokens") for name in ("hit", "miss"))
                assert usage.pop("prompt_tokens_details") == {"cached_tokens": hit}
                assert hit + miss == usage["prompt_tokens"]
        assert streamed == whole, (number, each)
        for one, other in zip(streamed.choices, whole.choices, strict=True):
            assert answers.is_close(one.logprobs, other.logprobs), (number, each)
        assert len(set(streamed.ids)) == len(streamed.ids) == sum(len(one.calls) for one in whole.choices)
        if native() is not None:  # bits are promised where we compute them ourselves
            for mode in {"off", "ngram"} - {each.mode}:
                other = ask(lively, each, mode=mode, key=KEYS[2])
                assert _without_cache(other) == _without_cache(whole), (number, mode, each)
        _check_truth(each, whole)
        _check_form(each, whole)
        seen.update(str(one.finish) for one in whole.choices)
        seen.update(name for one in whole.choices for name in ("reasoning", "content", "calls") if getattr(one, name))
    assert min(seen[name] for name in ("reasoning", "content", "calls")) > CASES // 10, seen
    drafted = [engine.stats().drafted_tokens for name, engine in lively.engines.items() if not name.endswith("off")]
    assert min(drafted) > 0


def _without_cache(answer: Answer) -> Any:
    """An answer with the tokens of its usage that no cache changes, and without floats."""
    usage = answer.usage
    told = [usage.get(name) for name in ("prompt_tokens", "completion_tokens", "output_tokens", "total_tokens")]
    return told, [(one.reasoning, one.content, one.calls, one.finish) for one in answer.choices]


def _check_truth(each: Case, answer: Answer) -> None:
    """The finish is why it ended."""
    usage = answer.usage
    tokens = usage.get("completion_tokens", usage.get("output_tokens"))
    choices = answer.choices
    assert len(choices) == each.n * (len(each.body["prompt"]) if isinstance(each.body.get("prompt"), list) else 1)
    assert tokens <= each.max_tokens * len(choices)
    lengths = sum(one.finish in LENGTH for one in choices)
    assert tokens >= lengths * each.max_tokens, (answer, each)
    for one in choices:
        if one.finish in ("tool_calls", ("tool_use", None)):
            assert one.calls
            for name, arguments in one.calls:
                value = arguments if isinstance(arguments, dict) else json.loads(arguments)
                Draft202012Validator(SCHEMAS[name]).validate(value)
        if one.finish not in LENGTH and not {"echo", "min_tokens"} & each.body.keys():
            assert not any(stop in one.content for stop in each.stops), (one, each)


def _check_form(each: Case, answer: Answer) -> None:
    """Where a form is asked for, the content has it or is not there because tools are called."""
    is_asked = {"response_format", "text", "output_config"} & each.body.keys()
    is_any = "json_object" in str(each.body)
    for one in answer.choices if is_asked else ():
        if one.calls:
            assert not one.content, each
        elif one.finish in ("stop", ("completed", None), ("end_turn", None)) and not each.stops:
            value = json.loads(one.content)
            assert isinstance(value, dict)
            if not is_any:
                Draft202012Validator(FORM).validate(value)

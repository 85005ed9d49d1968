"""Completions: what OpenAI's own types make of our chunks and objects, and what may be asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.serve.errors import RequestError
from sprat.serve.events import ChoiceFinished, Event, Finished, Started, TextDelta, TokenLogprob, Usage, collect
from sprat.serve.generation import Generation
from sprat.serve.openai_chat import Head
from sprat.serve.openai_completions import parse_completion, stream_events, whole

types = pytest.importorskip("openai.types")
HEAD = Head("cmpl-1", "tiny")
_LOGPROB = st.builds(TokenLogprob, st.binary(min_size=1, max_size=3), st.floats(-20, 0), st.just(()))


@st.composite
def texts(draw: st.DrawFn) -> list[Event]:
    pieces = draw(st.lists(st.tuples(st.text(max_size=6), st.lists(_LOGPROB, max_size=2)), max_size=6))
    events: list[Event] = [Started(3, 1)]
    events += [TextDelta(0, "content", text, tuple(logprobs)) for text, logprobs in pieces]
    return [*events, ChoiceFinished(0, draw(st.sampled_from(["stop", "length"]))), Finished(Usage(3, 1, 7, 0), 0.1)]


@settings(max_examples=50, deadline=None)
@given(texts(), st.booleans())
def test_chunks_and_the_whole_answer_say_the_same_to_openais_own_types(events: list[Event], usage_apart: bool) -> None:
    generation = Generation("tiny", prompt="x", logprobs=True)

    async def read() -> str:
        async def batches() -> AsyncIterator[list[Event] | None]:
            for event in events:
                yield [event]

        head = Head("cmpl-1", "tiny", usage_apart)
        return "".join([text async for text in stream_events(generation, batches(), head, lambda: {})])

    lines = [line for line in asyncio.run(read()).split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    rows = [json.loads(line.removeprefix("data: ")) for line in lines]
    finishes = [choice["finish_reason"] for row in rows for choice in row["choices"]]
    for row in rows:  # the types know no chunk without a finish reason, though the service that they are of sends null
        for choice in row["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
    chunks = [types.Completion.model_validate(row) for row in rows]
    answer = types.Completion.model_validate(whole(generation, collect(events), HEAD, {}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == answer.choices[0].text
    tokens = [token for c in chunks for choice in c.choices if choice.logprobs for token in choice.logprobs.tokens]
    assert tokens == answer.choices[0].logprobs.tokens
    assert [chunk.usage for chunk in chunks if chunk.usage] == [answer.usage]
    assert [reason for reason in finishes if reason is not None] == [answer.choices[0].finish_reason]


def test_offsets_of_tokens_are_places_in_the_text() -> None:
    tokens = (TokenLogprob(b"ab", -1.0), TokenLogprob("é".encode(), -2.0, ((b"x", -0.5),)), TokenLogprob(b"c", None))
    events: list[Event] = [TextDelta(0, "content", "abéc", tokens), ChoiceFinished(0, "stop")]
    events.append(Finished(Usage(1, 0, 3, 0), 0.1))
    logprobs = whole(Generation("tiny", logprobs=True), collect(events), HEAD, {})["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [0, 2, 3]
    assert logprobs["top_logprobs"] == [{"ab": -1.0}, {"é": -2.0, "x": -0.5}, None]
    assert logprobs["token_logprobs"] == [-1.0, -2.0, None]


def test_a_token_that_stands_in_no_text_has_a_name_and_takes_no_place() -> None:
    tokens = (TokenLogprob(b"ab", -1.0), TokenLogprob(b"<|end|>", -2.0, hidden=True), TokenLogprob(b"c", -3.0))
    events: list[Event] = [TextDelta(0, "content", "abc", tokens), ChoiceFinished(0, "stop")]
    events.append(Finished(Usage(1, 0, 3, 0), 0.1))
    logprobs = whole(Generation("tiny", logprobs=True), collect(events), HEAD, {})["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["text_offset"]) == (["ab", "<|end|>", "c"], [0, 2, 2])


@pytest.mark.parametrize("count", [0, 1])
def test_the_token_itself_is_among_its_alternatives_as_openai_says(count: int) -> None:
    """Their reference: the API always returns the log-probability of the sampled token, so there may be one more."""
    others = ((b"x", -0.5),)[:count]
    events: list[Event] = [TextDelta(0, "content", "ab", (TokenLogprob(b"ab", -1.0, others),))]
    events += [ChoiceFinished(0, "stop"), Finished(Usage(1, 0, 1, 0), 0.1)]
    logprobs = whole(Generation("tiny", logprobs=True), collect(events), HEAD, {})["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"ab": -1.0} | ({"x": -0.5} if count else {})]


def test_ids_are_named_where_the_caller_wrote_them() -> None:
    cases: list[tuple[Any, str]] = [([7, 9], "prompt"), ([[7], [9]], "prompt[1]"), (["a", [7]], "prompt[1]")]
    for prompt, path in cases:
        assert parse_completion({"model": "tiny", "prompt": prompt})[-1].paths["ids"] == path


def test_without_max_tokens_an_answer_has_the_room_that_is_left() -> None:
    (silent,) = parse_completion({"model": "tiny", "prompt": "a"})
    (said,) = parse_completion({"model": "tiny", "prompt": "a", "max_tokens": 40})
    assert (silent.max_tokens, said.max_tokens) == (None, 40)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), ([1, 2], [(1, 2)]), (["a", "b"], ["a", "b"]), ([[1], [2, 3]], [(1,), (2, 3)])],
)
def test_prompts_are_texts_or_ids_one_or_many(prompt: Any, expected: list[Any]) -> None:
    generations = parse_completion({"model": "tiny", "prompt": prompt})
    assert [generation.prompt for generation in generations] == expected


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x", "echo": True}, "suffix"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_a_refusal_names_the_field(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_completion({"model": "tiny", "prompt": "a", **fields})
    assert (refused.value.status, refused.value.param) == (400, path)

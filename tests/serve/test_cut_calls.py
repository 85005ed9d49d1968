"""Calls that are cut at every token: what came is the beginning of what would have come, and the finish says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.serve import answers
from tests.serve.answers import PATHS, Answer, Said
from tests.serve.cases import FUNCTIONS
from tests.serve.lively import FAMILIES, KEYS, Lively, lively_server

CHOICES = ("auto", "required", {"type": "function", "function": {"name": "get_weather"}})
SCHEMAS = {function["name"]: function["parameters"] for function in FUNCTIONS}
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
NAMED = CHOICES[2]
SEEDS, ENOUGH = 12, 400
HALF = "\ufffd"  # a character of which not all bytes came


@pytest.fixture(scope="module")
def lively() -> Iterator[Lively]:
    with lively_server(tuple(FAMILIES)) as server:
        yield server


def ask(lively: Lively, family: str, *, stream: bool, key: str = KEYS[0], mode: str = "off", **fields: Any) -> Answer:
    """What the model of a family calls."""
    body = {"messages": [{"role": "user", "content": "what is it in Paris?"}], "temperature": 1, "tools": TOOLS}
    body |= {"model": f"{family}-{mode}", "stream": stream, "thinking": {"type": "disabled"}, **fields}
    reply = lively.post(PATHS["chat"], body, key)
    assert reply.status_code == 200, reply.text
    return answers.streamed("chat", reply.text) if stream else answers.whole("chat", reply.json())


@pytest.fixture(scope="module", params=tuple(FAMILIES))
def uncut(request: pytest.FixtureRequest, lively: Lively) -> list[tuple[str, dict[str, Any], Said, int]]:
    """A whole answer with calls for each way to choose, the longest of some: family, request, choice, its tokens."""
    rows = []
    for choice in CHOICES:
        found = []
        for seed in range(SEEDS * (4 if choice == "auto" else 1)):
            fields = {"seed": seed, "tool_choice": choice}
            answer = ask(lively, request.param, stream=False, key=KEYS[2], max_tokens=ENOUGH, **fields)
            if answer.choices[0].finish == "tool_calls":
                found.append((answer.usage["completion_tokens"], fields, answer.choices[0]))
        assert found, choice
        short = sorted((row for row in found if row[0] < 120), key=lambda row: (len(row[2].calls), row[0]))
        tokens, fields, said = (short or sorted(found, key=lambda row: row[0]))[-1]
        rows.append((request.param, fields, said, tokens))
    return rows


def test_whole_calls_are_objects_of_their_schema(uncut: list[tuple[str, dict[str, Any], Said, int]]) -> None:
    """Of the tool that was named, where one was."""
    for _, fields, said, _ in uncut:
        for name, arguments in said.calls:
            Draft202012Validator(SCHEMAS[name]).validate(json.loads(arguments))
        if fields["tool_choice"] == NAMED:
            assert [name for name, _ in said.calls] == ["get_weather"]
        if fields["tool_choice"] != "auto":
            assert not said.content


def test_a_call_that_is_cut_at_any_token_is_the_beginning_of_the_whole_one(
    lively: Lively, uncut: list[tuple[str, dict[str, Any], Said, int]]
) -> None:
    """In a stream and not; the answer is as long as asked, and says that it was cut."""
    for family, fields, said, tokens in uncut:
        for limit in range(1, tokens + 1):
            whole = ask(lively, family, stream=False, max_tokens=limit, **fields)
            streamed = ask(lively, family, stream=True, key=KEYS[1], max_tokens=limit, **fields)
            assert streamed == whole
            (cut,) = whole.choices
            assert whole.usage["completion_tokens"] == limit
            assert said.content.startswith(cut.content.rstrip(HALF))
            assert len(cut.calls) <= len(said.calls)
            for number, (name, arguments) in enumerate(cut.calls):
                assert name == said.calls[number][0]
                if number < len(cut.calls) - 1:
                    assert arguments == said.calls[number][1]
                assert said.calls[number][1].startswith(arguments.rstrip(HALF))
            assert cut.finish == ("length" if limit < tokens else "tool_calls"), (limit, tokens)
        assert cut.calls == said.calls


def test_each_piece_of_a_stream_brings_what_it_may(
    lively: Lively, uncut: list[tuple[str, dict[str, Any], Said, int]]
) -> None:
    """Id, type and name come with the first piece of a call and never again; pieces of arguments are never empty."""
    for family, fields, said, tokens in uncut:
        body = {"messages": [{"role": "user", "content": "what is it in Paris?"}], "temperature": 1, "tools": TOOLS}
        body |= {"model": f"{family}-ngram", "stream": True, "thinking": {"type": "disabled"}, "max_tokens": ENOUGH}
        reply = lively.post(PATHS["chat"], {**body, **fields})
        deltas = [row["delta"] for event in answers.events_of(reply.text) for row in event["choices"]]
        pieces = [call for delta in deltas for call in delta.get("tool_calls") or ()]
        assert len(pieces) > len(said.calls) and len(deltas) < tokens + 10
        for index, (name, arguments) in enumerate(said.calls):
            first, *more = [piece for piece in pieces if piece["index"] == index]
            assert first["id"] and first["type"] == "function" and first["function"]["name"] == name
            assert all(piece.keys() == {"index", "function"} and piece["function"]["arguments"] for piece in more)
            assert "".join(piece["function"]["arguments"] for piece in [first, *more]) == arguments

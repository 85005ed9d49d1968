"""Content follows its schema wherever the model ended it, whether it thinks or not, and none of it is in the reasoning.

Whether a value follows a schema is said by jsonschema.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker

from tests.serve import answers
from tests.serve.answers import PATHS, Said
from tests.serve.lively import Lively, lively_server
from tests.serve.schemas import schema

SCHEMAS = int(os.environ.get("SPRAT_SERVE_SCHEMAS", "60"))  # the whole bar is 200
THINKING = ("enabled", "disabled", "auto")
FAMILIES = ("sprat", "chatml", "llama3")


@pytest.fixture(scope="module")
def lively() -> Iterator[Lively]:
    with lively_server(FAMILIES, ("ngram",)) as server:
        yield server


def ask(lively: Lively, number: int, thinking: str, stream: bool) -> Said:
    """The answer of one of the models to a schema."""
    body: dict[str, Any] = {"model": f"{FAMILIES[number % len(FAMILIES)]}-ngram", "seed": number, "max_tokens": 400}
    body |= {"messages": [{"role": "user", "content": "what is it?"}], "temperature": 1, "stream": stream}
    body |= {"thinking": {"type": thinking}, "response_format": {
        "type": "json_schema", "json_schema": {"name": "form", "strict": True, "schema": schema(number)}}}  # fmt: skip
    reply = lively.post(PATHS["chat"], body)
    assert reply.status_code == 200, (reply.text, schema(number))
    answer = answers.streamed("chat", reply.text) if stream else answers.whole("chat", reply.json())
    return answer.choices[0]


def test_content_that_has_ended_follows_its_schema(lively: Lively) -> None:
    seen: Counter[str] = Counter()
    for number in range(SCHEMAS):
        form = schema(number)
        Draft202012Validator.check_schema(form)
        validator = Draft202012Validator(form, format_checker=FormatChecker())
        for thinking in THINKING:
            said = ask(lively, number, thinking, stream=number % 2 == 0)
            seen[f"{thinking} {said.finish}"] += 1
            if said.finish == "stop":
                validator.validate(json.loads(said.content))
            elif said.content:
                with pytest.raises(ValueError):
                    json.loads(said.content + "\\")  # it is no whole text, nor anything behind one
            if thinking == "disabled":
                assert not said.reasoning
            if said.finish == "stop" and thinking == "enabled":
                assert said.content.lstrip().startswith("{")
                assert "</think>" not in said.content or "</think>" in json.dumps(form)
    assert all(seen[f"{thinking} stop"] > SCHEMAS // 3 for thinking in THINKING), seen


def test_reasoning_is_free_and_holds_none_of_the_content(lively: Lively) -> None:
    """A constant that no model says by chance is in the content alone, though the same words are asked of both."""
    word = "swordfish-4711"
    form = {
        "type": "object",
        "properties": {"word": {"const": word}},
        "required": ["word"],
        "additionalProperties": False,
    }
    reasonings = []
    for seed in range(20):
        for family in FAMILIES:
            body: dict[str, Any] = {"model": f"{family}-ngram", "seed": seed, "max_tokens": 300, "temperature": 1}
            body |= {"messages": [{"role": "user", "content": word}], "thinking": {"type": THINKING[seed % 3]}}
            body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "form", "schema": form}}}
            said = answers.whole("chat", lively.post(PATHS["chat"], body).json()).choices[0]
            if said.finish == "stop":
                assert json.loads(said.content) == {"word": word}
            assert word not in said.reasoning and '"word"' not in said.reasoning
            reasonings.append(said.reasoning)
    assert len(set(reasonings)) > 10


@pytest.mark.parametrize("fault", [{"type": "string", "pattern": "(?=x)y"}, {"type": "integer", "minimum": 2**60}])
@pytest.mark.parametrize("with_tools", [False, True])
def test_a_schema_that_cannot_be_followed_is_refused_by_its_own_path(
    lively: Lively, fault: dict[str, Any], with_tools: bool
) -> None:
    form = {"type": "object", "properties": {"a": fault}, "required": ["a"]}
    turns = [{"role": "user", "content": "x"}]
    empty = {"type": "object", "properties": {}}
    tools = {
        "chat": [{"type": "function", "function": {"name": "f", "parameters": empty}}],
        "responses": [{"type": "function", "name": "f", "parameters": empty}],
        "messages": [{"name": "f", "input_schema": empty}],
    }
    bodies = {
        "chat": {"messages": turns, "response_format": {
            "type": "json_schema", "json_schema": {"name": "f", "schema": form}}},
        "responses": {"input": "x", "text": {"format": {"type": "json_schema", "name": "f", "schema": form}}},
        "messages": {"messages": turns, "max_tokens": 9, "output_config": {
            "format": {"type": "json_schema", "schema": form}}},
    }  # fmt: skip
    paths = {"chat": "response_format", "responses": "text.format", "messages": "output_config.format"}
    for protocol, body in bodies.items():
        more = {"tools": tools[protocol]} if with_tools else {}
        reply = lively.post(PATHS[protocol], {**body, **more, "model": "chatml-ngram"})
        assert reply.status_code == 400, (protocol, reply.text)
        assert paths[protocol] in reply.json()["error"]["message"], reply.text

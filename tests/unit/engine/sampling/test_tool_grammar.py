"""Forced calls are calls, whatever the model would say; a call that a model begins of itself is one as well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

from sprat.engine import Engine
from sprat.engine.sampling.grammar import GrammarCache
from sprat.engine.sampling.grammar_source import MAX_SOURCE
from sprat.engine.sampling.processors import build_processors
from sprat.engine.sampling.sampler import Sampler
from sprat.engine.sampling.tool_grammar import MAX_TOOLS
from sprat.engine.sampling_params import Response, Sampling
from sprat.engine.sequence import Sequence, noise_key
from sprat.errors import EngineError
from sprat.model import Transformer
from sprat.tokens import Tokenizer, split_reasoning
from sprat.tokens.tool_formats import DEEPSEEK_V3, DEEPSEEK_V3_1, HERMES, LLAMA3, ToolFormat
from sprat.tokens.tool_parser import CallArguments, CallBegin, Content, Piece, ToolCallParser
from tests.unit.engine.sampling.test_processors import plain_tags

FORMATS = {each.name: each for each in (HERMES, DEEPSEEK_V3_1, DEEPSEEK_V3, LLAMA3)}
TAGGED = [name for name, each in FORMATS.items() if each.has_tags]
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["C", "é", "</tool_call>"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
NOW: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"name": "get", "parameters": NOW},
    {"name": "get_weather", "parameters": WEATHER, "strict": True},
    {
        "name": "w",
        "parameters": {"$defs": {"c": {"const": {"x": "}"}}}, **NOW, "properties": {"c": {"$ref": "#/$defs/c"}}},
    },
]
SCHEMAS = {tool["name"]: tool["parameters"] for tool in TOOLS}
Calls = list[tuple[str, str]]


@pytest.fixture(scope="module", params=["tags are tokens", "tags are text"])
def either(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    """Both kinds of tokenizer."""
    return tokenizer if request.param == "tags are tokens" else plain_tags()


@pytest.fixture(scope="module")
def grammars(either: Tokenizer) -> Iterator[GrammarCache]:
    """Compiled grammars over one of them."""
    made = GrammarCache(either, frozenset({either.special_ids.eos}))
    yield made
    made.close()


def say(
    tokenizer: Tokenizer,
    grammars: GrammarCache,
    response: Response,
    seed: int,
    text: str = "",
    limit: int = 2000,
    **said: Any,
) -> tuple[str, bool]:
    """What a model says that wants to say ``text`` and then noise, and whether it came to its end."""
    sampling = Sampling(temperature=2, seed=seed, response=response, max_tokens=limit, **{"thinking": False, **said})
    eos, wanted = tokenizer.special_ids.eos, tokenizer.encode(text, parse_special=True)
    sampler = Sampler(tokenizer, 1, frozenset({eos}))
    sequence = Sequence(1, [1], sampling, limit, noise_key(seed, 0, [1]))
    sequence.processors = build_processors(sampling, [1], tokenizer, grammars)
    sampler.add(0, sequence)
    while len(sequence.output_ids) < limit and sequence.output_ids[-1:] != [eos]:
        generator = torch.Generator().manual_seed(seed * 1000 + len(sequence.output_ids))
        logits = torch.randn(1, tokenizer.vocab_size, generator=generator) * 2
        if len(sequence.output_ids) < len(wanted):
            logits[0, wanted[len(sequence.output_ids)]] = 1000.0
        found = sampler.sample(logits, np.zeros(1, np.int64), np.arange(1), {0: []})
        assert not found.errors
        sequence.output_ids.append(int(found.tokens_R[0]))
        sampler.advance(np.array([0]))
    answer = split_reasoning(tokenizer, sequence.output_ids, thinking=sampling.thinking, structured=True)
    return answer.content, sequence.output_ids[-1] == eos


def read(tool_format: ToolFormat, text: str) -> tuple[str, Calls]:
    """Content and calls of an answer."""
    parser = ToolCallParser(tool_format, SCHEMAS)
    content, calls = "", Calls()
    for piece in [*parser.push(text), *parser.close()]:
        if isinstance(piece, Content):
            content += piece.text
        elif isinstance(piece, CallBegin):
            calls.append((piece.name, ""))
        elif isinstance(piece, CallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return content, calls


def check(calls: Calls) -> None:
    for name, arguments in calls:
        Draft202012Validator(SCHEMAS[name]).validate(json.loads(arguments))


@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_are_read_and_follow_their_schemas(either: Tokenizer, grammars: GrammarCache, name: str) -> None:
    names, counts = set(), set()
    for seed in range(15):
        response = Response.tool_calls(TOOLS, FORMATS[name], choice="required", parallel=seed % 2 == 0)
        text, ended = say(either, grammars, response, seed)
        assert ended, text
        content, calls = read(FORMATS[name], text)
        assert content == "" and calls
        check(calls)
        names |= {called for called, _ in calls}
        counts.add(len(calls))
        assert len(calls) == 1 or (seed % 2 == 0 and FORMATS[name].parallel)
    assert len(names) > 1 and (counts != {1} or not FORMATS[name].parallel)


@pytest.mark.parametrize("name", TAGGED)
def test_an_answer_is_calls_or_has_the_form_that_is_asked_for(
    either: Tokenizer, grammars: GrammarCache, name: str
) -> None:
    form = {"type": "object", "properties": {"sails": {"type": "boolean"}}, "required": ["sails"]}
    form["additionalProperties"] = False
    response = Response.tool_calls(TOOLS, FORMATS[name], choice="auto", parallel=False, form=form)
    opening = FORMATS[name].calls[0] or FORMATS[name].call[0]
    for seed in range(5):
        text, ended = say(either, grammars, response, seed, "{")
        assert ended and read(FORMATS[name], text)[1] == []
        assert json.loads(text).keys() == {"sails"} and isinstance(json.loads(text)["sails"], bool)
        text, ended = say(either, grammars, response, seed, opening)
        content, calls = read(FORMATS[name], text)
        assert ended and content == "" and len(calls) == 1
        check(calls)
    assert response.shapes_content


@pytest.mark.parametrize("case", ["look-around", "no schema"])
def test_a_form_that_cannot_be_followed_is_an_error_of_the_form(grammars: GrammarCache, case: str) -> None:
    tools = [{**tool, "strict": False} for tool in TOOLS]
    response = Response.tool_calls(tools, HERMES, choice="auto", form=UNUSABLE[case])
    with pytest.raises(EngineError, match="the schema cannot be used") as caught:
        grammars.grammar(response, False)
    assert caught.value.where == "response"


def test_a_named_tool_is_the_one_that_is_called(either: Tokenizer, grammars: GrammarCache) -> None:
    response = Response.tool_calls(TOOLS, HERMES, choice="named", name="get_weather", parallel=False)
    for seed in range(8):
        text, ended = say(either, grammars, response, seed)
        content, calls = read(HERMES, text)
        assert ended and content == "" and [called for called, _ in calls] == ["get_weather"]
        check(calls)


@pytest.mark.parametrize("name", TAGGED)
def test_a_call_that_was_opened_is_one(either: Tokenizer, grammars: GrammarCache, name: str) -> None:
    tool_format = FORMATS[name]
    for seed in range(8):
        response = Response.tool_calls(TOOLS, tool_format, choice="auto", parallel=seed % 2 == 0)
        opening = f"Hm <a {{\n{tool_format.calls[0] or tool_format.call[0]}"
        text, ended = say(either, grammars, response, seed, opening)
        content, calls = read(tool_format, text)
        assert ended and content == "Hm <a {" and calls
        check(calls)
        assert len(calls) == 1 or seed % 2 == 0


@pytest.mark.parametrize("name", TAGGED)
def test_without_a_tag_all_text_is_free(either: Tokenizer, grammars: GrammarCache, name: str) -> None:
    response = Response.tool_calls(TOOLS, FORMATS[name], choice="auto")
    wanted = 'Any {"name": "rm", "arguments": 1} <tool_cal <｜tool▁call é 😀\n'
    text, _ = say(either, grammars, response, 0, wanted, limit=len(either.encode(wanted)))
    assert text == wanted
    free = [say(either, grammars, response, seed, limit=30)[0] for seed in range(5)]
    assert len(set(free)) > 3


def test_the_calls_are_forced_when_the_thinking_has_ended(tokenizer: Tokenizer) -> None:
    made = GrammarCache(tokenizer, frozenset({tokenizer.special_ids.eos}))
    response = Response.tool_calls(TOOLS, HERMES, choice="required", parallel=False)
    for seed in range(4):
        text, ended = say(tokenizer, made, response, seed, thinking=True, max_think_tokens=9)
        content, calls = read(HERMES, text)
        assert ended and content == "" and len(calls) == 1
        check(calls)
    made.close()


LOOKS_AROUND = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}, "required": ["a"]}
UNUSABLE = {
    "look-around": LOOKS_AROUND,
    "a list": {"type": "array"},
    "no schema": {"type": "object", "properties": {"a": {"minimum": 2**60}}},
    "too deep": json.loads('{"type": "object", "items": ' * 40 + "{}" + "}" * 40),
    "too long": {"type": "object", "description": "x" * MAX_SOURCE},
    "another place": {"type": "object", "properties": {"a": {"$ref": "https://example.com"}}},
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_schema_that_cannot_be_followed_is_an_error_of_a_strict_tool_alone(
    tokenizer: Tokenizer, grammars: GrammarCache, case: str
) -> None:
    row = {"name": "get", "parameters": UNUSABLE[case]}
    strict = Response.tool_calls([{**row, "strict": True}], HERMES)
    with pytest.raises(EngineError, match="the tools cannot be used"):
        grammars.grammar(strict, False)
    loose = Response.tool_calls([row, TOOLS[1]], HERMES, parallel=False)
    grammars.grammar(loose, False)


def test_others_keep_their_schema_where_one_cannot_be_followed(tokenizer: Tokenizer) -> None:
    made = GrammarCache(tokenizer, frozenset({tokenizer.special_ids.eos}))
    tools = [{"name": "get", "parameters": LOOKS_AROUND}, TOOLS[1]]
    response = Response.tool_calls(tools, HERMES, parallel=False)
    opening = '<tool_call>\n{"name": "get_weather"'
    for seed in range(5):
        text, ended = say(tokenizer, made, response, seed, opening)
        assert ended
        check(read(HERMES, text)[1])
    made.close()


def test_what_cannot_be_asked_for_is_said() -> None:
    for tools, options, message in (
        ([], {}, "there is no tool"),
        (TOOLS, {"choice": "named", "name": "rm"}, "there is no tool 'rm'"),
        ([TOOLS[0], TOOLS[0]], {}, "the same name"),
        ([{"name": ""}], {}, "cannot be named"),
        ([{"name": "f", "parameters": {"a": object()}}], {}, "no JSON"),
        (TOOLS, {"choice": "perhaps"}, "no choice of tools"),
    ):
        with pytest.raises(EngineError, match=message):
            Response.tool_calls(tools, HERMES, **options)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="its calls have no tags"):
        Response.tool_calls(TOOLS, LLAMA3, choice="auto")
    assert Response.tool_calls(TOOLS, HERMES).shapes_content
    assert not Response.tool_calls(TOOLS, HERMES, choice="auto").shapes_content


def test_too_many_tools_are_refused(grammars: GrammarCache) -> None:
    many = [{"name": f"f{number}"} for number in range(MAX_TOOLS + 1)]
    with pytest.raises(EngineError, match="129 tools"):
        grammars.grammar(Response.tool_calls(many, HERMES), False)
    grammars.grammar(Response.tool_calls(many[1:], HERMES), False)


def test_a_name_is_a_name_whatever_it_spells(either: Tokenizer, grammars: GrammarCache) -> None:
    name = 'a"/ | b\\ %json {} é'
    response = Response.tool_calls([{"name": name, "parameters": NOW}], HERMES, parallel=False)
    text, ended = say(either, grammars, response, 0)
    pieces = ToolCallParser(HERMES, [name]).push(text)
    assert ended and pieces[0] == CallBegin(0, name)


def test_calls_that_an_engine_streams_are_read_as_they_come(drafter: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(drafter, tokenizer)
    for seed, (name, thinking) in enumerate([("hermes", False), ("deepseek_v3", True), ("llama3", False)]):
        response = Response.tool_calls(TOOLS, FORMATS[name])
        assert (
            Response(response.kind, json.loads(json.dumps(response.source))) == response
        )  # to another process and back
        sampling = Sampling(seed=seed, max_tokens=3000, thinking=thinking, max_think_tokens=5, response=response)
        parser, pieces, text = ToolCallParser(FORMATS[name], SCHEMAS), list[Piece](), ""
        for delta in engine.stream("the cat", sampling):
            if delta.kind == "content":
                pieces += parser.push(delta.text)
                text += delta.text
        pieces += parser.close()
        assert not any(isinstance(piece, Content) for piece in pieces)
        calls = read(FORMATS[name], text)[1]
        streamed = ["".join(p.text for p in pieces if isinstance(p, CallArguments) and p.index == n) for n in range(9)]
        assert calls and streamed[: len(calls)] == [arguments for _, arguments in calls]
        check(calls)


@pytest.mark.parametrize(
    ("parameters", "allowed", "refused"),
    [
        (None, "{}", '{"a": 1}'),
        ({}, "{}", '{"a": 1}'),
        ({"type": "object"}, '{"a": 1}', "[]"),
        ({"type": "object", "properties": {}}, "{}", '{"a": 1}'),
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1}', '{"b": 1}'),
        ({"type": ["object", "null"], "properties": {"a": {}}, "additionalProperties": True}, '{"b": 1}', "null"),
        ({"type": "object", "properties": {"a": {}}, "patternProperties": {"^b": {}}}, '{"b": 1}', "1"),
        ({"type": "array"}, '{"b": 1}', "[]"),
    ],
)
def test_arguments_are_those_that_the_schema_names(
    tokenizer: Tokenizer, parameters: Any, allowed: str, refused: str
) -> None:
    made = GrammarCache(tokenizer, frozenset({tokenizer.special_ids.eos}))
    response = Response.tool_calls([{"name": "f", "parameters": parameters}], HERMES, parallel=False)
    before, after = '<tool_call>\n{"name": "f", "arguments": ', "}\n</tool_call>"
    for arguments, is_allowed in ((allowed, True), (refused, False)):
        wanted = before + arguments + after
        text, _ = say(tokenizer, made, response, 0, wanted, limit=len(tokenizer.encode(wanted)) + 1)
        assert (text == wanted) == is_allowed
    made.close()


def test_tools_that_are_too_long_together_are_refused(grammars: GrammarCache) -> None:
    long = [{"name": f"f{number}", "description": "", "parameters": {"title": "x" * 60_000}} for number in range(5)]
    grammars.grammar(Response.tool_calls(long[:4], HERMES), False)
    with pytest.raises(EngineError, match="the tools are too long"):
        grammars.grammar(Response.tool_calls(long, HERMES), False)


@pytest.mark.parametrize("name", TAGGED)
def test_content_has_its_form_or_is_calls(either: Tokenizer, grammars: GrammarCache, name: str) -> None:
    """With a form the model chooses by its first character: JSON, or a tag; and no word stands beside either."""
    tool_format = FORMATS[name]
    form = {"type": "object", "properties": {"sky": {"enum": ["a", "<tool_call>"]}}, "required": ["sky"]}
    form |= {"additionalProperties": False}
    response = Response.tool_calls(TOOLS, tool_format, choice="auto", form=form)
    assert response.shapes_content
    for seed in range(6):
        text, ended = say(either, grammars, response, seed, "{")
        Draft202012Validator(form).validate(json.loads(text))
        assert ended
        text, ended = say(either, grammars, response, seed, tool_format.calls[0] or tool_format.call[0])
        content, calls = read(tool_format, text)
        assert ended and content == "" and calls
        check(calls)
        text, ended = say(either, grammars, response, seed, "Well, ")
        assert ended and text[0] in "{<" and "Well" not in text
    with pytest.raises(EngineError, match="schema cannot be used") as caught:
        grammars.grammar(Response.tool_calls(TOOLS, tool_format, choice="auto", form=LOOKS_AROUND), False)
    assert caught.value.where == "response"
    with pytest.raises(EngineError, match="form"):
        Response.tool_calls(TOOLS, tool_format, choice="required", form=form)

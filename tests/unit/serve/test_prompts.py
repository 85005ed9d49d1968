"""How many tokens an answer may have: what was asked for, within what the context and the server give."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from sprat.model import Transformer
from sprat.serve.engine_client import EngineInfo, JobEvent
from sprat.serve.errors import RequestError
from sprat.serve.events import TextDelta
from sprat.serve.generation import Generation, Tool, ToolChoice
from sprat.serve.prompts import PromptWriter, join_systems
from sprat.tokens import Tokenizer
from sprat.tokens.chat import Message, ToolCall

ASK = Generation("m", (Message("user", "Hello"),))
MODES: tuple[Literal["auto", "none", "required", "named"], ...] = ("auto", "none", "required", "named")


def writer_of(parts: tuple[Transformer, Tokenizer], **settings: Any) -> PromptWriter:
    engine: Any = SimpleNamespace(info=EngineInfo(100, 100, 1, parts[1].vocab_size, ()))
    return PromptWriter(parts[1], engine, default_sampling={}, **settings)


def limit(writer: PromptWriter, max_tokens: int, **sampling: Any) -> int | None:
    generation = Generation("m", ASK.messages, max_tokens=max_tokens, sampling=sampling)
    return writer.write(generation, 0).samplings[0].max_tokens


def test_more_than_there_is_is_refused_or_gives_way_where_it_was_said_so(parts: tuple[Transformer, Tokenizer]) -> None:
    writer = writer_of(parts)
    room = 100 - len(writer.ids(ASK))
    assert limit(writer, 32_000, fit=True) == limit(writer, room) == room
    assert limit(writer, 5, fit=True) == 5
    with pytest.raises(RequestError) as caught:
        limit(writer, room + 1)
    assert caught.value.code == "context_length_exceeded"
    assert limit(writer_of(parts, max_tokens=7), 32_000, fit=True) == 7


def test_a_prompt_that_leaves_no_room_is_refused_whatever_gives_way(parts: tuple[Transformer, Tokenizer]) -> None:
    with pytest.raises(RequestError) as caught:
        limit(writer_of(parts, max_model_len=len(writer_of(parts).ids(ASK))), 32_000, fit=True)
    assert caught.value.code == "context_length_exceeded"


def test_all_systems_become_one_that_stands_first() -> None:
    said = (Message("system", "a"), Message("user", "b"), Message("system", "c"), Message("assistant", "d"))
    assert [(each.role, each.content) for each in join_systems(said)] == [
        ("system", "a\n\nc"), ("user", "b"), ("assistant", "d")
    ]  # fmt: skip
    assert join_systems(said[1:2]) == [said[1]] and join_systems(said[:2]) == list(said[:2])


def test_what_a_request_says_counts_more_than_the_folder_and_each_answer_has_a_seed_of_its_own(
    parts: tuple[Transformer, Tokenizer],
) -> None:
    engine: Any = SimpleNamespace(info=EngineInfo(100, 100, 1, parts[1].vocab_size, ()))
    writer = PromptWriter(parts[1], engine, default_sampling={"temperature": 0.5, "top_k": 9})
    samplings = writer.write(Generation("m", ASK.messages, n=3, sampling={"temperature": 0.1}), 7).samplings
    assert [(each.temperature, each.top_k) for each in samplings] == [(0.1, 9)] * 3
    assert [each.seed for each in samplings] == [7, 8, 9]


def test_an_id_that_is_no_token_is_named_by_its_place(parts: tuple[Transformer, Tokenizer]) -> None:
    vocab = parts[1].vocab_size
    with pytest.raises(RequestError) as caught:
        writer_of(parts).write(Generation("m", prompt=(1, vocab), paths={"ids": "prompt[2]"}), 0)
    assert caught.value.param == "prompt[2][1]"
    assert caught.value.message == f"prompt[2][1]: must be an id of 0 … {vocab - 1}, not {vocab}"


def test_tokens_that_stand_in_no_text_are_spelled_by_their_names(parts: tuple[Transformer, Tokenizer]) -> None:
    tokenizer = parts[1]
    eos, letter = tokenizer.special_ids.eos, tokenizer.encode("a")[0]
    assert tokenizer.token_bytes(eos) == b""
    name = next(name for name, index in tokenizer.control_tokens.items() if index == eos).encode()
    (choice,) = writer_of(parts).write(replace(ASK, logprobs=True), 0).choices
    event = JobEvent("content", text="a", logprobs=((letter, -1.0, ((eos, -2.0),)), (eos, -3.0, ())))
    (delta,) = choice.push(event)
    assert isinstance(delta, TextDelta)
    assert [(each.token, each.top, each.hidden) for each in delta.logprobs] == [
        (b"a", ((name, -2.0),), False),
        (name, (), True),
    ]


def test_a_model_that_knows_no_tools_is_told_of_them_and_held_to_them(parts: tuple[Transformer, Tokenizer]) -> None:
    """Whatever is chosen: only ``none`` is as if there were none."""
    writer = writer_of(parts, max_tokens=1)
    tools = (Tool("weather", parameters={"type": "object", "properties": {"city": {"type": "string"}}}),)
    asked = {
        mode: replace(ASK, tools=tools, tool_choice=ToolChoice(mode, "weather" if mode == "named" else ""))
        for mode in MODES
    }
    ids = {mode: writer.ids(generation) for mode, generation in asked.items()}
    assert ids["none"] == writer.ids(ASK) and ids["auto"] == ids["required"] == ids["named"]
    told = parts[1].decode(ids["auto"])
    assert '<tools>\n{"type": "function", "function": {"name": "weather", "parameters":' in told
    forms = {mode: writer.response(writer.without_unused_tools(generation)) for mode, generation in asked.items()}
    assert {mode: form and form.kind for mode, form in forms.items()} == {
        "none": None, "auto": "auto_tools", "required": "tools", "named": "tools"
    }  # fmt: skip
    history = (Message("assistant", "", tool_calls=(ToolCall("weather", "{}"),)), Message("tool", "Rain."))
    later = parts[1].decode(writer.ids(Generation("m", (*ASK.messages, *history))))
    assert "<tool_response>\nRain.\n</tool_response>" in later and "<tools>" not in later

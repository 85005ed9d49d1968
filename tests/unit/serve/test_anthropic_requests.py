"""A request in Anthropic's form is understood, and what cannot be done is refused by the path of the field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

from sprat.serve.anthropic import parse_messages
from sprat.serve.errors import RequestError
from sprat.serve.generation import ToolChoice
from sprat.tokens.chat import Message, ToolCall
from tests.unit.serve.sdks import spoiled

ASK: dict[str, Any] = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {"a": {}}}}
FULL: dict[str, Any] = {
    **ASK, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "stop_sequences": ["END"], "stream": True,
    "metadata": {"user_id": "u"}, "thinking": {"type": "enabled", "budget_tokens": 2048}, "tools": [TOOL],
    "tool_choice": {"type": "tool", "name": "add", "disable_parallel_tool_use": True},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    "service_tier": "auto", "speed": None, "context_management": {"edits": []},
}  # fmt: skip
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
CALL = {"type": "tool_use", "id": "t", "name": "add", "input": {}}


def _user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def test_a_whole_conversation_is_read_in_order() -> None:
    call = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "2"}]},
        {"type": "tool_result", "tool_use_id": "t2", "content": "broken", "is_error": True},
        {"type": "tool_result", "tool_use_id": "t3"},
        {"type": "text", "text": "And", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "now?"},
    ]
    thinking = [{"type": "thinking", "thinking": "Hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"}]
    messages = [
        {"role": "user", "content": "1"},
        {"role": "user", "content": [{"type": "text", "text": "2"}]},
        {"role": "assistant", "content": [*thinking, {"type": "text", "text": "A"}, call]},
        {"role": "user", "content": results},
        {"role": "system", "content": "Hurry."},
        {"role": "assistant", "content": "The answer is ("},
    ]
    system = [{"type": "text", "text": "S1"}, {"type": "text", "text": "S2"}]
    generation = parse_messages({**ASK, "system": system, "messages": messages})
    assert generation.messages == (
        Message("system", "S1\nS2\n\nHurry."),
        Message("user", "1\n2"),
        Message("assistant", "A", "Hm", (ToolCall("add", '{"a": 1}', "t1"),)),
        Message("tool", "2", tool_call_id="t1"),
        Message("tool", "Error: broken", tool_call_id="t2"),
        Message("tool", "", tool_call_id="t3"),
        Message("user", "And\nnow?"),
        Message("assistant", "The answer is ("),
    )
    assert generation.continues
    assert not parse_messages({**ASK, "messages": [*messages[:1], {"role": "assistant", "content": ""}]}).continues


def test_settings_become_the_engines() -> None:
    generation = parse_messages(FULL)
    assert generation.sampling == {"fit": True, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "stop": ("END",)}
    assert (generation.max_tokens, generation.stream, generation.user) == (9, True, "u")
    assert (generation.thinking, generation.max_think_tokens) == (True, 2048)
    assert (generation.tool_choice, generation.parallel_tool_calls) == (ToolChoice("named", "add"), False)
    assert generation.tools[0].parameters == TOOL["input_schema"]
    assert generation.response_format == {"type": "json_schema", "schema": {"type": "object"}}
    assert generation.ignored == ("service_tier", "speed", "context_management")


@pytest.mark.parametrize(
    ("changes", "thinking", "wishes"),
    [
        ({}, False, ()),
        ({"thinking": {"type": "disabled"}}, False, ()),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, True, ("thinking",)),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, None, ("thinking",)),
        ({"thinking": {"type": "between_tools"}}, None, ("thinking",)),
        ({"output_config": {"effort": "high"}}, None, ("output_config.effort",)),
        # more than there is room for: the budget then ends nothing
        ({"thinking": {"type": "enabled", "budget_tokens": 31_999}, "max_tokens": 5}, True, ("thinking",)),
    ],
)
def test_thinking_is_asked_for_or_left_out(
    changes: dict[str, Any], thinking: bool | None, wishes: tuple[str, ...]
) -> None:
    generation = parse_messages({**ASK, **changes})
    assert (generation.thinking, generation.thinking_wishes) == (thinking, wishes)


def test_what_a_tool_answered_is_text_and_pictures_are_noted() -> None:
    blocks = [
        {"type": "text", "text": "A"},
        IMAGE,
        {"type": "tool_reference", "tool_name": "add"},
        {"type": "search_result", "source": "https://x", "title": "T", "content": [{"type": "text", "text": "B"}]},
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "C"}, "title": "D"},
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="}},
    ]
    generation = parse_messages({**ASK, **_user({"type": "tool_result", "tool_use_id": "t", "content": blocks})})
    note = "left out, as this model reads text alone]"
    text = f"A\n[image: {note}\nadd\nT\nhttps://x\nB\nD\nC\n[document: {note}"
    assert generation.messages == (Message("tool", text, tool_call_id="t"),)
    assert "messages[].content[].content[].source" in generation.ignored
    said = parse_messages({**ASK, **_user(*blocks[3:5])})
    assert said.messages == (Message("user", "T\nhttps://x\nB\nD\nC"),)


def test_the_system_speaks_before_between_and_behind_the_turns() -> None:
    """As Claude Code has it since 2.1.154: the list of its agents stands behind the user's turn."""
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.c7a; cc_entrypoint=cli;"}
    messages = [*ASK["messages"], {"role": "system", "content": "Agents"}]
    generation = parse_messages({**ASK, "system": [billing, {"type": "text", "text": "S"}], "messages": messages})
    assert generation.messages == (Message("system", "S\n\nAgents"), Message("user", "Hi"))
    assert not generation.continues and "system[].text" in generation.ignored
    split = [*messages, {"role": "user", "content": "Go"}, {"role": "developer", "content": "D"}]
    assert parse_messages({**ASK, "messages": split}).messages == (
        Message("system", "Agents\n\nD"), Message("user", "Hi\nGo")
    )  # fmt: skip


def test_what_others_run_themselves_is_ignored_beside_what_is_had() -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
    generation = parse_messages({**ASK, "tools": [search, TOOL]})
    assert [tool.name for tool in generation.tools] == ["add"] and "tools[0]" in generation.ignored
    asked = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}}
    blocks = [asked, {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}]
    blocks.append({"type": "text", "text": "Found."})
    history = [*ASK["messages"], {"role": "assistant", "content": blocks}, *ASK["messages"]]
    assert parse_messages({**ASK, "messages": history}).messages[1] == Message("assistant", "Found.")


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("auto", ToolChoice("auto")), ("any", ToolChoice("required")), ("none", ToolChoice("none"))],
)
def test_which_tools_are_called_is_chosen(choice: str, expected: ToolChoice) -> None:
    generation = parse_messages({**ASK, "tools": [TOOL], "tool_choice": {"type": choice}})
    assert (generation.tool_choice, generation.parallel_tool_calls) == (expected, True)


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"model": None}, "model", "missing_required_parameter"),
        ({"max_tokens": None}, "max_tokens", "missing_required_parameter"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content", "invalid_value"),
        ({"messages": [*ASK["messages"], {"role": "assistant", "content": [CALL]}]}, "messages[1]", "invalid_messages"),
        (_user(IMAGE), "messages[0].content[0].source", "not_offered"),
        (_user({"type": "server_tool_use", "id": "x"}), "messages[0].content[0].type", "not_offered"),
        (_user({"type": "text"}), "messages[0].content[0].text", "missing_required_parameter"),
        (_user({"type": "text", "text": 1}), "messages[0].content[0].text", "invalid_type"),
        (_user({"text": "x"}), "messages[0].content[0].type", "missing_required_parameter"),
        (_user({"type": "tool_result", "content": "x"}), "messages[0].content[0].tool_use_id",
         "missing_required_parameter"),
        (_user({**IMAGE, "type": "document"}), "messages[0].content[0].source", "not_offered"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "invalid_value"),
        ({"system": [IMAGE]}, "system[0].source", "not_offered"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"stop_sequences": ["x"] * 65}, "stop_sequences", "invalid_value"),
        ({"stop_sequences": [""]}, "stop_sequences[0]", "invalid_value"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type", "invalid_value"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens", "invalid_value"),
        ({"thinking": {"type": "enabled", "budget_tokens": "2048"}}, "thinking.budget_tokens", "invalid_type"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 1.5}}, "thinking.budget_tokens", "invalid_value"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type", "not_offered"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name", "invalid_value"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema", "missing_required_parameter"),
        ({"tool_choice": {"type": "any"}}, "tool_choice.type", "invalid_value"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "sub"}}, "tool_choice.name", "invalid_value"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers", "not_offered"),
        ({"container": "c"}, "container", "not_offered"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type", "invalid_value"),
        # their documentation: structured outputs are incompatible with prefilling
        ({"messages": [*ASK["messages"], {"role": "assistant", "content": "{"}],
          "output_config": {"format": {"type": "json_schema", "schema": {}}}},
         "output_config.format", "invalid_value"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_its_path(changes: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_messages({**ASK, **changes})
    error = caught.value
    assert (error.status, error.param, error.code) == (400, param, code)
    assert error.message.startswith(f"{param}: ") and "\n" not in error.message


@given(
    spoiled(FULL | _user({"type": "text", "text": "Hi"}, {"type": "tool_result", "tool_use_id": "t", "content": []}))
)
@settings(deadline=None, max_examples=300)
def test_whatever_is_sent_is_refused_by_its_path_or_understood(body: dict[str, Any]) -> None:
    try:
        assert parse_messages(body).messages
    except RequestError as error:
        assert error.status == 400 and error.param and error.message.startswith(f"{error.param}: ")

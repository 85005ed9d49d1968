"""A request in the form of OpenAI's Responses is understood, and what cannot be done is refused by its path."""

from __future__ import annotations

from typing import Any

import pytest

from sprat.serve.errors import RequestError
from sprat.serve.generation import ToolChoice
from sprat.serve.openai_responses import parse_responses
from sprat.tokens.chat import Message, ToolCall

ASK: dict[str, Any] = {"model": "m", "input": "Hi"}
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True, "description": "Adds."}
SUB = {"type": "function", "name": "sub", "parameters": None, "strict": None}
PICK = {
    "type": "custom",
    "name": "pick",
    "description": "Picks.",
    "format": {"type": "grammar", "syntax": "regex", "definition": "a|b"},
}
LARK = {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}}
CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a":1}'}
LOGPROBS = ["message.output_text.logprobs", "reasoning.encrypted_content"]


def test_a_whole_conversation_is_read_in_order() -> None:
    items = [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "input_text", "text": "A"}, {"type": "input_text", "text": "B"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "message", "role": "assistant", "id": "m", "status": "completed", "phase": None,
         "content": [{"type": "output_text", "text": "C", "annotations": [], "logprobs": None}]},
        CALL | {"id": "fc_1", "status": "completed"},
        CALL | {"call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "3"}]},
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "Short"}],
         "encrypted_content": "x"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": "reasoning", "id": "rs_3", "summary": []},
        {"role": "assistant", "content": "Or yes."},
        {"role": "user", "content": "E"},
    ]  # fmt: skip
    generation = parse_responses({**ASK, "instructions": "I", "input": items})
    assert generation.messages == (
        Message("system", "I"),
        Message("system", "D"),
        Message("user", "AB"),
        Message("assistant", "C", "Hm", (ToolCall("add", '{"a":1}', "c1"), ToolCall("add", '{"a":1}', "c2"))),
        Message("tool", "2", tool_call_id="c1"),
        Message("tool", "3", tool_call_id="c2"),
        Message("assistant", "No.", "Short"),
        Message("assistant", "Or yes."),
        Message("user", "E"),
    )
    assert not generation.continues


def test_settings_become_the_engines() -> None:
    body = {
        **ASK, "temperature": 0.5, "top_p": 0.9, "max_output_tokens": 7, "seed": 3, "stream": True, "user": "u",
        "include": LOGPROBS, "top_logprobs": 2, "reasoning": {"effort": "low", "summary": "auto"}, "tools": [TOOL, SUB],
        "tool_choice": {"type": "function", "name": "add"}, "parallel_tool_calls": False, "store": True,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        "truncation": "auto", "background": False, "metadata": {"a": "b"}, "service_tier": None, "colour": "blue",
    }  # fmt: skip
    generation = parse_responses(body)
    assert generation.messages == (Message("user", "Hi"),)
    assert generation.sampling == {"temperature": 0.5, "top_p": 0.9, "seed": 3, "top_logprobs": 2}
    assert (generation.max_tokens, generation.stream, generation.user, generation.logprobs) == (7, True, "u", True)
    assert generation.response_format == {"type": "json_schema", "schema": {"type": "object"}}
    assert (generation.tool_choice, generation.parallel_tool_calls) == (ToolChoice("named", "add"), False)
    assert [(tool.name, tool.description, tool.strict) for tool in generation.tools] == [
        ("add", "Adds.", True), ("sub", "", False)
    ]  # fmt: skip
    assert set(generation.ignored) == {
        "store", "truncation", "include", "reasoning.summary", "service_tier", "colour", "tools[].strict",
        "tools[].parameters",
    }  # fmt: skip


def test_tools_of_other_kinds_beside_functions_are_ignored_and_said_to_be() -> None:
    """What Codex lists: functions, and tools that only OpenAI's own server runs."""
    others = [
        {"type": "web_search", "external_web_access": False},
        LARK,
        {"type": "tool_search", "execution": "client"},
        {"type": "local_shell"},
    ]
    generation = parse_responses({**ASK, "tools": [others[0], SUB, *others[1:]], "tool_choice": "required"})
    assert [tool.name for tool in generation.tools] == ["sub"]
    assert [name for name in generation.ignored if name.startswith("tools[") and "[]" not in name] == [
        "tools[0]", "tools[2]", "tools[3]", "tools[4]"
    ]  # fmt: skip


def test_tools_may_come_as_an_item() -> None:
    """As Codex sends them since 0.150: an item beside the messages."""
    added = {"type": "additional_tools", "role": "developer", "tools": [LARK, SUB]}
    generation = parse_responses({**ASK, "input": [added, {"role": "user", "content": "Hi"}], "tools": [TOOL]})
    assert [tool.name for tool in generation.tools] == ["add", "sub"]
    assert generation.messages == (Message("user", "Hi"),) and "input[0].tools[0]" in generation.ignored
    alone = parse_responses(
        {**ASK, "input": [{**added, "tools": added["tools"][:1]}, {"role": "user", "content": "Hi"}]}
    )
    assert not alone.tools


def test_custom_tools_take_a_text_and_are_sent_back_with_it() -> None:
    items = [
        {"role": "user", "content": "Hi"},
        {
            "type": "custom_tool_call",
            "id": "ctc_1",
            "call_id": "c1",
            "name": "pick",
            "input": 'a "b"',
            "status": "completed",
        },
        {"type": "custom_tool_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "Done"}]},
    ]
    generation = parse_responses(
        {**ASK, "input": items, "tools": [TOOL, PICK], "tool_choice": {"type": "custom", "name": "pick"}}
    )
    assert generation.messages[1:] == (
        Message("assistant", "", tool_calls=(ToolCall("pick", '{"input": "a \\"b\\""}', "c1"),)),
        Message("tool", "Done", tool_call_id="c1"),
    )
    assert generation.tool_choice == ToolChoice("named", "pick")
    text = {"type": "string", "pattern": "^(?:a|b)$"}
    assert generation.tools[1].parameters == {
        "type": "object", "properties": {"input": text}, "required": ["input"], "additionalProperties": False
    }  # fmt: skip
    free = parse_responses({**ASK, "tools": [{"type": "custom", "name": "say", "format": {"type": "text"}}]})
    assert (free.tools[0].parameters or {})["properties"] == {"input": {"type": "string"}}


def test_tools_in_namespaces_have_longer_names() -> None:
    """As Codex lists those of an MCP server."""
    space = {"type": "namespace", "name": "mcp__math__", "description": "Math.", "tools": [TOOL, SUB]}
    items = [
        {"role": "user", "content": "Hi"},
        CALL | {"namespace": "mcp__math__"},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
    ]
    generation = parse_responses({**ASK, "input": items, "tools": [space, TOOL]})
    assert [(tool.name, tool.namespace, tool.member) for tool in generation.tools] == [
        ("mcp__math__add", "mcp__math__", "add"), ("mcp__math__sub", "mcp__math__", "sub"), ("add", "", "")
    ]  # fmt: skip
    assert generation.messages[1].tool_calls[0].name == "mcp__math__add"


def test_the_system_may_speak_last_and_what_others_ran_is_ignored() -> None:
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "q"}},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": ""},
        CALL,
        {"type": "function_call_output", "call_id": "c1",
         "output": [{"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "high"}]},
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
    ]  # fmt: skip
    generation = parse_responses({**ASK, "input": items})
    assert [message.role for message in generation.messages] == ["user", "assistant", "tool", "system"]
    assert generation.messages[2].content == "[image: left out, as this model reads text alone]"
    assert {"input[].action", "input[].output[].image_url"} <= set(generation.ignored)


@pytest.mark.parametrize("effort", [None, "none", "minimal", "ultra"])
def test_an_effort_says_how_hard_to_think(effort: str | None) -> None:
    generation = parse_responses({**ASK, "reasoning": {"effort": effort}})
    assert (generation.thinking, generation.effort) == (None, effort or "")


@pytest.mark.parametrize(
    ("choice", "expected", "names"),
    [
        (None, ToolChoice("auto"), ["add", "sub"]),
        ("none", ToolChoice("none"), ["add", "sub"]),
        ("required", ToolChoice("required"), ["add", "sub"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "sub"}]},
         ToolChoice("required"), ["sub"]),
    ],
)  # fmt: skip
def test_which_tools_are_called_is_chosen(choice: Any, expected: ToolChoice, names: list[str]) -> None:
    generation = parse_responses({**ASK, "tools": [TOOL, SUB], "tool_choice": choice})
    assert (generation.tool_choice, [tool.name for tool in generation.tools]) == (expected, names)


@pytest.mark.parametrize(
    ("form", "expected"), [({"type": "text"}, None), ({"type": "json_object"}, {"type": "json_object"})]
)
def test_the_form_of_the_text_is_chosen(form: dict[str, Any], expected: Any) -> None:
    assert parse_responses({**ASK, "text": {"format": form, "verbosity": "low"}}).response_format == expected


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"model": None}, "model", "missing_required_parameter"),
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": ["x"]}, "input[0]", "invalid_type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "not_offered"),
        ({"input": [{"id": "x"}]}, "input[0]", "not_offered"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input[0].type", "not_offered"),
        ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "input[0].type", "not_offered"),
        ({"input": [{"role": "system", "content": "x"}]}, "input", "invalid_value"),
        ({"tools": [LARK]}, "tools[0].format.syntax", "not_offered"),
        ({"tools": [PICK | {"format": {"type": "grammar", "syntax": "peg", "definition": "x"}}]},
         "tools[0].format.syntax", "invalid_value"),
        ({"tools": [PICK | {"format": {"type": "grammar", "syntax": "regex"}}]}, "tools[0].format.definition",
         "missing_required_parameter"),
        ({"tools": [PICK | {"format": {"type": "grammar", "syntax": "regex", "definition": "[a"}}]},
         "tools[0].format.definition", "invalid_value"),
        ({"tools": [PICK | {"format": {"type": "xml"}}]}, "tools[0].format.type", "invalid_value"),
        ({"tools": [PICK, PICK]}, "tools[1].name", "invalid_value"),
        ({"tools": [PICK], "tool_choice": {"type": "function", "name": "pick"}}, "tool_choice.name", "invalid_value"),
        ({"tools": [{"type": "namespace", "name": "mcp"}]}, "tools[0].tools", "missing_required_parameter"),
        ({"tools": [{"type": "namespace", "name": "mcp", "tools": [SUB, SUB]}]}, "tools[0].tools[1].name",
         "invalid_value"),
        ({"input": [{"type": "custom_tool_call", "call_id": "c", "name": "pick"}]}, "input[0].input",
         "missing_required_parameter"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input[0].content[0].type", "not_offered"),
        ({"input": [CALL]}, "input", "invalid_messages"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id",
         "missing_required_parameter"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not_offered"),
        ({"conversation": {"id": "c"}}, "conversation", "not_offered"),
        ({"background": True}, "background", "not_offered"),
        ({"prompt": {"id": "p"}}, "prompt", "not_offered"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "not_offered"),
        ({"input": [CALL | {"arguments": "[1]"}]}, "input[0].arguments", "invalid_value"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "sometimes"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function", "name": "add"}}, "tool_choice.name", "invalid_value"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type", "not_offered"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "invalid_value"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema",
         "missing_required_parameter"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "invalid_value"),
        ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
        ({"truncation": "sometimes"}, "truncation", "invalid_value"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_its_path(changes: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_responses({**ASK, **changes})
    error = caught.value
    assert (error.status, error.param, error.code) == (400, param, code)
    assert error.message.startswith(f"{param}: ") and "\n" not in error.message

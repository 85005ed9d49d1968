"""Conversations with tools that we write ourselves are what the published templates make of them, id for id."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from sprat.tokens import Message, render
from sprat.tokens.chat import ToolCall
from sprat.tokens.tool_render import find_tool_turns, select_tool_format
from tests.parity.test_chat_templates import CHARS, ID, TOOLS, pair, pytestmark  # noqa: F401

FORMS = {  # whose template writes calls: the form of its calls, and whether it is told of the schemas
    "Qwen 2.5": ("hermes", True),
    "Qwen 3": ("hermes", True),
    "QwQ": ("hermes", True),
    "Llama 3.1": ("llama3", True),
    "Llama 3.2": ("llama3", True),
    "DeepSeek V3.1": ("deepseek_v3_1", False),
    "DeepSeek R1 0528": ("deepseek_v3", False),
}
CHOSEN = tuple(FORMS) if os.environ.get("SPRAT_ALL_TEMPLATES") == "1" else ("Qwen 2.5", "DeepSeek V3.1")
ARGUMENTS = ["{}", '{"city": "Köln", "days": [1, {"a": null}]}', '{"a": "}\\n\\"", "b": 1.5}']


def conversation(draw: random.Random, form: str) -> list[Message]:
    """Questions, calls, results and answers in an order that models are taught."""

    def text() -> str:
        return "".join(draw.choices([*CHARS, "{", '"', "a\nb"], k=draw.randrange(1, 8))).strip()

    turns = [Message("system", text())] if draw.random() < 0.5 else []
    for _ in range(draw.randrange(1, 4)):
        turns.append(Message("user", text()))
        for _ in range(draw.randrange(3)):
            count = 1 if form == "llama3" else draw.randrange(1, 4)
            calls = tuple(
                ToolCall(draw.choice(["now", "get_weather"]), draw.choice(ARGUMENTS), ID) for _ in range(count)
            )
            beside = text() if draw.random() < 0.5 else ""
            reasoning = text() if form == "hermes" and draw.random() < 0.5 else None
            turns.append(Message("assistant", beside, reasoning, tool_calls=calls))
            turns += [Message("tool", text(), tool_call_id=ID) for _ in range(count)]
        turns.append(Message("assistant", text()))
    while turns[-1].role == "assistant":
        turns.pop()
    return turns


def their_rows(turns: list[Message], as_text: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for turn in turns:
        row: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.reasoning:
            row["reasoning_content"] = turn.reasoning
        if turn.tool_calls:
            row["tool_calls"] = [
                {"id": ID, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                if as_text
                else {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
                for call in turn.tool_calls
            ]
        rows.append(row)
    return rows


@pytest.mark.skipif(
    os.environ.get("SPRAT_ALL_TEMPLATES") != "1", reason="takes a large vocabulary: SPRAT_ALL_TEMPLATES=1"
)
def test_deepseek_v3_closes_a_single_call_which_its_template_leaves_open(tmp_path: Path) -> None:
    ours, theirs, template = pair("DeepSeek V3", tmp_path)
    call = ToolCall("now", "{}", ID)
    turns = [Message("user", "a"), Message("assistant", "", tool_calls=(call,)), Message("tool", "b", tool_call_id=ID)]
    rows = their_rows(turns, as_text=True)
    rows[1]["content"] = None
    from transformers.utils.chat_template_utils import render_jinja_template

    ((text,), _) = render_jinja_template([rows], chat_template=template, bos_token=theirs.bos_token)
    cut, end = "```<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
    assert end not in text
    assert ours.decode(render(ours, turns)) == text.replace(cut, cut + end)


@pytest.mark.parametrize("name", CHOSEN)
def test_our_own_code_writes_what_the_published_template_writes(name: str, tmp_path: Path) -> None:
    ours, theirs, template = pair(name, tmp_path)
    form, has_schemas = FORMS[name]
    found = find_tool_turns(ours.chat_format, ours.find_template("tool_use"))
    assert found.style is not None and found.tool_format is not None
    assert found.tool_format.name == form and select_tool_format(ours) == found.tool_format
    draw = random.Random(name)
    for number in range(60):
        turns = conversation(draw, form)
        tools = TOOLS if has_schemas and number % 2 else None
        options = {"chat_template": template, "add_generation_prompt": True, "tokenize": True, "return_dict": False}
        rows = their_rows(turns, as_text=form.startswith("deepseek"))
        expected = theirs.apply_chat_template(rows, tools=tools, **options)
        got = render(ours, turns, tools=tools or ())
        assert got == expected, (ours.decode(got), ours.decode(expected))

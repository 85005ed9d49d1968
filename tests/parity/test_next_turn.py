"""A conversation that is gone on with turn by turn is what the published template makes of the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sprat.tokens import Message, render
from sprat.tokens.chat import ToolCall
from sprat.tokens.next_turn import encode_next_turn
from sprat.tokens.tool_render import select_tool_format
from tests.parity.test_chat_templates import ID, TOOLS, pair, pytestmark  # noqa: F401
from tests.parity.test_tool_turns import CHOSEN, FORMS, their_rows


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("is_tool", [False, True])
def test_turn_by_turn_is_what_the_template_writes_at_once(name: str, is_tool: bool, tmp_path: Path) -> None:
    ours, theirs, template = pair(name, tmp_path)
    form, has_schemas = FORMS[name]
    call = ToolCall("now", "{}", ID)
    said = select_tool_format(ours)
    assert said is not None
    told = [Message("tool", "12:00", tool_call_id=ID)] if is_tool else [Message("user", "More?")]
    before = [Message("user", "When?")]
    answer = Message("assistant", "" if is_tool else "Now.", tool_calls=(call,) if is_tool else ())
    tools = TOOLS if has_schemas and is_tool else None
    options = {"chat_template": template, "tokenize": True, "return_dict": False}
    rows = their_rows([*before, answer, *told], as_text=form.startswith("deepseek"))
    expected = theirs.apply_chat_template(rows, tools=tools, add_generation_prompt=True, **options)
    first = render(ours, before, tools=tools or ())
    ids = encode_next_turn(ours, told, calls=answer.tool_calls)
    # What stands between them is the answer, as the model's own family writes it.
    text = said.write([("now", "{}")]) if is_tool else "Now."
    assert expected[-len(ids) :] == ids
    if ours.chat_format.default_thinking:  # the prompt opens a think, of which the template leaves nothing in the past
        return
    assert expected[: len(first)] == first
    middle = expected[len(first) : len(expected) - len(ids)]
    assert ours.decode(middle).removesuffix(ours.chat_format.eos) == text

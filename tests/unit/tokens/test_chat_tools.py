"""Turns that call tools are what the model's own template makes of them, and what the assistant calls is learned."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sprat.errors import DataError
from sprat.tokens import Message, Tokenizer, encode_conversation, render
from sprat.tokens.chat import ToolCall
from tests.byte_fallback import byte_fallback

MARKS = ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|call|>", "<|end|>")
OPENS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
SCHEMAS = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
CALLS = "{% for c in m.tool_calls %}<|call|>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
TEXT_CALLS = "{% for c in m['tool_calls'] %}<|call|>{{ c.function.name + c.function['arguments'] }}{% endfor %}"
TURN = (
    "{{% for m in messages %}}{{% if m.role == 'assistant' %}}<|assistant|>"
    "{{% generation %}}{content}{calls}<|end|>{{% endgeneration %}}"
    "{{% else %}}<|{{{{ m.role }}}}|>{{{{ m.content }}}}<|end|>{{% endif %}}{{% endfor %}}"
)
OBJECTS = SCHEMAS + TURN.format(content="{{ m.content or '' }}", calls=CALLS) + OPENS
TEXTS = SCHEMAS + TURN.format(content="{{ m.content or '' }}", calls=TEXT_CALLS) + OPENS
NONE_ASKED = SCHEMAS + TURN.format(
    content="{% if m.content is not none %}{{ m.content }}{% endif %}",
    calls="{% if m.content is none %}" + CALLS + "{% endif %}",
)
TEMPLATES = {"objects": OBJECTS, "texts": TEXTS, "none beside a call": NONE_ASKED + OPENS}
WITHOUT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}" + OPENS
NAMED = {"bos_token": "<s>", "eos_token": "<|end|>"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = ToolCall("weather", '{"city": "Köln", "days": 3}', "call_1")
TURNS = [
    Message("user", "Will it rain?"),
    Message("assistant", "", tool_calls=(CALL, ToolCall("clock", "{}"))),
    Message("tool", '{"rain": "yes"}', tool_call_id="call_1"),
    Message("tool", "12:00"),
    Message("assistant", "Yes, in Köln."),
    Message("user", "And tomorrow?"),
    Message("assistant", "Perhaps."),
]


def tokenizer_of(template: str | list[dict[str, str]]) -> Tokenizer:
    extra = [{"content": name, "special": True} for name in MARKS]
    return Tokenizer(byte_fallback(*extra), config={**NAMED, "chat_template": template})


def rows_of(turns: list[Message], *, as_text: bool = False, as_none: bool = False) -> list[dict[str, Any]]:
    """The turns as one writes them for transformers."""
    rows = []
    for turn in turns:
        row: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.tool_calls:
            row["content"] = turn.content or (None if as_none else "")
            row["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in turn.tool_calls
            ]
            for call in [] if as_text else row["tool_calls"]:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        rows.append(row)
    return rows


def theirs(ours: Tokenizer, template: str, rows: list[dict[str, Any]], **said: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as Raw

    made = transformers.PreTrainedTokenizerFast(tokenizer_object=Raw.from_str(ours._json), **NAMED)
    if any(row["content"] is None for row in rows):  # which apply_chat_template leaves out before it renders
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, _ = render_jinja_template([rows], chat_template=template, **{**made.special_tokens_map, **said})
        return made(texts[0], add_special_tokens=False)
    return made.apply_chat_template(rows, chat_template=template, tokenize=True, return_dict=True, **said)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [[], TOOLS], ids=["no schemas", "schemas"])
def test_tool_turns_are_what_the_template_writes(name: str, tools: list[dict[str, Any]]) -> None:
    ours, template = tokenizer_of(TEMPLATES[name]), TEMPLATES[name]
    for count in (4, 6):
        rows = rows_of(TURNS[:count], as_text=name == "texts", as_none=name == "none beside a call")
        expected = theirs(ours, template, rows, tools=tools or None, add_generation_prompt=True)["input_ids"]
        assert render(ours, TURNS[:count], tools=tools) == expected
    asked = render(ours, TURNS[:1], tools=TOOLS)
    assert asked == theirs(ours, template, rows_of(TURNS[:1]), tools=TOOLS, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("name", ["objects", "texts"])
def test_calls_are_learned_and_results_are_not(name: str) -> None:
    """The very places that transformers masks by the template's own marks."""
    ours = tokenizer_of(TEMPLATES[name])
    rows = rows_of(TURNS, as_text=name == "texts")
    expected = theirs(ours, TEMPLATES[name], rows, tools=TOOLS, return_assistant_tokens_mask=True)
    ((ids, mask),) = encode_conversation(ours, TURNS, TOOLS)
    assert ids == expected["input_ids"] and mask == expected["assistant_masks"]
    learned = ours.decode([token for token, one in zip(ids, mask, strict=True) if one])
    assert "weather" in learned and "clock" in learned and "rain" not in learned and "12:00" not in learned


def test_a_weight_of_zero_is_context_only() -> None:
    ours = tokenizer_of(OBJECTS)
    turns = [*TURNS[:4], Message("assistant", "Yes, in Köln.", weight=0.0), *TURNS[5:]]
    ((ids, mask),) = encode_conversation(ours, turns, TOOLS)
    learned = ours.decode([token for token, one in zip(ids, mask, strict=True) if one])
    assert "weather" in learned and "Perhaps." in learned and "Yes" not in learned


def test_a_template_of_its_own_for_tools_is_taken() -> None:
    several = [{"name": "default", "template": WITHOUT}, {"name": "tool_use", "template": OBJECTS}]
    asked, single = tokenizer_of(several), tokenizer_of(OBJECTS)
    assert render(asked, TURNS[:4], tools=TOOLS) == render(single, TURNS[:4], tools=TOOLS)
    assert render(asked, TURNS[:1]) == render(tokenizer_of(WITHOUT), TURNS[:1])


REFUSING = OBJECTS + "{% if messages[0].content == 'no' %}{{ raise_exception('Ask properly!') }}{% endif %}"
UNLIKE = OBJECTS.replace("<|assistant|>{% endif %}", "<|assistant|>So: {% endif %}")


@pytest.mark.parametrize(
    ("template", "turns", "tools", "fault"),
    [
        (OBJECTS.removeprefix(SCHEMAS), TURNS[:1], TOOLS, "writes no schemas"),
        (REFUSING, [Message("user", "no"), *TURNS[1:]], [], "refuses this: .*Ask properly!"),
        (OBJECTS, [*TURNS[:2], Message("tool", "x<|end|>")], [], "spells the control token '<\\|end\\|>'"),
        (OBJECTS, [*TURNS[:1], Message("assistant", "", tool_calls=(ToolCall("f", '{"<|user|>": 1}'),))], [], "spells"),
        (OBJECTS, [Message("user", "a\0b\0"), *TURNS[1:3]], [], "holds a NUL"),
        (OBJECTS, [*TURNS[:1], Message("assistant", "", tool_calls=(ToolCall("f", "x"),))], [], "no JSON"),
    ],
)
def test_what_cannot_be_written_is_refused(
    template: str, turns: list[Message], tools: list[dict[str, Any]], fault: str
) -> None:
    with pytest.raises(DataError, match=fault) as refusal:
        render(tokenizer_of(template), turns, tools=tools)
    assert refusal.value.todo


def test_an_answer_that_is_not_asked_for_in_its_own_words_is_not_learned() -> None:
    with pytest.raises(DataError, match="asks for an answer otherwise"):
        encode_conversation(tokenizer_of(UNLIKE), TURNS)

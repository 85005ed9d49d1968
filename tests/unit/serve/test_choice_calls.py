"""What an engine says of one choice, as events: whose text is a call, and what is told of one that was cut."""

from __future__ import annotations

from typing import Any

import pytest

from sprat.serve.choices import Choice
from sprat.serve.engine_client import JobEvent
from sprat.serve.events import ChoiceFinished, CollectedChoice, Collector
from sprat.tokens.tool_formats import DEEPSEEK_V3_1, HERMES, ToolFormat
from sprat.tokens.tool_parser import ToolCallParser

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def said(text: str, tool_format: ToolFormat = HERMES, *, has_form: bool = False, **done: Any) -> CollectedChoice:
    """All that comes of a text, character by character."""
    choice = Choice(0, ToolCallParser(tool_format, ["f"]), lambda token: b"", has_form=has_form)
    collector = Collector(1)
    for character in text:
        for event in choice.push(JobEvent("content", text=character)):
            collector.push(event)
    for event in choice.finish(JobEvent("done", **{"finish_reason": "stop", **done}), ""):
        collector.push(event)
    return collector.choices[0]


@pytest.mark.parametrize("tool_format", [HERMES, DEEPSEEK_V3_1], ids=lambda each: each.name)
def test_a_tag_in_a_string_of_the_form_is_no_call(tool_format: ToolFormat) -> None:
    """DeepSeek's calls have no quotes around the name, so that a string can spell one."""
    text = f' {{"city": "{tool_format.calls[0]}{tool_format.call[0]}f<｜tool▁sep｜>{{}}{tool_format.call[1]}"}}'
    choice = said(text, tool_format, has_form=True)
    assert choice.content == text and not choice.calls
    assert choice.finish == ChoiceFinished(0, "stop")


def test_calls_in_the_place_of_the_form_are_calls() -> None:
    choice = said("\n" + CALL, has_form=True)
    assert [(call.name, call.arguments) for call in choice.calls] == [("f", '{"a": 1}')] and not choice.content.strip()
    assert choice.finish == ChoiceFinished(0, "tool_calls")


@pytest.mark.parametrize("reason", ["stop", "length", "cancelled"])
def test_a_call_is_to_be_made_only_where_it_is_whole(reason: Any) -> None:
    """A stop string may stand in arguments; who reads "tool_calls" makes the call."""
    stop = '"a"' if reason == "stop" else ""
    half = said(CALL[: CALL.index('"a"')], finish_reason=reason, stop=stop)
    assert [call.arguments for call in half.calls] == ["{"]
    assert half.finish is not None
    assert (half.finish.reason, half.finish.stop) == ("length" if reason == "length" else "stop", stop)
    whole = said(CALL + "\n<tool_", finish_reason=reason, stop="call" if reason == "stop" else "")
    assert [call.arguments for call in whole.calls] == ['{"a": 1}'] and not whole.content
    assert whole.finish is not None and (whole.finish.reason == "tool_calls") == (reason == "stop")


def test_a_head_that_was_cut_is_no_content() -> None:
    assert said("Well. " + CALL[:20], finish_reason="length").content == "Well."
    assert said("Well. " + CALL[:20]).content == "Well. " + CALL[:20]  # the model ended it so itself

"""One choice of an answer: calls come out of its text; log-probabilities and the prompt stay where they belong."""

from __future__ import annotations

import pytest

from sprat.serve.choices import Choice
from sprat.serve.engine_client import JobEvent
from sprat.serve.events import ChoiceFinished, Event, TextDelta, ToolCallDelta
from sprat.tokens import tool_formats
from sprat.tokens.tool_parser import ToolCallParser

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def bytes_of(token: int) -> bytes:
    return bytes([token])


def choice_with_tools() -> Choice:
    return Choice(2, ToolCallParser(tool_formats.HERMES, ["f"]), bytes_of)


def heard(choice: Choice, text: str, reason: str = "stop") -> list[Event]:
    """The events of an answer that comes a character at a time."""
    events = [event for char in text for event in choice.push(JobEvent("content", 2, char))]
    return [*events, *choice.finish(JobEvent("done", 2, finish_reason=reason), "")]  # type: ignore[arg-type]


def test_calls_have_an_id_a_name_and_arguments_and_the_answer_ends_with_them() -> None:
    events = heard(choice_with_tools(), f"Let me see.{CALL}{CALL}")
    calls = [event for event in events if isinstance(event, ToolCallDelta)]
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "Let me see."
    assert [call.name for call in calls if call.id] == ["f", "f"] and {call.index for call in calls} == {0, 1}
    assert len({call.id for call in calls if call.id}) == 2
    for index in (0, 1):
        assert "".join(call.arguments for call in calls if call.index == index) == '{"a": 1}'
    assert events[-1] == ChoiceFinished(2, "tool_calls") and {event.choice for event in events} == {2}  # type: ignore[union-attr]


@pytest.mark.parametrize(("text", "reason"), [(CALL[:40], "length"), ("no call", "length"), ("no call", "stop")])
def test_an_answer_that_was_cut_or_has_no_call_does_not_end_with_one(text: str, reason: str) -> None:
    assert heard(choice_with_tools(), text, reason)[-1] == ChoiceFinished(2, reason)  # type: ignore[arg-type]


def test_what_was_held_back_comes_at_the_end() -> None:
    events = heard(choice_with_tools(), "a <tool")
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "a <tool"


def test_only_what_was_cancelled_was_ended_by_somebody() -> None:
    choice = Choice(0, None, bytes_of)
    assert choice.finish(JobEvent("done", finish_reason="cancelled"), "cancel") == [
        ChoiceFinished(0, "stop", "", "cancel")
    ]
    assert choice.finish(JobEvent("done", finish_reason="length"), "cancel") == [ChoiceFinished(0, "length")]


def test_log_probabilities_are_of_bytes_and_stay_in_their_part() -> None:
    choice = choice_with_tools()
    (reasoning,) = choice.push(JobEvent("reasoning", 2, "a", ((97, -1.0, ((98, -2.0),)),)))
    assert isinstance(reasoning, TextDelta) and reasoning.kind == "reasoning"
    (token,) = reasoning.logprobs
    assert (token.token, token.logprob, token.top) == (b"a", -1.0, ((b"b", -2.0),))
    first, *_ = choice.push(JobEvent("content", 2, "<", ((60, -0.5, ()),)))
    assert isinstance(first, TextDelta) and [each.token for each in first.logprobs] == [b"<"], "though its text waits"


def test_the_prompt_is_echoed_once_and_first() -> None:
    for events in (
        (JobEvent("prompt", 0, logprobs=((65, None, ()),)), JobEvent("content", 0, "x")),
        (JobEvent("content", 0, "x"),),
        (),
    ):
        choice = Choice(0, None, bytes_of, "A prompt. ")
        said = [each for event in (*events, JobEvent("content", 0, "y")) for each in choice.push(event)]
        assert "".join(each.text for each in said if isinstance(each, TextDelta)).startswith("A prompt. ")
        assert sum("A prompt" in each.text for each in said if isinstance(each, TextDelta)) == 1
    (echo, end) = Choice(0, None, bytes_of, "A prompt. ").finish(JobEvent("done", finish_reason="length"), "")
    assert echo == TextDelta(0, "content", "A prompt. ") and isinstance(end, ChoiceFinished)

"""People's own examples: each published form gives the turns that it means; what is wrong is named and counted."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.data.conversations import ExampleSet, parse_column_map, read_examples, split_by_hash
from sprat.data.example import Conversation, PreferencePair, Text
from sprat.data.forms import FORMS, parse_example
from sprat.data.record import BadRecord, Where
from sprat.errors import DataError, SpratError
from sprat.tokens.chat import Message, ToolCall

U, A, S = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, "system"
ASK, SAY = Message("user", "Hi"), Message("assistant", "Hello")


def write(folder: Path, rows: Sequence[Any], name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one(folder: Path, row: dict[str, Any], **options: Any) -> Any:
    """The example of a file that holds but one record."""
    (example,) = read_examples(write(folder, [row]), **options).examples
    return example


def turns(*pairs: tuple[str, str], system: str | None = None) -> tuple[Message, ...]:
    """User and assistant by turns."""
    messages = [Message("system", system)] if system else []
    for question, answer in pairs:
        messages += [Message("user", question), Message("assistant", answer)]
    return tuple(messages)


SKY = "What color is the sky?"
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
PAST = {"role": "assistant", "content": "Well"}
OPENAI = [
    {"role": "system", "content": "Marv"},
    U,
    {**A, "weight": 0},
    {"role": "user", "content": "2"},
    {**PAST, "weight": 1},
]
OPENAI_TURNS = (
    Message("system", "Marv"),
    ASK,
    Message("assistant", "Hello", weight=0.0),
    Message("user", "2"),
    Message("assistant", "Well"),
)
TOOL_TURNS = (
    ASK,
    Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "Paris"}', "call_1"),)),
    Message("tool", "22", tool_call_id="call_1"),
    Message("assistant", "22 degrees"),
)
TOOL_MESSAGES = [
    U,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "22"},
    {"role": "assistant", "content": "22 degrees"},
]
SHAREGPT_TOOLS = [
    {"from": "human", "value": "Hi"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
    {"from": "observation", "value": "22"},
    {"from": "gpt", "value": "22 degrees"},
]
SHAREGPT_TOOL_TURNS = (
    ASK,
    Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "Paris"}'),)),
    Message("tool", "22"),
    Message("assistant", "22 degrees"),
)
PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
THINKING = Message("assistant", "4", "2 and 2")

# Rows of the forms as their projects document them, and the turns that they mean.
GOOD: dict[str, tuple[dict[str, Any], tuple[Message, ...]]] = {
    "messages, as TRL and transformers have them": ({"messages": [U, A]}, (ASK, SAY)),
    "OpenAI's fine-tuning, weights": ({"messages": OPENAI}, OPENAI_TURNS),
    "axolotl's train": ({"messages": [U, {**A, "train": False}, U, {**PAST, "train": True}]}, (
        ASK, Message("assistant", "Hello", weight=0.0), ASK, Message("assistant", "Well"))),
    "OpenAI's tools": ({"messages": TOOL_MESSAGES}, TOOL_TURNS),
    "arguments as an object, as transformers has them": (
        {"messages": [U, {"role": "assistant", "tool_calls": [{"type": "function", "function": {
            "name": "weather", "arguments": {"city": "Paris"}}}]}]}, SHAREGPT_TOOL_TURNS[:2]),
    "a function call of before": ({"messages": [U, {"role": "assistant", "content": None, "function_call": {
        "name": "weather", "arguments": '{"city": "Paris"}'}}, {"role": "function", "name": "weather", "content": "22"},
        {"role": "assistant", "content": "22 degrees"}]}, SHAREGPT_TOOL_TURNS),
    "text parts": ({"messages": [{"role": "user", "content": PARTS}, A]}, (ASK, SAY)),
    "developer, as OpenAI now says": ({"messages": [{"role": "developer", "content": "X"}, U, A]}, (
        Message("system", "X"), ASK, SAY)),
    "reasoning_content": ({"messages": [U, {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}]}, (
        ASK, THINKING)),
    "thinking": ({"messages": [U, {"role": "assistant", "content": "4", "thinking": "2 and 2"}]}, (ASK, THINKING)),
    "think tags, as Qwen3's template reads them": ({"messages": [U, {
        "role": "assistant", "content": "<think>\n2 and 2\n</think>\n\n4"}]}, (ASK, THINKING)),
    "think tags around nothing": ({"messages": [U, {"role": "assistant", "content": "<think>\n\n</think>\n\n4"}]}, (
        ASK, Message("assistant", "4"))),
    "an empty system turn": ({"messages": [{"role": "system", "content": " "}, U, A]}, (ASK, SAY)),
    "TRL prompt and completion": ({"prompt": "Hi", "completion": "Hello"}, (ASK, SAY)),
    "TRL conversational prompt and completion": ({"prompt": [U], "completion": [A]}, (ASK, SAY)),
    "a prompt of several turns": ({"prompt": [U, PAST, U], "completion": [A]}, (
        ASK, Message("assistant", "Well", weight=0.0), ASK, SAY)),
    "a label that is true (KTO)": ({"prompt": "Hi", "completion": "Hello", "label": True}, (ASK, SAY)),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello"}, (ASK, SAY)),
    "alpaca with input": ({"instruction": "Add", "input": "1, 2", "output": "3"}, turns(("Add\n1, 2", "3"))),
    "alpaca of LLaMA-Factory": (
        {"instruction": "c", "input": None, "output": "d", "system": "S", "history": [["a", "b"]]},
        turns(("a", "b"), ("c", "d"), system="S")),
    "alpaca with its text beside it": ({"instruction": "Hi", "output": "Hello", "text": "### Hi"}, (ASK, SAY)),
    "sharegpt": ({"id": "x_0", "conversations": [{"from": "human", "value": "Hi"}, {
        "from": "gpt", "value": "Hello"}]}, (ASK, SAY)),
    "sharegpt, a system turn": ({"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "a"}, {
        "from": "gpt", "value": "b"}]}, turns(("a", "b"), system="S")),
    "sharegpt, a system column": ({"system": "S", "conversations": [{"from": "human", "value": "a"}, {
        "from": "gpt", "value": "b"}]}, turns(("a", "b"), system="S")),
    "sharegpt, functions": ({"conversations": SHAREGPT_TOOLS}, SHAREGPT_TOOL_TURNS),
    "question and answer": ({"question": "Hi", "answer": "Hello"}, (ASK, SAY)),
    "question, reasoning and answer": ({"question": "Hi", "reasoning": "2 and 2", "answer": "4"}, (ASK, THINKING)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_published_form_gives_the_turns_that_it_means(tmp_path: Path, name: str) -> None:
    row, expected = GOOD[name]
    example = one(tmp_path, row)
    assert example == Conversation(expected, Where("a.jsonl", 1))


BLUE, GREEN = [{"role": "assistant", "content": "It is blue."}], [{"role": "assistant", "content": "It is green."}]
SKY_TURN = [{"role": "user", "content": SKY}]
PAIRS: dict[str, dict[str, Any]] = {
    "explicit prompt": {"prompt": SKY_TURN, "chosen": BLUE, "rejected": GREEN},
    "implicit prompt": {"chosen": SKY_TURN + BLUE, "rejected": SKY_TURN + GREEN},
    "implicit, a string beside it": {"prompt": SKY, "chosen": SKY_TURN + BLUE, "rejected": SKY_TURN + GREEN},
    "the prompt twice": {"prompt": SKY_TURN, "chosen": SKY_TURN + BLUE, "rejected": SKY_TURN + GREEN},
    "strings": {"prompt": SKY, "chosen": "It is blue.", "rejected": "It is green."},
    "string and turns": {"prompt": SKY, "chosen": BLUE, "rejected": GREEN},
    "with scores and messages, as UltraFeedback": {
        "prompt": SKY, "chosen": SKY_TURN + BLUE, "rejected": SKY_TURN + GREEN, "messages": SKY_TURN + BLUE, "n": 1},
    "transcripts, as Anthropic's": {
        "chosen": f"\n\nHuman: {SKY}\n\nAssistant: It is blue.",
        "rejected": f"\n\nHuman: {SKY}\n\nAssistant: It is green."},
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_preference_pairs_have_the_prompt_that_trl_gives_them(tmp_path: Path, name: str) -> None:
    example = one(tmp_path, PAIRS[name])
    answers = ((Message("assistant", "It is blue."),), (Message("assistant", "It is green."),))
    assert example == PreferencePair((Message("user", SKY),), *answers, Where("a.jsonl", 1))


def test_strings_without_a_prompt_are_parted_as_trl_parts_them(tmp_path: Path) -> None:
    """The example of TRL's page on dataset formats: the blank goes with the answers."""
    pair = one(tmp_path, {"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert [message.content for part in (pair.prompt, pair.chosen, pair.rejected) for message in part] == [
        "The sky is", " blue.", " green.",
    ]  # fmt: skip


def test_a_pair_that_goes_on_from_several_turns(tmp_path: Path) -> None:
    long = SKY_TURN + BLUE + [U]
    pair = one(tmp_path, {"chosen": [*long, A], "rejected": [*long, PAST]})
    asked = (Message("user", SKY), Message("assistant", "It is blue.", weight=0.0), ASK)
    assert (pair.prompt, pair.chosen, pair.rejected) == (asked, (SAY,), (Message("assistant", "Well"),))
    same_start = one(tmp_path, {"prompt": SKY_TURN, "chosen": [*BLUE, U, A], "rejected": [*BLUE, U, PAST]})
    assert same_start.prompt == (Message("user", SKY),), "an explicit prompt stays as it is"
    other_question = {"role": "user", "content": "Why?"}
    parted = one(tmp_path, {"chosen": [*long, A], "rejected": [*SKY_TURN, *BLUE, other_question, A]})
    assert parted.prompt == (Message("user", SKY),), "a prompt ends where the assistant is asked"
    assert [len(parted.chosen), len(parted.rejected)] == [3, 3]


def test_tools_have_no_keys_that_only_other_tools_have(tmp_path: Path) -> None:
    """Parquet gives every tool the keys of all tools; a template would write them all, as nulls."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    city = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}}
    units = {"type": "object", "properties": {"units": {"type": "string"}}, "required": ["units"]}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}}
             for name, schema in (("weather", city), ("scale", units))]  # fmt: skip
    table = arrow.Table.from_pylist([{"messages": [U, A], "tools": tools}])
    assert table.to_pylist()[0]["tools"][0]["function"]["parameters"]["required"] is None
    parquet.write_table(table, tmp_path / "a.parquet")
    (example,) = read_examples(tmp_path / "a.parquet").examples
    assert example.tools == tuple(tools)
    nulls = [{"name": "f", "parameters": {"enum": [None, 1], "required": None}}]
    assert one(tmp_path, {"messages": [U, A], "tools": nulls}).tools == (
        {"name": "f", "parameters": {"enum": [None, 1]}},
    )


def test_texts_and_tools(tmp_path: Path) -> None:
    assert one(tmp_path, {"text": " plain\n", "label": 3}) == Text(" plain\n", Where("a.jsonl", 1))
    tools = [{"type": "function", "function": {"name": "weather"}}]
    for said in (tools, json.dumps(tools)):
        assert one(tmp_path, {"messages": [U, A], "tools": said}).tools == tuple(tools)


THINK_OPEN = {"role": "assistant", "content": "<think>2 and"}
# A record, and what must be said of it: the reason by which it is counted, and of what of it.
AWKWARD: list[tuple[Any, str, str]] = [
    ({"messages": []}, "no list of turns", "messages is empty"),
    ({"messages": None}, "no list of turns", "messages is null"),
    ({"messages": {"role": "user"}}, "no list of turns", "messages is an object"),
    ({"messages": "Hi"}, "no list of turns", "messages is a string"),
    ({"messages": "[oops"}, "no list of turns", "messages is no JSON text"),
    ({"messages": [U, "Hello"]}, "no list of turns", r"messages\[1\] is a string"),
    ({"messages": [U, None]}, "no list of turns", r"messages\[1\] is null"),
    ({"message": [U, A]}, "a column that is missing", "messages"),
    ({"messages": [U]}, "no assistant turn", ""),
    ({"messages": [{"role": S, "content": "x"}]}, "no assistant turn", ""),
    ({"messages": [U, U, A]}, "roles out of order", "turn 2: user after user"),
    ({"messages": [U, A, A]}, "roles out of order", "turn 3: assistant after assistant"),
    ({"messages": [A, U, A]}, "roles out of order", "turn 1: assistant first"),
    ({"messages": [{"role": S, "content": "x"}, A]}, "roles out of order", "turn 2: assistant after system"),
    ({"messages": [U, {"role": S, "content": "x"}, A]}, "roles out of order", "turn 2: system after user"),
    ({"messages": [U, {"role": "tool", "content": "x"}, A]}, "roles out of order", "turn 2: tool after user"),
    ({"messages": TOOL_MESSAGES[:2] + [U, A]}, "roles out of order", "turn 3: user after assistant that calls tools"),
    ({"messages": [U, A, U]}, "a last turn not the assistant's", "user"),
    ({"messages": TOOL_MESSAGES[:3]}, "a last turn not the assistant's", "tool"),
    ({"messages": [U, {"role": "critic", "content": "x"}]}, "an unknown role", r'messages\[1\]: "critic"'),
    ({"messages": [U, {"content": "x"}]}, "an unknown role", r"messages\[1\]: null"),
    ({"messages": [{"role": 1, "content": "x"}, A]}, "an unknown role", r"messages\[0\]: 1"),
    ({"messages": [U, {"role": "assistant", "content": ""}]}, "an empty turn", r"messages\[1\]\.content"),
    ({"messages": [{"role": "user", "content": " \n"}, A]}, "an empty turn", r"messages\[0\]\.content"),
    ({"messages": [{"role": "user", "content": []}, A]}, "an empty turn", r"messages\[0\]\.content"),
    (
        {"messages": [U, {"role": "assistant", "content": "<think>x</think>\n"}]},
        "an empty turn",
        "behind its reasoning",
    ),
    ({"messages": [U, THINK_OPEN]}, "reasoning that is not closed", r"messages\[1\]\.content"),
    (
        {"messages": [U, {"role": "assistant", "content": "<think>x</think>y", "reasoning_content": "z"}]},
        "reasoning both in the content and beside it",
        r"messages\[1\]",
    ),
    ({"messages": [U, {"role": "assistant", "content": None}]}, "a turn without content", r"messages\[1\]"),
    ({"messages": [{"role": "user"}, A]}, "a turn without content", r"messages\[0\]"),
    ({"messages": [{"role": "user", "content": 5}, A]}, "content that is no string", r"\[0\]\.content is a number"),
    ({"messages": [{"role": "user", "content": {"a": 1}}, A]}, "content that is no string", "content is an object"),
    (
        {"messages": [{"role": "user", "content": [*PARTS, {"type": "image_url", "image_url": "x"}]}, A]},
        "content that is no string",
        r'messages\[0\]\.content\[2\] is no text part but "image_url"',
    ),
    ({"messages": [{"role": "user", "content": "\ud83d"}, A]}, "half a surrogate pair", r"messages\[0\]\.content"),
    ({"messages": [U, {**A, "weight": 0.5}]}, "a weight that is not 0 or 1", r"messages\[1\]\.weight"),
    ({"messages": [U, {**A, "train": "yes"}]}, "a weight that is not 0 or 1", r"messages\[1\]\.train"),
    ({"messages": [U, {**A, "weight": 1, "train": False}]}, "a weight that is not 0 or 1", "differ"),
    ({"messages": [U, {**A, "weight": 0}]}, "no turn that is learned", ""),
    ({"messages": [U, {**A, "tool_calls": {"name": "x"}}]}, "tools or tool calls that are none", "is an object"),
    ({"messages": [U, {**A, "tool_calls": [{"function": {}}]}]}, "tools or tool calls that are none", "without a name"),
    (
        {"messages": [U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{oops"}]}]},
        "tools or tool calls that are none",
        "no JSON text",
    ),
    ({"messages": [U, A], "tools": {"name": "f"}}, "tools or tool calls that are none", "tools"),
    (
        {"messages": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f()"}]},
        "tools or tool",
        "no J",
    ),
    ({"messages": [{"role": "user", "content": "first"}, A]}, "what an earlier record says", ""),
    ({"messages": [U, A], "id": 7}, "an id that an earlier record has", "7"),
]


@pytest.mark.parametrize(("row", "reason", "detail"), AWKWARD)
def test_an_awkward_record_is_skipped_and_counted_or_refused(
    tmp_path: Path, row: Any, reason: str, detail: str
) -> None:
    first = {"messages": [{"role": "user", "content": "first"}, A], "id": 7}
    path = write(tmp_path, [first, row, {"messages": [{"role": "user", "content": "last"}, A]}])
    result = read_examples(path)
    assert [example.where.line for example in result.examples] == [1, 3]
    (skipped,) = result.skipped
    assert skipped.why.startswith(f"records: {reason}") and (skipped.count, skipped.names) == (1, ("a.jsonl:2",))
    with pytest.raises(DataError, match=rf"^{reason}.*{detail}.*\(a\.jsonl, line 2\)") as caught:
        read_examples(path, on_bad="refuse")
    assert "\n" not in str(caught.value)


AWKWARD_OF_OTHER_FORMS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}, "an empty turn: prompt"),
    ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}, "a turn without content: completion"),
    ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "a column that is missing: completion"),
    (
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "c", "label": False},
        "a completion whose label",
    ),
    ({"prompt": "a", "completion": "b"}, {"prompt": [U, A], "completion": [A]}, "roles out of order: turn 3"),
    ({"instruction": "a", "output": "b"}, {"instruction": 3, "output": "b"}, "content that is no string: instruction"),
    ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": "c", "history": ["x"]}, "a history that is"),
    (
        {"question": "a", "answer": "b"},
        {"question": "a", "answer": "<think>c</think>"},
        "an empty turn: answer, behind",
    ),
    ({"text": "a"}, {"text": "\t"}, "an empty turn: text"),
    ({"text": "a"}, {"text": ["a", 1]}, "content that is no string"),
    (PAIRS["strings"], {"prompt": "x", "chosen": "a", "rejected": "a"}, "chosen and rejected that are the same"),
    (PAIRS["strings"], {"prompt": "x", "chosen": "a", "rejected": ""}, "an empty turn: rejected"),
    (PAIRS["strings"], {"chosen": "abc", "rejected": "xyz"}, "answers with no prompt in common"),
    (PAIRS["strings"], {"chosen": [U, A], "rejected": [{"role": "user", "content": "x"}, A]}, "answers with no prompt"),
    (PAIRS["strings"], {"prompt": "x", "chosen": [U, A], "rejected": [U]}, "no assistant turn"),
]


@pytest.mark.parametrize(("good", "row", "said"), AWKWARD_OF_OTHER_FORMS)
def test_the_same_rules_hold_for_the_other_forms(
    tmp_path: Path, good: dict[str, Any], row: dict[str, Any], said: str
) -> None:
    path = write(tmp_path, [good, row])
    assert [skipped.names for skipped in read_examples(path).skipped] == [("a.jsonl:2",)]
    with pytest.raises(DataError, match=rf"^{said}.*\(a\.jsonl, line 2\)"):
        read_examples(path, on_bad="refuse")


def test_reasons_are_counted_with_their_first_places_over_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{oops\n{"text": "caf\xe9"}\n{"text": "one"}\n{"text": ""}\n')
    (tmp_path / "b.csv").write_text("text,id\none,1\ntwo,1\nthree,1\n")
    (tmp_path / "c.md").write_text("# text")
    result = read_examples(tmp_path)
    assert [example.where.short for example in result.examples] == ["a.jsonl:1", "b.csv:3"]
    assert {skipped.why.split(" than")[0]: (skipped.count, skipped.names) for skipped in result.skipped} == {
        "files of other kinds": (1, ("c.md",)),
        "records: not JSON": (1, ("a.jsonl:2:2",)),
        "records: not UTF-8": (1, ("a.jsonl:3:14",)),
        "records: what an earlier record says": (2, ("a.jsonl:4", "b.csv:2")),
        "records: an empty turn": (1, ("a.jsonl:5",)),
        "records: an id that an earlier record has": (1, ("b.csv:4",)),
    }
    with pytest.raises(DataError, match=r"not JSON: .*a\.jsonl, line 2, column 2"):
        read_examples(tmp_path, on_bad="refuse")


def test_ids_count_within_a_file_alone(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path, [{"id": 0, "text": name}], f"{name}.jsonl")
    assert len(read_examples(tmp_path).examples) == 2


def test_if_no_record_is_good_it_is_an_error_that_counts_them(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": ""}, {"text": " "}, {"text": 5}])
    with pytest.raises(
        DataError, match=r"no good record: 2 records: an empty turn \(a.jsonl:1, a.jsonl:2\); 1 records: c"
    ):
        read_examples(path)
    (tmp_path / "b.csv").write_text("text\n")
    with pytest.raises(DataError, match=r"no records \(.*b.csv\)"):
        read_examples(tmp_path / "b.csv")


def test_an_unknown_form_names_the_columns_there_are_and_the_forms(tmp_path: Path) -> None:
    path = write(tmp_path, [{"query": "a", "response": "b", "new\nline": 1}])
    with pytest.raises(DataError) as caught:
        read_examples(path)
    said = str(caught.value)
    assert "columns of no known form: new line, query, response (a.jsonl, line 1)" in said and "\n" not in said
    for form in ("messages", "conversations", "prompt + completion", "chosen + rejected", "question + answer", "text"):
        assert form in said
    example = one(
        tmp_path, {"query": "Hi", "response": "Hello"}, column_map={"prompt": "query", "completion": "response"}
    )
    assert example.messages == (ASK, SAY)


def test_a_column_map_renames_before_the_form_is_recognized(tmp_path: Path) -> None:
    row = {"question": "Hi", "answer": "Hello", "prompt": "not this", "text": "nor this"}
    mapped = parse_column_map("prompt=question,completion=answer")
    result = read_examples(write(tmp_path, [row]), column_map=mapped)
    assert result.forms == ("prompt-completion",) and result.ignored_columns == ("text",)
    assert result.of_kind(Conversation)[0].messages == (ASK, SAY)
    both = {"messages": [U, PAST], "q": "Hi", "a": "Hello"}
    assert one(tmp_path, both).messages[1].content == "Well"
    assert one(tmp_path, both, column_map={"question": "q", "answer": "a"}).messages == (ASK, SAY)
    for bad, said in (
        ({"prompt": "nowhere"}, "no column 'nowhere', to be read as 'prompt'.*the columns there are: answer, prompt"),
        ({"promt": "question"}, "no column of a known form: 'promt'.*map one of .*prompt"),
    ):
        with pytest.raises(DataError, match=said):
            read_examples(write(tmp_path, [row]), column_map=bad)
    for text in ("prompt", "=x", "prompt=", "prompt=a,prompt=b", ""):
        with pytest.raises(DataError, match="no column map"):
            parse_column_map(text)
    commas = parse_column_map("prompt=Frage, lang,completion=Antwort, kurz")
    assert commas == {"prompt": "Frage, lang", "completion": "Antwort, kurz"}


def test_conversations_and_pairs_and_texts_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path, [{"messages": [U, A]}])
    write(tmp_path, [{"question": "a", "answer": "b"}], "b.jsonl")
    result = read_examples(tmp_path)
    assert result.forms == ("messages", "question-answer") and len(result.of_kind(Conversation)) == 2
    with pytest.raises(DataError, match=r"conversations where preference pairs are wanted.*messages"):
        result.of_kind(PreferencePair)
    write(tmp_path, [{"text": "a"}], "c.jsonl")
    with pytest.raises(DataError, match=r"conversations \(a.jsonl\) and plain texts \(c.jsonl\) in one folder"):
        read_examples(tmp_path)


def test_the_same_rows_from_every_kind_of_file_are_the_same_examples(tmp_path: Path) -> None:
    wanted = [{"prompt": f"é {number}", "completion": str(number)} for number in range(9)]
    write(tmp_path, wanted, "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps({"data": wanted}))
    with (tmp_path / "a.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="\t")
        writer.writeheader()
        writer.writerows(wanted)
    found = {path.name: read_examples(path).of_kind(Conversation) for path in tmp_path.iterdir()}
    expected = [turns((row["prompt"], row["completion"])) for row in wanted]
    assert {name: [each.messages for each in examples] for name, examples in found.items()} == dict.fromkeys(
        ("a.jsonl", "a.json", "a.tsv"), expected
    )
    assert len(read_examples(tmp_path).examples) == 9, "what says the same is learned once"


def test_parquet_and_tables_hold_turns_too(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"messages": TOOL_MESSAGES}, {"messages": [U, {**A, "weight": 1}]}]  # every key in every turn, mostly null
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_examples(tmp_path / "a.parquet").of_kind(Conversation)
    assert [each.messages for each in found] == [TOOL_TURNS, (ASK, SAY)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(TOOL_MESSAGES)]])
    assert one_of(read_examples(tmp_path / "a.csv")).messages == TOOL_TURNS


def one_of(result: ExampleSet) -> Conversation:
    (example,) = result.of_kind(Conversation)
    return example


def texts(*said: str) -> list[Text]:
    return [Text(each, Where("a.jsonl", line)) for line, each in enumerate(said, start=1)]


def test_a_split_is_by_what_is_said_whatever_order_and_file(tmp_path: Path) -> None:
    examples = texts(*map(str, range(2000)))
    train, validation = split_by_hash(examples, 0.1, seed=1)
    assert sorted(train + validation, key=lambda each: each.where.line) == examples
    assert 150 < len(validation) < 250, "of 2000 at 10 %: 200, and 13 are one standard deviation"
    other = [Text(each.text, Where("b.jsonl", 1)) for each in examples]
    random.Random(0).shuffle(other)
    assert {each.text for each in split_by_hash(other, 0.1, seed=1)[1]} == {each.text for each in validation}
    assert {each.text for each in split_by_hash(other[:1000], 0.1, seed=1)[1]} < {each.text for each in validation}
    assert split_by_hash(examples, 0.1, seed=2)[1] != validation


@given(st.lists(st.sampled_from("abcdefgh"), max_size=12), st.floats(0.001, 0.999), st.integers())
@settings(max_examples=200, deadline=None)
def test_duplicates_never_straddle_and_no_side_is_empty_that_need_not_be(
    said: list[str], fraction: float, seed: int
) -> None:
    train, validation = ({each.text for each in side} for side in split_by_hash(texts(*said), fraction, seed))
    assert train | validation == set(said) and not train & validation
    assert bool(validation) == (len(set(said)) > 1) and bool(train) == bool(said)


def test_what_is_learned_of_it_does_not_move_a_conversation() -> None:
    where = Where("a.jsonl", 1)
    half = Conversation((ASK, SAY, ASK, SAY), where)
    whole = Conversation((ASK, Message("assistant", "Hello", weight=0.0), ASK, SAY), where)
    for seed in range(20):
        side = split_by_hash([half, whole, Conversation((ASK, SAY), where)], 0.5, seed)[0]
        assert (half in side) == (whole in side)
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(DataError, match="a fraction"):
            split_by_hash([half], fraction, 0)


WORDS = ["user", "human", "assistant", "gpt", "tool", "function_call"]
SAID = ["<think>", "<think>x</think>", "[]", "{}", "[[1]]", "text", *WORDS]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(SAID)
TURN_KEYS = ["role", "content", "from", "value", "weight", "train", "tool_calls", "reasoning"]
KEYS = st.sampled_from([*TURN_KEYS, "function", "name", "arguments", "type", "text", "id"])
NESTED = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)
TURN = st.fixed_dictionaries({"role": st.sampled_from(WORDS), "content": st.just("x") | NESTED}, optional={
    "tool_calls": NESTED, "weight": NESTED, "reasoning": SCALARS}) | NESTED  # fmt: skip
VALUES = NESTED | st.lists(TURN, max_size=4)
COLUMNS = sorted({column for form in FORMS for column in form.columns} | {"id", "other"})
ROWS = st.one_of(
    *(st.fixed_dictionaries(dict.fromkeys(form.required, VALUES), optional=dict.fromkeys(form.optional, VALUES))
      for form in FORMS),
    st.dictionaries(st.sampled_from(COLUMNS), NESTED, max_size=6),
)  # fmt: skip


@given(ROWS)
@settings(max_examples=200, deadline=None)
def test_any_json_object_is_an_example_or_is_named(values: dict[str, Any]) -> None:
    for form in FORMS:
        found = parse_example(form, values, Where("a.jsonl", 1))
        assert isinstance(found, Conversation | PreferencePair | Text | BadRecord)
        if isinstance(found, BadRecord):
            assert str(found.error()).isprintable()


@given(st.lists(ROWS | NESTED, max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_jsonl_file_is_read_or_refused_in_one_sentence(tmp_path_factory: Any, rows: list[Any]) -> None:
    path = write(tmp_path_factory.mktemp("json"), rows)
    try:
        result = read_examples(path)
        assert len(result.examples) + sum(skipped.count for skipped in result.skipped) == len(rows)
    except SpratError as error:
        assert "\n" not in str(error)


def test_deep_values_are_named(tmp_path: Path) -> None:
    for depth in (200, 500, 900, 990):
        deep = "[" * depth + "]" * depth
        path = tmp_path / "a.jsonl"
        for row in (f'{{"messages": [], "tools": [{{"a": {deep}}}]}}', f'{{"text": "a", "id": {deep}}}'):
            path.write_text(f"{row}\n".replace("[],", json.dumps([U, A]) + ",", 1))
            try:
                assert len(read_examples(path).examples) == 1
            except DataError as error:
                assert "no good record: 1 records: " in str(error)

"""Calls of tools are read as they come, whole and once, however the answer is cut; what is no call stays content."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.tokens import tool_formats
from sprat.tokens.tool_parser import CallArguments, CallBegin, CallEnd, Content, Piece, ToolCallParser

NAMES = ["get_weather", "now", "f"]
Calls = list[tuple[str, str]]


def hermes(calls: Calls) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>' for name, text in calls)


def deepseek_v3_1(calls: Calls) -> str:
    rows = [f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{text}<｜tool▁call▁end｜>" for name, text in calls]
    return f"<｜tool▁calls▁begin｜>{''.join(rows)}<｜tool▁calls▁end｜>"


def deepseek_v3(calls: Calls) -> str:
    rows = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{text}\n```<｜tool▁call▁end｜>"
        for name, text in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "\n".join(rows) + "<｜tool▁calls▁end｜>"


def llama3(calls: Calls) -> str:
    return "; ".join(f'{{"name": "{name}", "parameters": {text}}}' for name, text in calls)


WRITERS: dict[str, tuple[tool_formats.ToolFormat, Callable[[Calls], str]]] = {
    "hermes": (tool_formats.HERMES, hermes),
    "deepseek_v3_1": (tool_formats.DEEPSEEK_V3_1, deepseek_v3_1),
    "deepseek_v3": (tool_formats.DEEPSEEK_V3, deepseek_v3),
    "llama3": (tool_formats.LLAMA3, llama3),
}
TAGGED = [name for name in WRITERS if name != "llama3"]
TAGS = ["<tool_call>", "</tool_call>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"]
TAGS += ["<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"]

texts = st.lists(st.sampled_from([*TAGS, "{", "}", "[", '"', "\\", "\n", "`", "```", "é", "😀", " a", ","])).map(
    "".join
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
arguments = st.tuples(st.dictionaries(texts, values, max_size=3), st.booleans(), st.sampled_from([None, 1]))
calls_drawn = st.lists(st.tuples(st.sampled_from(NAMES), arguments), min_size=1, max_size=4)


def cut(text: str, positions: Iterable[int]) -> list[str]:
    """``text`` in pieces."""
    marks = sorted({0, len(text), *(position % (len(text) + 1) for position in positions)})
    return [text[start:end] for start, end in zip(marks, marks[1:], strict=False)]


def read(name: str, pieces: Iterable[str], names: list[str] | None = NAMES) -> tuple[str, Calls, list[bool]]:
    """Content, calls, and whether each call ended, after checks of the order of what comes."""
    parser = ToolCallParser(WRITERS[name][0], names)
    found: list[Piece] = []
    for piece in pieces:
        found += parser.push(piece)
    found += parser.close()
    assert parser.close() == []
    content, calls, ended = "", Calls(), list[bool]()
    for piece_found in found:
        if isinstance(piece_found, Content):
            assert piece_found.text and (not ended or ended[-1])
            content += piece_found.text
        elif isinstance(piece_found, CallBegin):
            assert piece_found.index == len(calls) and all(ended)
            calls.append((piece_found.name, ""))
            ended.append(False)
        elif isinstance(piece_found, CallArguments):
            assert piece_found.index == len(calls) - 1 and not ended[-1] and piece_found.text
            calls[-1] = (calls[-1][0], calls[-1][1] + piece_found.text)
        else:
            assert isinstance(piece_found, CallEnd) and piece_found.index == len(calls) - 1 and not ended[-1]
            ended[-1] = True
    assert parser.num_calls == len(calls) and all(ended)
    return content, calls, ended


def written(drawn: list[tuple[str, tuple[dict[str, Any], bool, int | None]]]) -> Calls:
    return [(name, json.dumps(value, ensure_ascii=ascii_, indent=indent)) for name, (value, ascii_, indent) in drawn]


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=60, deadline=None)
@given(drawn=calls_drawn, before=st.sampled_from(["", "Let me see.", "a < b\n\n", "\n"]), cuts=st.lists(st.integers(0)))
def test_calls_come_out_as_they_were_written_however_cut(name: str, drawn: Any, before: str, cuts: list[int]) -> None:
    before = before if name in TAGGED else ""
    calls = written(drawn)
    text = before + WRITERS[name][1](calls) + "\n"
    assert read(name, cut(text, cuts))[:2] == (before.rstrip(), calls)
    assert read(name, text)[:2] == (before.rstrip(), calls)  # character by character


@pytest.mark.parametrize("name", WRITERS)
def test_every_cut_and_every_loss_of_the_end(name: str) -> None:
    calls = [("get_weather", '{"city": "K\\u00f6ln \\"}\\" </tool_call>", "d": [1, {"x": {}}]}'), ("now", "{}")]
    before = "Well.\n" if name in TAGGED else ""
    text = before + WRITERS[name][1](calls)
    for position in range(len(text) + 1):
        assert read(name, [text[:position], text[position:]])[:2] == (before.rstrip(), calls)
        content, some, _ = read(name, [text[:position]])
        whole = read(name, text[:position])
        assert (content, some) == whole[:2]  # what a cut off answer says depends on nothing but its text
        for (called, said), (expected, full) in zip(some, calls, strict=False):
            assert called == expected and full.startswith(said)
        if not some:
            assert content == text[:position]


@pytest.mark.parametrize("name", WRITERS)
def test_the_head_of_a_call_that_was_cut_off_is_no_content(name: str) -> None:
    """Nor is a part of its tag, which may be text of many tokens."""
    calls = [("get_weather", '{"city": "K"}'), ("now", '{"a": {}}')]
    before = "Well." if name in TAGGED else ""
    text = before + ("\n" if before else "") + WRITERS[name][1](calls)
    for position in range(len(before), len(text) + 1):
        parser = ToolCallParser(WRITERS[name][0], NAMES)
        pieces = parser.push(text[:position]) + parser.close(is_cut=True)
        assert "".join(piece.text for piece in pieces if isinstance(piece, Content)) == before
        said = "".join(piece.text for piece in pieces if isinstance(piece, CallArguments))
        begun = said not in ("", calls[0][1], calls[0][1] + calls[1][1])
        assert parser.has_whole_calls == (parser.num_calls > 0 and not begun)


def test_arguments_are_not_held_back() -> None:
    parser = ToolCallParser(tool_formats.HERMES, NAMES)
    assert parser.push('<tool_call>\n{"name": "f", "arguments": {') == [CallBegin(0, "f"), CallArguments(0, "{")]
    for piece in ('"a', '": "</tool_', "call>", "1", '"'):
        assert parser.push(piece) == [CallArguments(0, piece)]
    assert parser.push("}") == [CallArguments(0, "}"), CallEnd(0)]
    assert parser.push("}\n</tool_call>\n") == [] == parser.close()


def test_content_is_held_back_only_where_it_may_open_a_call() -> None:
    parser = ToolCallParser(tool_formats.HERMES, NAMES)
    assert parser.push("a <b> <to") == [Content("a <b>")]
    assert parser.push("p>") == [Content(" <top>")]
    assert parser.push(" \n") == []
    assert parser.close() == [Content(" \n")]


OBJECT = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
MALFORMED = {  # what was written → content, calls
    "a tag in a sentence": ("The tag <tool_call> opens a call.", "The tag <tool_call> opens a call.", []),
    "a closing tag alone": ("a </tool_call> b", "a </tool_call> b", []),
    "no JSON": ("<tool_call>\nnow()\n</tool_call>", "<tool_call>\nnow()\n</tool_call>", []),
    "not an object": ('<tool_call>["f"]</tool_call>', '<tool_call>["f"]</tool_call>', []),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    "an unknown tool": (
        '<tool_call>{"name": "rm", "arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "rm", "arguments": {"a": 1}}</tool_call>',
        [],
    ),
    "an unknown tool, then a known one": (
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>\n' + OBJECT,
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        [("f", '{"a": 1}')],
    ),
    "arguments that are a list": (
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        [],
    ),
    "a number that JSON has not": (
        '<tool_call>{"arguments": {"a": NaN}, "name": "f"}</tool_call>',
        '<tool_call>{"arguments": {"a": NaN}, "name": "f"}</tool_call>',
        [],
    ),
    "cut off in the name": ('<tool_call>\n{"name": "get_w', '<tool_call>\n{"name": "get_w', []),
    "cut off in the arguments": ('<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    "cut off in the closing tag": (OBJECT[:-4], "", [("f", '{"a": 1}')]),
    "no closing tag": ('<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", '{"a": 1}')]),
    "the outer bracket forgotten": (OBJECT.replace("}}", "}"), "", [("f", '{"a": 1}')]),
    "the inner bracket forgotten": (OBJECT.replace("}}", ""), "", [("f", '{"a": 1')]),
    "members in another order": (
        '<tool_call>{"id": 7, "arguments": {"a": "é"}, "name": "f"}</tool_call>',
        "",
        [("f", '{"a": "\\u00e9"}')],
    ),
    "further members": (
        '<tool_call>{"name": "f", "arguments": {}, "id": {"}": "}"}}</tool_call>x',
        "x",
        [("f", "{}")],
    ),
    "arguments as text": ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    "no arguments": ('<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
    "a name with escapes": ('<tool_call>{"name": "n\\u006fw", "arguments": {}}</tool_call>', "", [("now", "{}")]),
    "text between and behind": (f"a\n{OBJECT} b {OBJECT}\n c", "a b\n c", [("f", '{"a": 1}')] * 2),
    "tags in a row": ("<tool_call><tool_call>" + OBJECT, "<tool_call><tool_call>", [("f", '{"a": 1}')]),
    "nothing": ("", "", []),
    "blanks": (" \n", " \n", []),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_no_call_is_content_and_nothing_is_lost(case: str) -> None:
    text, content, calls = MALFORMED[case]
    assert read("hermes", [text])[:2] == (content, calls)
    assert read("hermes", text)[:2] == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "now", "parameters": {}}', "", [("now", "{}")]),
        ('\n{"name": "now", "arguments": {}}\n', "", [("now", "{}")]),
        ('{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}', []),
        ('{"a": 1}\nx', '{"a": 1}\nx', []),
        ('I say {"name": "now", "parameters": {}}', 'I say {"name": "now", "parameters": {}}', []),
        ('{"name": "now", "parameters": {}} x', " x", [("now", "{}")]),
    ],
)
def test_a_call_without_tags_is_the_whole_answer(text: str, content: str, calls: Calls) -> None:
    assert read("llama3", [text])[:2] == read("llama3", text)[:2] == (content, calls)


def test_any_name_is_a_tool_where_none_are_given() -> None:
    text = hermes([("whatever", "{}")])
    assert read("hermes", [text], None)[:2] == ("", [("whatever", "{}")])
    assert read("hermes", [text], [])[:2] == (text, [])


FRAGMENTS = [*TAGS, "{", "}", '"', "\\", "[", "]", "\n", " ", "a", ",", ":", '{"name": "f", "arguments": ', "```", "`"]
FRAGMENTS += [
    '"name"',
    '"f"',
    '"arguments"',
    "<",
    "f<｜tool▁sep｜>",
    "function<｜tool▁sep｜>f\n```json\n",
    "; ",
    "<tool",
]


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=150, deadline=None)
@given(fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=30), cuts=st.lists(st.integers(0), max_size=8))
def test_whatever_is_written_reads_the_same_however_cut(name: str, fragments: list[str], cuts: list[int]) -> None:
    text = "".join(fragments)
    content, calls, _ = read(name, [text])
    assert read(name, cut(text, cuts))[:2] == read(name, text)[:2] == (content, calls)
    if not calls:
        assert content == text


@pytest.mark.parametrize("opening", ['<tool_call>{\\"', '<tool_call>{"a": "', "<tool_call>", " ", "<tool_call>{[", "<"])
def test_time_grows_with_the_text_and_not_with_its_square(opening: str) -> None:
    def seconds(count: int) -> float:
        text, start = opening * count, time.process_time()
        parser = ToolCallParser(tool_formats.HERMES, NAMES)
        for position in range(0, len(text), 64):
            parser.push(text[position : position + 64])
        parser.close()
        return time.process_time() - start

    seconds(200)
    assert seconds(8000) < 40 * max(seconds(1000), 2e-3)


def test_a_long_call_of_random_pieces_streams() -> None:
    draw = random.Random(3)
    value = {f"k{number}": "".join(draw.choices('ab"\\}{é<', k=50)) for number in range(200)}
    text = hermes([("f", json.dumps(value))])
    pieces = cut(text, [draw.randrange(len(text)) for _ in range(900)])
    _, calls, _ = read("hermes", pieces)
    assert json.loads(calls[0][1]) == value

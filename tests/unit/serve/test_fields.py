"""A body is read as it is meant: what is unknown is ignored and listed, what cannot be read is refused by its path."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprat.serve.errors import RequestError
from sprat.serve.fields import MAX_DEPTH, Reader, header_list, parse_json


def refusal(body: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_json(body)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} {"b": 2}', "not valid JSON"),
        (b"[1]", "must be a JSON object, not an array"),
        (b"null", "must be a JSON object, not null"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": [-Infinity]}', "-Infinity is no number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "says 'c' twice"),
        (b'{"a": "\xff"}', "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (rb'{"a": ["x", "\ud800"]}', "a[1]"),
        (rb'{"a": {"\udfff": 1}}', "surrogate"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "levels deep"),
        (b"[" * 100_000, "levels deep"),
        (b'{"a":' * 100_000, "levels deep"),
    ],
)
def test_what_two_readers_would_take_differently_is_refused_in_one_sentence(body: bytes, word: str) -> None:
    error = refusal(body)
    assert word in error.message
    assert "\n" not in error.message and len(error.message) < 300


def test_half_a_surrogate_pair_is_found_where_it_stands() -> None:
    assert refusal(rb'{"messages": [{}, {"content": "a\uD83D"}]}').param == "messages[1].content"


@given(st.dictionaries(st.text(), st.recursive(st.text() | st.booleans() | st.integers(), st.lists), max_size=4))
def test_ordinary_json_is_read_as_it_was_written(body: dict[str, Any]) -> None:
    assert parse_json(json.dumps(body).encode()) == body
    assert parse_json(json.dumps(body, ensure_ascii=False).encode("utf-8-sig")) == body


def test_depth_up_to_the_bound_is_read() -> None:
    levels = MAX_DEPTH - 1
    assert parse_json(b'{"a": ' + b"[" * levels + b"]" * levels + b"}")


@pytest.mark.parametrize(
    ("value", "read", "message"),
    [
        ("x", lambda r: r.number("f", 0, 2), "f: must be a number, not a string"),
        (True, lambda r: r.number("f", 0, 2), "f: must be a number, not a boolean"),
        (2.5, lambda r: r.number("f", 0, 2), "f: must be at least 0 and at most 2"),
        (0, lambda r: r.number("f", 0, 1, above=True), "f: must be more than 0 and at most 1"),
        (10**400, lambda r: r.number("f", 0, 2), "f: must be at least 0 and at most 2"),
        (1.5, lambda r: r.integer("f", 0), "f: must be a whole number"),
        (-1, lambda r: r.integer("f", 0), "f: must be at least 0"),
        (2**63, lambda r: r.integer("f", 0), f"f: must be at least 0 and at most {2**63 - 1}"),
        (1e300, lambda r: r.integer("f", 0), f"f: must be at least 0 and at most {2**63 - 1}"),
        (1, lambda r: r.flag("f"), "f: must be true or false, not a number"),
        (1, lambda r: r.text("f"), "f: must be a string, not a number"),
        ("abc", lambda r: r.text("f", longest=2), "f: must have at most 2 characters, not 3"),
        ("c", lambda r: r.choice("f", ("a", "b")), "f: must be one of 'a', 'b', not 'c'"),
        ({}, lambda r: r.items("f"), "f: must be an array, not an object"),
        (["a"] * 10_000, lambda r: r.texts("f", most=16, longest=9), "f: must have at most 16 items, not 10000"),
        (["a", ""], lambda r: r.texts("f", most=16, longest=9), "f[1]: must have 1 to 9 characters, not 0"),
        (["a", 1], lambda r: r.texts("f", most=16, longest=9), "f[1]: must be a string, not a number"),
        ([], lambda r: r.object("f"), "f: must be an object, not an array"),
        ([{}, 1], lambda r: r.objects("f"), "f[1]: must be an object, not a number"),
        (None, lambda r: r.required("f", r.text("f")), "f: is missing"),
        ([{"g": 1}], lambda r: r.objects("f")[0].text("g"), "f[0].g: must be a string, not a number"),
    ],
)
def test_a_wrong_value_is_refused_by_its_path(value: Any, read: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(Reader({"f": value}))
    assert (caught.value.status, caught.value.message) == (400, message)
    assert caught.value.param == message.split(": ")[0]


def test_right_values_are_read() -> None:
    body = Reader({"t": "x", "n": 1, "i": 3.0, "f": False, "c": "a", "s": "stop", "l": ["x", "y"], "o": {"k": 1}})
    assert (body.text("t"), body.number("n", 0, 2), body.integer("i", 0, 9)) == ("x", 1.0, 3)
    assert (body.flag("f"), body.choice("c", ("a",)), body.mapping("o")) == (False, "a", {"k": 1})
    assert body.texts("s", most=1, longest=9) == ("stop",)
    assert body.texts("l", most=2, longest=9) == ("x", "y")
    assert body.rest() == ()


def test_what_was_not_read_and_nulls_are_listed_once() -> None:
    messages = [{"role": "user", "name": "A", "refusal": None}, {"role": "user", "name": "B"}]
    body = Reader({"model": "m", "seed": None, "x": 1, "messages": messages, "thinking": {"type": "on", "y": 1}})
    assert (body.text("model"), body.integer("seed", 0)) == ("m", None)
    for message in body.objects("messages") or ():
        message.text("role")
    assert (body.object("thinking") or body).text("type") == "on"
    assert (body.object("thinking") or body).raw("type") == "on"
    assert body.rest() == ("seed", "x", "messages[].name", "messages[].refusal", "thinking.y")


@given(st.lists(st.text(min_size=1, max_size=30), max_size=60))
def test_a_list_of_names_is_always_a_header_that_can_be_sent(names: list[str]) -> None:
    value = header_list(names, 200)
    assert value.isascii() and value.isprintable() and len(value) <= 200
    assert value.endswith("...") or len(value.split(", ")) == max(1, len(names))

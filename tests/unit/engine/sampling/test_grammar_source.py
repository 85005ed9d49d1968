"""A form means what its standard says: ECMA-262 for patterns, JSON's own numbers for bounds and values."""

from __future__ import annotations

import json
import shutil
import subprocess
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from sprat.engine.sampling.grammar_source import translate_source
from sprat.engine.sampling.grammar_worker import build_matcher, build_tokenizer
from sprat.engine.sampling_params import Response
from sprat.errors import EngineError

SEGMENTED = "\U0001fbf8"  # SEGMENTED DIGIT EIGHT, a digit of Unicode
TEXTS = (
    "", "8", "88", SEGMENTED, "٣", "a", "Z", "_", "é", "ſ", "\u212a", " ", "\t", "\n", "\r", "\x0b", "\u00a0", "\u1680",
    "\u180e", "\u2003", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\ufeff", "\u0085", "\x01", "\x08", "\x00",
    "-", "&", "~", "[", "]", "^", "/", ".", "\\", "$", "A", "b", "c", "😀", "a-c", "a&b", "{", "x",
)  # fmt: skip
# For each pattern the TEXTS it matches, text i as bit i, as Node 20 (V8) says with the flag ``u``.
PATTERNS = {
    r"^\d$": 0x2,
    r"^\d+$": 0x6,
    r"^[\d]$": 0x2,
    r"^\D$": 0xCFFFFFFFFFF8,
    r"^[^\d]$": 0xCFFFFFFFFFF8,
    r"^[\D]$": 0xCFFFFFFFFFF8,
    r"^\w$": 0x8700000000E2,
    r"^\W$": 0x48FFFFFFFF18,
    r"^[^\w\s]$": 0x48FFFC040718,
    r"^\s$": 0x3FBF800,
    r"^[\s]$": 0x3FBF800,
    r"^\S$": 0xCFFFFC0407FA,
    r"^[\S]$": 0xCFFFFC0407FA,
    r"^.$": 0xCFFFFFCF9FFA,
    r"^[.]$": 0x2000000000,
    r"^[a-c]$": 0x60000000020,
    r"^[\w-]$": 0x8700400000E2,
    r"^[-a]$": 0x40000020,
    r"^[&~]$": 0x180000000,
    r"^[a&&b]$": 0x20080000020,
    r"^[a~~b]$": 0x20100000020,
    r"^[[]$": 0x200000000,
    r"^[\]\[]$": 0x600000000,
    r"^[\^a]$": 0x800000020,
    r"^[^]$": 0xCFFFFFFFFFFA,
    r"^[\b]$": 0x10000000,
    r"^\cA$": 0x8000000,
    r"^\0$": 0x20000000,
    r"^\u0041$": 0x10000000000,
    r"^\u{1F600}$": 0x80000000000,
    r"^\ud83d\ude00$": 0x80000000000,
    r"^[\ud83d\ude00é]$": 0x80000000100,
    r"^\x41$": 0x10000000000,
    r"^\/$": 0x1000000000,
    r"^[\/]$": 0x1000000000,
    r"^[\u0041-\u{5A}]$": 0x10000000040,
    r"^\.$": 0x2000000000,
    r"^\\$": 0x4000000000,
    r"^\$$": 0x8000000000,
    r"^[\\$.]$": 0xE000000000,
    r"^\t|\n$": 0x3000,
    r"^[\t-\r]$": 0xF000,
    r"^\p{Nd}$": 0x1A,
    r"^\p{L}$": 0x870000000760,
    r"^[\p{Lu}\d]$": 0x10000000442,
    r"^(?:a|\d)$": 0x22,
    r"^(?<y>\w)$": 0x8700000000E2,
    r"8": 0x6,
    r"^a": 0x300000000020,
    r"^[a\-c]+$": 0x140040000020,
    r"^\{$": 0x400000000000,
    r"^a.c$": 0x100000000000,
    r"^[A-Z-a]$": 0x10040000060,
    r"^[b-c-]$": 0x60040000000,
}
NODE = """const [patterns, texts] = JSON.parse(require("fs").readFileSync(0));
console.log(JSON.stringify(patterns.map((p) => texts.map((t) => new RegExp(p, "u").test(t)))));"""


@pytest.fixture(scope="module")
def words() -> LLTokenizer:
    """A vocabulary of the 256 bytes."""
    return build_tokenizer([bytes([byte]) for byte in range(256)] + [b""], [256])


def accepts(words: LLTokenizer, response: Response, text: str) -> bool:
    """Whether an answer may be ``text``."""
    found = build_matcher(words, response.kind, translate_source(response))
    spelled = list(text.encode())
    return found.try_consume_tokens(spelled) == len(spelled) and found.is_accepting()


def quoted(text: str) -> str:
    """A string of JSON."""
    return json.dumps(text, ensure_ascii=False)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_of_a_schema_matches_what_javascript_matches(words: LLTokenizer, pattern: str) -> None:
    right = {text for index, text in enumerate(TEXTS) if PATTERNS[pattern] >> index & 1}
    as_value = Response.json({"type": "string", "pattern": pattern})
    assert {text for text in TEXTS if accepts(words, as_value, quoted(text))} == right
    as_name = Response.json(
        {"type": "object", "patternProperties": {pattern: {"type": "null"}}, "additionalProperties": False}
    )
    some = [*sorted(right)[:2], *sorted(set(TEXTS) - right)[:2]]
    assert {text for text in some if accepts(words, as_name, f"{{{quoted(text)}:null}}")} == right & set(some)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_table_is_what_node_says() -> None:
    asked = json.dumps([list(PATTERNS), TEXTS])
    said = subprocess.run(["node", "-e", NODE], input=asked, capture_output=True, text=True, check=True).stdout
    rows = [sum(match << index for index, match in enumerate(row)) for row in json.loads(said)]
    assert dict(zip(PATTERNS, rows, strict=True)) == PATTERNS


@pytest.mark.parametrize("pattern", [r"\d{4}-\d\d", r"[\d]{4}-[^\D][\d]", r"[a\d]{4}-(?:\d\d)"])
def test_a_date_in_foreign_digits_is_no_date(words: LLTokenizer, pattern: str) -> None:
    year = "2024-05"
    assert accepts(words, Response.regex(pattern), year)
    assert accepts(words, Response.json({"type": "string", "pattern": f"^{pattern}$"}), quoted(year))
    for zero in ("\U0001fbf0", "٠", "０", "𝟎"):
        foreign = "".join(chr(ord(zero) + int(digit)) if digit.isdecimal() else digit for digit in year)
        assert foreign.replace("-", "").isdecimal()
        assert not accepts(words, Response.regex(pattern), foreign)
        assert not accepts(words, Response.json({"type": "string", "pattern": f"^{pattern}$"}), quoted(foreign))


SINGLES = "8٣aé- \t\ufeff\u2028\x85&"


@pytest.mark.parametrize(
    ("pattern", "right"),
    [
        (r"\d", "8"), (r"\D", "٣aé- \t\ufeff\u2028\x85&"), (r"\w", "8a"), (r"\W", "٣é- \t\ufeff\u2028\x85&"),
        (r"\s", " \t\ufeff\u2028"), (r"\S", "8٣aé-\x85&"), (r"[\d\s]", "8 \t\ufeff\u2028"), (r"[^\w\s]", "٣é-\x85&"),
        (r"\\d", ""), (r"[\\d]", ""), (r"(?:\d|é)", "8é"), (r"\p{Nd}", "8٣"), (r"[\d&&8]", "8"),
    ],
)  # fmt: skip
def test_shorthands_of_a_regex_are_those_of_javascript_and_the_rest_is_rusts(
    words: LLTokenizer, pattern: str, right: str
) -> None:
    assert {text for text in SINGLES if accepts(words, Response.regex(pattern), text)} == set(right)


@pytest.mark.parametrize(
    "pattern", [r"\A", r"a\z", r"\Q", r"\x{41}", r"[a", "a\\", r"\ud800", r"\u{110000}", r"[\1]", r"\00"]
)
def test_a_pattern_that_means_something_else_or_nothing_is_refused_by_name(pattern: str) -> None:
    with pytest.raises(EngineError, match="the schema cannot be used: .*(escape|class|backslash|character)"):
        translate_source(Response.json({"type": "string", "pattern": pattern}))


def test_what_only_looks_like_a_pattern_or_a_bound_is_left_alone() -> None:
    data = {"pattern": r"\d", "minimum": [r"\d"]}
    schema = {
        "properties": {"pattern": {"const": data, "default": 10**30}, "minimum": {"enum": [data]}},
        "examples": [10**40, data],
        "required": ["pattern"],
    }
    assert json.loads(translate_source(Response.json(schema))) == schema


BOUNDS = st.one_of(
    st.integers(1 - 2**53, 2**53 - 1),
    st.integers(-1000, 1000),
    st.sampled_from([2**53 - 1, 1 - 2**53, 10**15, 2**31, 2**32]),
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "const"]), BOUNDS)
def test_an_integer_bound_that_is_taken_is_exact(words: LLTokenizer, key: str, bound: int) -> None:
    check = {
        "minimum": int.__ge__, "maximum": int.__le__, "exclusiveMinimum": int.__gt__, "exclusiveMaximum": int.__lt__,
        "const": int.__eq__,
    }[key]  # fmt: skip
    response = Response.json({"type": "integer", key: bound})
    for value in (bound - 1, bound, bound + 1, -bound, bound * 10, bound // 10):
        assert accepts(words, response, str(value)) == check(value, bound), (value, bound)


def test_a_bound_that_floats_cannot_count_from_is_refused() -> None:
    for bound in (2**53, -(2**53), 10**22):
        with pytest.raises(EngineError, match="exclusiveMinimum: .* is not exact"):
            translate_source(Response.json({"type": "integer", "exclusiveMinimum": bound}))
    translate_source(Response.json({"const": 10**22}))


@pytest.mark.parametrize("number", [2**53 + 1, -(2**53) - 1, 2**60, 2**63 - 1, 2**64 + 1, 2**70, 10**30 + 1, 10**400])
@pytest.mark.parametrize(
    "key", ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "const", "enum", "nested"]
)
def test_an_integer_that_no_float_holds_is_refused_by_name(key: str, number: int) -> None:
    place: dict[str, Any] = {"enum": {"enum": [1, number]}, "nested": {"const": {"a": [number]}}}
    schema = {"anyOf": [{"properties": {"x": place.get(key, {key: number})}}]}
    named = key if key != "nested" else "const"
    with pytest.raises(EngineError, match=f"{named}: {str(number)[:40]} is not exact"):
        translate_source(Response.json(schema))


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("0.1", True), ("1e3", True), ("1E-7", True), ("1.50", True), ("-0.0", True), ("1e22", True), ("1e400", False),
        ("0.1000000000000000055511151231257827", False), ("9007199254740993.0", False), ("9.007199254740993e15", False),
        ("1e-400", False), ("123456789.123456789123", False), ("NaN", False), ("Infinity", False), ("-Infinity", False),
    ],
)  # fmt: skip
def test_a_decimal_is_exact_or_refused(words: LLTokenizer, text: str, taken: bool) -> None:
    for key in ("const", "maximum"):
        response = Response("schema", f'{{"type": "number", "{key}": {text}}}')
        if not taken:
            with pytest.raises(EngineError, match="not exact|no number of JSON"):
                translate_source(response)
        elif key == "maximum" and abs(Decimal(text)) < 10**6:
            value = format(Decimal(text).normalize() + 0, "f")
            assert accepts(words, response, value)
            more = Decimal(text) + Decimal("1e-12")
            assert not accepts(words, response, format(more, "f"))


@pytest.mark.parametrize(
    "schema",
    [
        {"exclusiveMinimum": 0, "maximum": 0.5}, {"exclusiveMinimum": 1, "exclusiveMaximum": 1.5},
        {"minimum": -0.5, "exclusiveMaximum": 0}, {"allOf": [{"exclusiveMinimum": 0}, {"maximum": 0.25}]},
        {"maximum": 0.5, "anyOf": [{"exclusiveMinimum": 0}]},
    ],
)  # fmt: skip
def test_an_exclusive_bound_that_would_let_itself_in_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="exclusiveM.*cannot be kept out"):
        translate_source(Response.json({"type": "number", **schema}))


@pytest.mark.parametrize("low", ["0", "-1", "0.5", "-0.05", "2"])
@pytest.mark.parametrize("width", ["0.05", "0.5", "1", "1.5", "10"])
@pytest.mark.parametrize("keys", ["minimum maximum", "exclusiveMinimum maximum", "exclusiveMinimum exclusiveMaximum"])
def test_a_number_outside_of_two_bounds_is_never_taken(words: LLTokenizer, low: str, width: str, keys: str) -> None:
    bounds = [Decimal(low), Decimal(low) + Decimal(width)]
    names = keys.split()
    schema = {"type": "number"} | {name: float(bound) for name, bound in zip(names, bounds, strict=True)}
    try:
        translate_source(Response.json(schema))
    except EngineError:
        return
    outside = [bounds[0] - Decimal("0.01"), bounds[1] + Decimal("0.01")]
    outside += [bound for name, bound in zip(names, bounds, strict=True) if name.startswith("exclusive")]
    for value in outside:
        for text in {str(value), str(value.normalize() + 0), f"{value:.3f}"}:
            assert not accepts(words, Response.json(schema), text), (schema, text)


LOW, HIGH = {"type": "number", "exclusiveMinimum": 0}, {"maximum": 0.5}
A_LOW, A_HIGH = {"type": "object", "required": ["a"], "properties": {"a": LOW}}, {"properties": {"a": HIGH}}
# Each says, in one way or another, that a value is above 0 and at most 0.5.
JOINED: dict[str, dict[str, Any]] = {
    "beside a reference": {"$defs": {"x": LOW}, "$ref": "#/$defs/x", **HIGH},
    "in a property": {"$defs": {"x": LOW}, "properties": {"a": {"$ref": "#/$defs/x", **HIGH}}, "required": ["a"]},
    "a chain": {"$defs": {"x": {"$ref": "#/$defs/y", **HIGH}, "y": LOW}, "$ref": "#/$defs/x"},
    "two references": {"$defs": {"x": LOW, "y": HIGH}, "allOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}]},
    "a choice": {"$defs": {"x": LOW}, **HIGH, "oneOf": [{"$ref": "#/$defs/x"}]},
    "a circle": {"$defs": {"x": {"allOf": [LOW], "anyOf": [{"$ref": "#/$defs/x"}, HIGH]}}, "$ref": "#/$defs/x"},
    "an escaped name": {"$defs": {"a/b~c %": LOW}, "$ref": "#/$defs/a~1b~0c%20%25", **HIGH},
    "a property twice": {"allOf": [A_LOW, A_HIGH]},
    "a property beside a reference": {"$defs": {"x": A_LOW}, "$ref": "#/$defs/x", **A_HIGH},
    "a property in a choice": {**A_LOW, "anyOf": [A_HIGH, {"properties": {"a": {"maximum": 9}}}]},
    "any other property": {"allOf": [A_LOW, {"additionalProperties": HIGH}]},
    "a pattern of names": {**A_LOW, "patternProperties": {"^a": HIGH}},
    "items twice": {"type": "array", "allOf": [{"items": LOW}, {"items": HIGH}]},
    "an item of its own": {"type": "array", "allOf": [{"prefixItems": [LOW]}, {"items": HIGH}]},
}


@pytest.mark.parametrize("name", JOINED)
def test_bounds_are_joined_wherever_they_stand(words: LLTokenizer, name: str) -> None:
    with pytest.raises(EngineError, match="exclusiveMinimum: 0 cannot be kept out beside the bound 0.5"):
        translate_source(Response.json(JOINED[name]))


TREE = {"type": "object", "properties": {"v": LOW, "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}}}
KINDS = [{**A_LOW, "required": ["low"]}, {**A_HIGH, "required": ["high"]}]


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"$defs": {"x": LOW}, "$ref": "#/$defs/x", "maximum": 7}, ["1", "7"], ["0", "7.5"]),
        ({"$defs": {"x": {**LOW, "type": "integer"}}, "$ref": "#/$defs/x", "maximum": 0.5}, [], ["0", "0.5", "1"]),
        ({"$defs": {"x": {"type": "number"}}, "$ref": "#/$defs/x", "minimum": 5}, ["5", "5.5"], ["4", "4.9"]),
        ({"$defs": {"tree": TREE}, "$ref": "#/$defs/tree"}, ['{"v":1,"next":{"v":2}}'], ['{"v":1,"next":{"v":0}}']),
        ({"properties": {"a": LOW, "b": {**HIGH, "type": "number"}}}, ['{"a":1,"b":0}'], ['{"a":0}', '{"b":1}']),
        ({"properties": {"a": LOW}, "patternProperties": {"^b": HIGH}}, ['{"a":1,"b":0}'], ['{"a":0}', '{"b":1}']),
        ({"$defs": {"x": {"$ref": "#/$defs/x"}}, "anyOf": [{"$ref": "#/$defs/x"}, LOW]}, ["1"], ["0"]),
    ],
)
def test_what_refers_and_can_be_held_is_held(
    words: LLTokenizer, schema: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    translate_source(Response.json(schema))
    for text in right:
        assert accepts(words, Response.json(schema), text)
    for text in wrong:
        try:
            assert not accepts(words, Response.json(schema), text)
        except ValueError as error:
            assert "no integer" in str(error)  # llguidance's own refusal


def test_branches_of_one_choice_do_not_hold_together() -> None:
    schema = {"anyOf": [{"properties": {"a": LOW}}, {"properties": {"a": HIGH}}]}
    assert json.loads(translate_source(Response.json(schema))) == schema


@pytest.mark.parametrize(
    "schema",
    [
        {"examples": [{"type": "string", "pattern": r"^\d$"}], "$ref": "#/examples/0"},
        {"$defs": {"c": {"const": LOW}}, "$ref": "#/$defs/c/const"},
        {"x": {"minimum": {"pattern": r"^\d$"}}, "$ref": "#/x/minimum"},
        {"$defs": {"x": {"$anchor": "foo", **LOW}}, "$ref": "#foo", **HIGH},
        {"$id": "http://e/a", "$defs": {"x": LOW}, "$ref": "http://e/a#/$defs/x", **HIGH},
        {"$defs": {"b": {"$id": "http://e/b", "$defs": {"x": LOW}, "$ref": "#/$defs/x"}}, "$ref": "#/$defs/b"},
        {"$ref": "#/$defs"}, {"$ref": "#/$defs/none"}, {"$ref": 5}, {"$ref": "http://e/x"},
    ],
)  # fmt: skip
def test_a_reference_to_what_was_not_read_is_refused_by_name(schema: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match=r"the schema cannot be used: \$(ref|id)"):
        translate_source(Response.json(schema))


@pytest.mark.parametrize(
    "wide",
    [
        {"allOf": [{}] * 2000, "anyOf": [{"allOf": [{}]}] * 2000},
        {"allOf": [{}] * 2000, "properties": {str(number): {} for number in range(2000)}},
        {
            "properties": {str(number): {} for number in range(2000)},
            "patternProperties": {str(number): {} for number in range(2000)},
        },
    ],
    ids=["branches", "properties", "patterns"],
)
def test_a_schema_of_many_parts_is_refused_soon(wide: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="too many of its parts"):
        translate_source(Response.json(wide))


def test_a_pattern_that_never_ends_is_not_tried_on_a_name() -> None:
    schema = {"properties": {"a" * 60 + "b": LOW}, "patternProperties": {"^(a+)+$": {"type": "string"}}}
    assert json.loads(translate_source(Response.json(schema))) == schema

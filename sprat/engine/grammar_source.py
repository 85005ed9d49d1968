r"""What a caller writes as a form, made into what llguidance understands in the same way, or refused by name.

*Bounds.* Long, deep and wide sources are refused before anything reads them.

*Patterns.* JSON schemas write them in ECMA-262 (with the ``u`` flag), llguidance reads Rust's syntax. ``\d`` is
``[0-9]`` in the one and every digit of Unicode in the other, ``\s`` and ``.`` differ in single characters, and
``[a&&b]``, ``\cA`` or ``\u0041`` mean something else or nothing. ``ecma`` says each in Rust's words. A regex that
stands alone is in Rust's syntax, but its ``\d``, ``\w`` and ``\s`` are those of ECMA-262 as well.

*Numbers.* llguidance holds them as 64-bit floats. A bound or a value that such a float, or its shortest decimal form,
does not hold exactly would be another one, so it is refused; so is a bound of 2^53 and more, from which a float cannot
count by one. An exclusive bound that is whole lets itself in where the other bound is less than one away (llguidance
1.9 takes 0 for ``exclusiveMinimum: 0, maximum: 0.5``), so such a pair is refused as well.
"""

from __future__ import annotations

import itertools
import json
import re
from decimal import Decimal
from typing import Any

from sprat.engine.sampling import Response
from sprat.errors import EngineError

MAX_SOURCE, MAX_DEPTH, MAX_NODES = 64 * 1024, 32, 8192

SPACES = r"\t\n\x0B\f\r \x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}\x{FEFF}"
SHORTHANDS = {"d": "0-9", "w": "0-9A-Za-z_", "s": SPACES}  # ECMA-262, section 22.2.2.9
DOT = r"[^\n\r\x{2028}\x{2029}]"
CONTROLS = {"t": r"\t", "n": r"\n", "v": r"\x0B", "f": r"\f", "r": r"\r", "0": r"\x00"}
SYNTAX = frozenset("^$\\.*+?()[]{}|/")
# One escape; two that make a pair of surrogates are one.
ESCAPE = re.compile(
    r"\\(?:u(?P<high>[dD][89abAB][0-9a-fA-F]{2})\\u(?P<low>[dD][c-fC-F][0-9a-fA-F]{2})|u(?P<four>[0-9a-fA-F]{4})"
    r"|u\{(?P<braced>[0-9a-fA-F]{1,6})\}|x(?P<two>[0-9a-fA-F]{2})|c(?P<control>[A-Za-z])|(?P<property>[pP]\{[^}]*\})"
    r"|(?P<short>[dDwWsS])|(?P<other>.))",
    re.DOTALL,
)
WIDE = re.compile(r"\\[dDwWsSpP]|\]|$")  # in a class, what cannot be an end of a range

NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
VALUES = ("const", "enum")
NOTES = ("default", "examples", "description", "title", "$comment")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # schemas by name


def prepare(response: Response) -> str:
    """The source as it is compiled.

    Raises:
        EngineError: it is too long, too deep, no JSON schema, or says what would be understood in another way.
    """
    source = response.source
    if len(source.encode("utf-8", "replace")) > MAX_SOURCE:
        todo = f"use {MAX_SOURCE // 1024} KiB at most"
        raise EngineError("the grammar is too long", where="response", todo=todo)
    if response.kind == "regex":
        return shorthands(source)
    try:
        tree = json.loads(source, parse_float=Decimal, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise refusal(response, str(error)) from None
    if not isinstance(tree, dict | bool if response.kind == "schema" else list):
        raise refusal(response, "it is no JSON object")
    _bounded(tree)
    try:
        return json.dumps(_schema(tree) if response.kind == "schema" else tree, default=float)
    except ValueError as error:
        raise refusal(response, str(error)) from None


def refusal(response: Response, why: str) -> EngineError:
    """The error of a grammar that cannot be used."""
    return EngineError(f"the {response.kind} cannot be used: {why}", where="response", todo="correct or simplify it")


def _no_number(text: str) -> None:
    """Raise ValueError: JSON has no such number."""
    raise ValueError(f"{text} is no number of JSON")


def _bounded(tree: Any) -> None:
    """Raise EngineError where a tree is too deep or has too many nodes."""
    level, nodes = [tree], 0
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        nodes += len(level)
    if level or nodes > MAX_NODES:
        todo = f"nest {MAX_DEPTH} levels at most and {MAX_NODES} values in all"
        raise EngineError("the grammar is too large", where="response", todo=todo)


def _schema(node: Any) -> Any:
    """A schema with its patterns in Rust's syntax.

    Raises:
        ValueError: a number of it cannot be held exactly, or a pattern cannot be said.
    """
    if isinstance(node, list):
        return [_schema(one) for one in node]
    if not isinstance(node, dict):
        return node
    _apart(node)
    made: dict[str, Any] = {}
    for key, value in node.items():
        if key in NUMBERS or key in VALUES:
            _exact(key, value)
            made[key] = value
        elif key in NOTES:
            made[key] = value
        elif key == "pattern" and isinstance(value, str):
            made[key] = ecma(value)
        elif key in NAMED and isinstance(value, dict):
            names = [ecma(name) if key == "patternProperties" else name for name in value]
            if len(set(names)) < len(names):
                raise ValueError("two names of patternProperties are the same pattern")
            made[key] = dict(zip(names, map(_schema, value.values()), strict=True))
        else:
            made[key] = _schema(value)
    return made


def _apart(node: dict[str, Any]) -> None:
    """Raise ValueError where a whole exclusive bound of ``node`` meets an opposite bound less than one away.

    Bounds in ``allOf``, ``anyOf`` and ``oneOf`` hold together with those beside them.
    """
    if node.get("type") == "integer":  # counted, not matched digit by digit
        return
    found: dict[str, set[Decimal]] = {key: set() for key in NUMBERS}
    waiting: list[Any] = [node]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, dict):
            continue
        for key in NUMBERS:
            if isinstance(one.get(key), int | Decimal) and not isinstance(one[key], bool):
                found[key].add(Decimal(one[key]))
        for key in ("allOf", "anyOf", "oneOf"):
            waiting += one[key] if isinstance(one.get(key), list) else []
    lows, highs = found["minimum"] | found["exclusiveMinimum"], found["maximum"] | found["exclusiveMaximum"]
    for low, high in itertools.product(lows, highs):
        near = 0 < high - low < 1
        for key, bound, other in (("exclusiveMinimum", low, high), ("exclusiveMaximum", high, low)):
            if near and bound in found[key] and bound == bound.to_integral_value():
                raise ValueError(f"{key}: {bound} cannot be kept out beside the bound {other}; use other units")


def _exact(key: str, value: Any) -> None:
    """Raise ValueError at the first number in ``value`` that a 64-bit float does not hold."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            _exact(key, one)
    elif isinstance(value, int | Decimal) and not isinstance(value, bool):
        value = Decimal(value)
        held = Decimal(repr(float(value)))
        if held != value or (key in NUMBERS and abs(value) >= 2**53):  # exclusive bounds are counted from
            raise ValueError(f"{key}: {value!s:.40} is not exact as a 64-bit float; write it as a string")


def shorthands(pattern: str) -> str:
    r"""A regex in Rust's syntax whose ``\d``, ``\w`` and ``\s`` are those of ECMA-262.

    >>> shorthands(r"\d+[^\d.]\\d")
    '[0-9]+[^0-9.]\\\\d'
    """
    made, place, depth = [], 0, 0
    while place < len(pattern):
        char, pair = pattern[place], pattern[place : place + 2]
        if char == "\\":
            made.append(_shorthand(pair[1:], depth > 0) or pair)
            place += 2
            continue
        depth += (char == "[") - (char == "]" and depth > 0)
        made.append(char)
        place += 1
    return "".join(made)


def ecma(pattern: str) -> str:
    r"""An ECMA-262 pattern, with the ``u`` flag, in Rust's syntax.

    Raises:
        ValueError: an escape means nothing in ECMA-262, or a class does not end.

    >>> ecma(r"^\d[&&x]\/\cA.$")
    '^[0-9][\\x26\\x26\\x78]/\\x01[^\\n\\r\\x{2028}\\x{2029}]$'
    """
    made, place = [], 0
    while place < len(pattern):
        char = pattern[place]
        if char == "\\":
            found = _escape(pattern, place)
            made.append(_escaped(found, inside=False))
            place = found.end()
        elif char == "[":
            text, place = _class(pattern, place)
            made.append(text)
        else:
            made.append(DOT if char == "." else char)
            place += 1
    return "".join(made)


def _class(pattern: str, start: int) -> tuple[str, int]:
    """The class that begins at ``start``, and where it ends: single characters, ranges and shorthands, all escaped."""
    negated = pattern.startswith("[^", start)
    place, parts = start + 1 + negated, list[str]()
    open_ = False  # whether the last part is a character that a dash may make the first of a range
    while place < len(pattern) and pattern[place] != "]":
        if open_ and pattern[place] == "-" and not WIDE.match(pattern, place + 1):
            parts.append("-")
            place, single = place + 1, False
        else:
            single = not WIDE.match(pattern, place)
        if pattern[place] == "\\":
            found = _escape(pattern, place)
            parts.append(_escaped(found, inside=True))
            place = found.end()
        else:
            parts.append(_literal(ord(pattern[place])))
            place += 1
        open_ = single
    if place == len(pattern):
        raise ValueError(f"the class at {start} of a pattern does not end")
    if not parts:
        return ("(?s:.)" if negated else r"[^\s\S]"), place + 1
    return f"[{'^' * negated}{''.join(parts)}]", place + 1


def _escape(pattern: str, place: int) -> re.Match[str]:
    """The escape at ``place``."""
    found = ESCAPE.match(pattern, place)
    if found is None:
        raise ValueError("a pattern ends in a backslash")
    return found


def _escaped(found: re.Match[str], *, inside: bool) -> str:
    """One escape of ECMA-262 in Rust's syntax; ``inside`` a class or not."""
    parts = found.groupdict()
    if parts["high"]:
        return _literal(0x10000 + ((int(parts["high"], 16) & 0x3FF) << 10 | int(parts["low"], 16) & 0x3FF))
    for name in ("four", "braced", "two"):
        if parts[name]:
            return _literal(int(parts[name], 16))
    if parts["control"]:
        return _literal(ord(parts["control"]) % 32)
    if parts["property"]:
        return found.group()
    if parts["short"]:
        return _shorthand(parts["short"], inside) or ""
    other = parts["other"]
    if other in CONTROLS and not (other == "0" and found.string[found.end() : found.end() + 1].isdecimal()):
        return CONTROLS[other]
    if inside and other == "b":
        return r"\x08"
    if other in SYNTAX or not (other.isalnum() or other == "_"):
        return _literal(ord(other))
    if not inside and other in "bB123456789k":
        return found.group()  # llguidance refuses what looks around or back, by name
    raise ValueError(f"\\{other} is no escape of ECMA-262")


def _shorthand(letter: str, inside: bool) -> str | None:
    r"""``\d`` and its like as ranges, bare inside of a class; None for any other letter."""
    ranges = SHORTHANDS.get(letter.lower())
    if ranges is None:
        return None
    return f"[^{ranges}]" if letter.isupper() else ranges if inside else f"[{ranges}]"


def _literal(code: int) -> str:
    """One character as itself, safe inside and outside of a class.

    Raises:
        ValueError: it is no character.
    """
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise ValueError(f"a pattern names U+{code:04X}, which is no character")
    return chr(code) if code == ord("/") else f"\\x{code:02X}" if code < 0x80 else f"\\x{{{code:X}}}"

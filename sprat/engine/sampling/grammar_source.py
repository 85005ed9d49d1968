# size: one noun: what a caller writes, checked and translated
r"""What a caller writes as a form, made into what llguidance understands in the same way, or refused by name.

*Bounds.* Long, deep and wide sources are refused before anything reads them.

*Patterns.* JSON schemas write them in ECMA-262 (with the ``u`` flag), llguidance reads Rust's syntax. ``\d`` is
``[0-9]`` in the one and every digit of Unicode in the other, ``\s`` and ``.`` differ in single characters, and
``[a&&b]``, ``\cA`` or ``\u0041`` mean something else or nothing. ``ecma_to_rust`` says each in Rust's words. A regex
that stands alone is in Rust's syntax, but its ``\d``, ``\w`` and ``\s`` are those of ECMA-262 as well.

*Numbers.* llguidance holds them as 64-bit floats. A bound or a value that such a float, or its shortest decimal form,
does not hold exactly would be another one, so it is refused; so is a bound of 2^53 and more, from which a float cannot
count by one. An exclusive bound that is whole lets itself in where the other bound is less than one away (llguidance
1.9 takes 0 for ``exclusiveMinimum: 0, maximum: 0.5``), so such a pair is refused as well, wherever the two stand.

*References.* ``$ref`` names a place (``#/$defs/NAME``) that was read as a schema; whatever else llguidance would follow
(``$id``, anchors, data such as ``#/examples/0``) was neither checked nor translated, and is refused by name.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from sprat.engine.sampling_params import Response
from sprat.errors import EngineError

MAX_SOURCE, MAX_DEPTH, MAX_NODES = 64 * 1024, 32, 8192
MAX_WORK = 1 << 17  # schemas that are looked at for what holds together

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
DATA = (*NUMBERS, *VALUES, *NOTES)  # what holds no schema
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # schemas by name


def translate_source(response: Response) -> str:
    """The source as it is compiled.

    Raises:
        EngineError: it is too long, too deep, no JSON schema, or says what would be understood in another way.
    """
    source = response.source
    if len(source.encode("utf-8", "replace")) > MAX_SOURCE:
        todo = f"use {MAX_SOURCE // 1024} KiB at most"
        raise EngineError("the grammar is too long", where="response", todo=todo)
    if response.kind == "regex":
        return with_ecma_shorthands(source)
    try:
        tree = json.loads(source, parse_float=Decimal, parse_constant=refuse_number)
    except (ValueError, RecursionError) as error:
        raise grammar_error(response, str(error)) from None
    if not isinstance(tree, dict | bool if response.kind == "schema" else list):
        raise grammar_error(response, "it is no JSON object")
    try:
        if response.kind == "schema":
            return json.dumps(translate_schema(tree), default=float)
        _check_size(tree)
        return json.dumps(tree, default=float)
    except ValueError as error:
        raise grammar_error(response, str(error)) from None


def translate_schema(tree: Any, max_work: int = MAX_WORK) -> Any:
    """A JSON schema, its numbers read as ``Decimal``, as llguidance understands it in the same way.

    Raises:
        EngineError: it is too large.
        ValueError: it says what would be understood in another way.
    """
    _check_size(tree)
    translated = _schema(tree)
    _refuse_close_bounds(tree, max_work)
    return translated


def grammar_error(response: Response, why: str) -> EngineError:
    """The error of a grammar that cannot be used."""
    what, where = response.language, "tools" if response.language == "tools" else "response"
    if response.kind == "tools":
        source = json.loads(response.source)
        if source["form"] is not None and not any(tool["strict"] for tool in source["tools"]):  # whose fault it is not
            what, where = "schema", "response"
    return EngineError(f"the {what} cannot be used: {why}", where=where, todo="correct or simplify it")


def refuse_number(text: str) -> None:
    """Raise ValueError: JSON has no such number."""
    raise ValueError(f"{text} is no number of JSON")


def _check_size(tree: Any) -> None:
    """Raise EngineError where a tree is too deep or has too many nodes."""
    level, nodes = [tree], 0
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        nodes += len(level)
    if level or nodes > MAX_NODES:
        todo = f"nest {MAX_DEPTH} levels at most and {MAX_NODES} values in all"
        raise EngineError("the grammar is too large", where="response", todo=todo)


def _children(node: Any) -> Iterable[Any]:
    """The values of an object or a list; none of anything else."""
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def _schema(node: Any) -> Any:
    """A schema with its patterns in Rust's syntax.

    Raises:
        ValueError: a number of it cannot be held exactly, or a pattern cannot be said.
    """
    if isinstance(node, list):
        return [_schema(schema) for schema in node]
    if not isinstance(node, dict):
        return node
    translated: dict[str, Any] = {}
    for key, value in node.items():
        if key in DATA:
            if key not in NOTES:
                _check_exact(key, value)
            translated[key] = value
        elif key == "pattern" and isinstance(value, str):
            translated[key] = ecma_to_rust(value)
        elif key in NAMED and isinstance(value, dict):
            names = [ecma_to_rust(name) if key == "patternProperties" else name for name in value]
            if len(set(names)) < len(names):
                raise ValueError("two names of patternProperties are the same pattern")
            translated[key] = dict(zip(names, map(_schema, value.values()), strict=True))
        else:
            translated[key] = _schema(value)
    return translated


def _refuse_close_bounds(root: Any, max_work: int) -> None:
    """Raise ValueError where a whole exclusive bound meets an opposite bound less than one away.

    Bounds meet where they hold for the same value, so what holds together is followed from the root: beside each other,
    through ``$ref``, ``allOf``, ``anyOf`` and ``oneOf``, and in properties and items of the same place.
    """
    pending: list[tuple[list[dict[str, Any]], list[Any]]] = [([], [root])]  # what holds, and what else holds with it
    followed: set[frozenset[int]] = set()
    work = 0
    while pending:
        before, more = pending.pop()
        added, branches = _joined(root, more)
        schemas = list({id(schema): schema for schema in before + added}.values())
        key = frozenset(map(id, schemas))
        if key in followed:
            continue
        followed.add(key)
        names, patterns = (sum(len(_dict(schema, key)) for schema in schemas) for key in NAMED[:2])
        work += len(schemas) * (1 + len(branches) + names) + (1 + names) * patterns
        if work > max_work:
            raise ValueError("too many of its parts hold for the same value")
        counted = any("integer" in _types(schema) and "number" not in _types(schema) for schema in schemas)
        if not counted:  # but matched
            _check_bounds(schemas + _joined(root, branches, all_branches=True)[0])
        pending += [(schemas, [branch]) for branch in branches]
        pending += [([], together) for together in _subschemas(schemas)]


def _joined(root: Any, nodes: list[Any], *, all_branches: bool = False) -> tuple[list[dict[str, Any]], list[Any]]:
    """All schemas that hold where ``nodes`` hold (``all_branches``: branches too), and branches of which one holds."""
    schemas: dict[int, dict[str, Any]] = {}
    branches: list[Any] = []
    pending = list(nodes)
    while pending:
        schema = pending.pop()
        if not isinstance(schema, dict) or id(schema) in schemas:
            continue
        schemas[id(schema)] = schema
        if schema is not root and isinstance(schema.get("$id"), str):
            raise ValueError("$id stands inside of the schema; leave it out, and refer to '#/$defs/NAME'")
        if "$ref" in schema:
            pending.append(_target(root, schema["$ref"]))
        pending += _list(schema, "allOf")
        (pending if all_branches else branches).extend(_list(schema, "anyOf") + _list(schema, "oneOf"))
    return list(schemas.values()), branches


def _target(root: Any, ref: Any) -> Any:
    """The schema that a ``$ref`` names by its place.

    Raises:
        ValueError: there is none, or what stands there was not read as a schema.
    """
    node, named = root, False
    if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
        raise ValueError(f"$ref: {ref!r:.80} is no place in the schema; write '#/$defs/NAME'")
    for token in unquote(ref).split("/")[1:]:
        token = token.replace("~1", "/").replace("~0", "~")
        inside = node is not root and not named and isinstance(node, dict) and "$id" in node
        if isinstance(node, dict) and token in node and not inside and (named or token not in DATA):
            node, named = node[token], not named and token in NAMED
        elif isinstance(node, list) and token.isdecimal() and len(token) < 6 and int(token) < len(node):
            node, named = node[int(token)], False
        else:
            raise ValueError(f"$ref: no schema stands at {ref!r:.80}")
    if named or not isinstance(node, dict | bool):
        raise ValueError(f"$ref: no schema stands at {ref!r:.80}")
    return node


def _subschemas(schemas: list[dict[str, Any]]) -> list[list[Any]]:
    """For each property and item what ``schemas`` say of it together."""
    subschemas: list[list[Any]] = []
    named = [(_dict(s, "properties"), _dict(s, "patternProperties"), s.get("additionalProperties")) for s in schemas]
    for name in {name for properties, _, _ in named for name in properties}:
        together: list[Any] = []
        for properties, patterns, rest in named:
            matching = [value for pattern, value in patterns.items() if _may_match(pattern, name)]
            matching += [properties[name]] if name in properties else []
            together += matching or [rest]
        subschemas.append(together)
    for pattern in {pattern for _, patterns, _ in named for pattern in patterns}:
        subschemas.append([patterns.get(pattern, rest) for _, patterns, rest in named])
    subschemas.append([rest for _, _, rest in named])
    first = [_list(schema, "prefixItems") or _list(schema, "items") for schema in schemas]
    rest = [schema.get("additionalItems") if _list(schema, "items") else schema.get("items") for schema in schemas]
    for index in range(max(map(len, first), default=0)):
        subschemas.append([row[index] if index < len(row) else other for row, other in zip(first, rest, strict=True)])
    subschemas.append(rest)
    return [together for together in subschemas if any(isinstance(schema, dict) for schema in together)]


def _may_match(pattern: str, name: str) -> bool:
    """Whether a pattern may match a name. Only plain ones are looked at: a caller's pattern could run for ever."""
    plain = re.fullmatch(r"(\^?)([\w-]*)(\$?)", pattern, re.ASCII)
    if plain is None:
        return True
    begins, text, ends = plain.groups()
    if begins and ends:
        return name == text
    return name.startswith(text) if begins else name.endswith(text) if ends else text in name


def _check_bounds(schemas: list[dict[str, Any]]) -> None:
    """Raise ValueError where a whole exclusive bound is less than one away from an opposite bound."""
    bounds = {key: {Decimal(schema[key]) for schema in schemas if _is_number(schema.get(key))} for key in NUMBERS}
    lows = sorted(bounds["minimum"] | bounds["exclusiveMinimum"])
    highs = sorted(bounds["maximum"] | bounds["exclusiveMaximum"])
    for key, others, sign in (("exclusiveMinimum", highs, 1), ("exclusiveMaximum", lows, -1)):
        for bound in bounds[key]:
            near = bisect_right(others, bound) if sign > 0 else bisect_left(others, bound) - 1
            other = others[near] if 0 <= near < len(others) else None
            if other is not None and abs(other - bound) < 1 and bound == bound.to_integral_value():
                raise ValueError(f"{key}: {bound} cannot be kept out beside the bound {other}; use other units")


def _is_number(value: Any) -> bool:
    """Whether a value is a number of JSON."""
    return isinstance(value, int | Decimal) and not isinstance(value, bool)


def _types(node: dict[str, Any]) -> list[Any]:
    """The types that a schema allows, if it says any."""
    value = node.get("type")
    return value if isinstance(value, list) else [value]


def _list(node: dict[str, Any], key: str) -> list[Any]:
    """The list under ``key``; an empty one where there is none."""
    value = node.get(key)
    return value if isinstance(value, list) else []


def _dict(node: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under ``key``; an empty one where there is none."""
    value = node.get(key)
    return value if isinstance(value, dict) else {}


def _check_exact(key: str, value: Any) -> None:
    """Raise ValueError at the first number in ``value`` that a 64-bit float does not hold."""
    for item in _children(value):
        _check_exact(key, item)
    if _is_number(value):
        value = Decimal(value)
        exact = Decimal(repr(float(value)))
        if exact != value or (key in NUMBERS and abs(value) >= 2**53):  # exclusive bounds are counted from
            raise ValueError(f"{key}: {value!s:.40} is not exact as a 64-bit float; write it as a string")


def with_ecma_shorthands(pattern: str) -> str:
    r"""A regex in Rust's syntax whose ``\d``, ``\w`` and ``\s`` are those of ECMA-262.

    >>> with_ecma_shorthands(r"\d+[^\d.]\\d")
    '[0-9]+[^0-9.]\\\\d'
    """
    translated, depth = list[str](), 0
    for text in re.findall(r"\\.|.", pattern, re.DOTALL):
        if text.startswith("\\"):
            translated.append(_shorthand(text[1:], depth > 0) or text)
        else:
            depth += (text == "[") - (text == "]" and depth > 0)
            translated.append(text)
    return "".join(translated)


def ecma_to_rust(pattern: str) -> str:
    r"""An ECMA-262 pattern, with the ``u`` flag, in Rust's syntax.

    Raises:
        ValueError: an escape means nothing in ECMA-262, or a class does not end.

    >>> ecma_to_rust(r"^\d[&&x]\/\cA.$")
    '^[0-9][\\x26\\x26\\x78]/\\x01[^\\n\\r\\x{2028}\\x{2029}]$'
    """
    translated, position = [], 0
    while position < len(pattern):
        char = pattern[position]
        if char == "\\":
            match = _escape(pattern, position)
            translated.append(_escaped(match, inside=False))
            position = match.end()
        elif char == "[":
            text, position = _class(pattern, position)
            translated.append(text)
        else:
            translated.append(DOT if char == "." else char)
            position += 1
    return "".join(translated)


def _class(pattern: str, start: int) -> tuple[str, int]:
    """The class that begins at ``start``, and where it ends: single characters, ranges and shorthands, all escaped."""
    negated = pattern.startswith("[^", start)
    position, parts = start + 1 + negated, list[str]()
    open_ = False  # whether the last part is a character that a dash may make the first of a range
    while position < len(pattern) and pattern[position] != "]":
        if open_ and pattern[position] == "-" and not WIDE.match(pattern, position + 1):
            parts.append("-")
            position, single = position + 1, False
        else:
            single = not WIDE.match(pattern, position)
        if pattern[position] == "\\":
            match = _escape(pattern, position)
            parts.append(_escaped(match, inside=True))
            position = match.end()
        else:
            parts.append(_literal(ord(pattern[position])))
            position += 1
        open_ = single
    if position == len(pattern):
        raise ValueError(f"the class at {start} of a pattern does not end")
    if not parts:
        return ("(?s:.)" if negated else r"[^\s\S]"), position + 1
    return f"[{'^' * negated}{''.join(parts)}]", position + 1


def _escape(pattern: str, position: int) -> re.Match[str]:
    """The escape at ``position``."""
    match = ESCAPE.match(pattern, position)
    if match is None:
        raise ValueError("a pattern ends in a backslash")
    return match


def _escaped(match: re.Match[str], *, inside: bool) -> str:
    """One escape of ECMA-262 in Rust's syntax; ``inside`` a class or not."""
    parts = match.groupdict()
    if parts["high"]:
        return _literal(0x10000 + ((int(parts["high"], 16) & 0x3FF) << 10 | int(parts["low"], 16) & 0x3FF))
    for name in ("four", "braced", "two"):
        if parts[name]:
            return _literal(int(parts[name], 16))
    if parts["control"]:
        return _literal(ord(parts["control"]) % 32)
    if parts["property"]:
        return match.group()
    if parts["short"]:
        return _shorthand(parts["short"], inside) or ""
    other = parts["other"]
    if other in CONTROLS and not (other == "0" and match.string[match.end() : match.end() + 1].isdecimal()):
        return CONTROLS[other]
    if inside and other == "b":
        return r"\x08"
    if other in SYNTAX or not (other.isalnum() or other == "_"):
        return _literal(ord(other))
    if not inside and other in "bB123456789k":
        return match.group()  # llguidance refuses what looks around or back, by name
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

"""Random JSON schemas, seeded, that any model comes to an end under."""

from __future__ import annotations

import random
from typing import Any

Json = dict[str, Any]
NAMES = ["a", "city", "é", "n1", "some key", 'q"', "</think>"]
PATTERNS = ["^[a-c]{1,4}$", "^\\d{2}-\\d{2}$", "^(x|yy)z?$", "^[A-F0-9]{3}$", "^a.c$", "^é+$"]
FORMATS = ["date", "uuid", "ipv4"]


def schema(number: int) -> Json:
    """The ``number``-th schema, always the same: an object, perhaps with definitions that it refers to."""
    draw = random.Random(number)
    definitions = {name: _value(draw, 1, ()) for name in draw.sample(["leaf", "other"], draw.randint(0, 2))}
    root = _object(draw, draw.choice([1, 2, 3]), tuple(definitions))
    if draw.random() < 0.1:  # a list that refers to itself
        definitions["node"] = {
            "type": "object", "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["next"], "additionalProperties": False,
        }  # fmt: skip
        root["properties"]["node"] = {"$ref": "#/$defs/node"}
    return {**root, "$defs": definitions} if definitions else root


def _object(draw: random.Random, depth: int, refs: tuple[str, ...]) -> Json:
    names = draw.sample(NAMES, draw.randint(0, 3))
    properties = {name: _value(draw, depth - 1, refs) for name in names}
    required = [name for name in names if draw.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(draw: random.Random, depth: int, refs: tuple[str, ...]) -> Json:
    kinds = [_string, _number, _integer, _enum, _constant]
    if refs and draw.random() < 0.2:
        return {"$ref": f"#/$defs/{draw.choice(refs)}"}
    if depth <= 0 or draw.random() < 0.4:
        return draw.choice(kinds)(draw)
    if draw.random() < 0.4:
        return _object(draw, depth, refs)
    if draw.random() < 0.4:
        return {"anyOf": [_value(draw, depth - 1, refs), {"type": draw.choice(["null", "boolean"])}]}
    low = draw.randint(0, 2)
    return {"type": "array", "items": _value(draw, depth - 1, refs), "minItems": low, "maxItems": low + 2}


def _string(draw: random.Random) -> Json:
    low = draw.randint(0, 3)
    bounds = {"minLength": low, "maxLength": low + draw.randint(0, 5)}
    return {
        "type": "string",
        **draw.choice([bounds, {"pattern": draw.choice(PATTERNS)}, {"format": draw.choice(FORMATS)}]),
    }


def _number(draw: random.Random) -> Json:
    low = round(draw.uniform(-50, 50), 1)
    return {"type": "number", "minimum": low, "maximum": round(low + draw.choice([0.5, 3, 100]), 1)}


def _integer(draw: random.Random) -> Json:
    low = draw.randint(-100, 100)
    return {"type": "integer", "minimum": low, draw.choice(["maximum", "exclusiveMaximum"]): low + draw.randint(1, 500)}


def _enum(draw: random.Random) -> Json:
    return {"enum": draw.sample(["C", "F", "", "naïve", 1, -2.5, True, None, "</think>", [1], {"a": 1}], 3)}


def _constant(draw: random.Random) -> Json:
    return {"const": draw.choice(["only", 7, None, False])}

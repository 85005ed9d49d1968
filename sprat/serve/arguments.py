"""The arguments of a call: the text of a JSON object, of which a call that was cut off has only the beginning."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json


def parse_arguments(text: str) -> dict[str, Any]:
    """The object; of one that was cut off, what of it is whole, as Anthropic's SDK has it.

    Raises:
        ValueError: it is no beginning of an object.

    >>> parse_arguments('{"city": "Paris", "days": [1, 2')
    {'city': 'Paris', 'days': [1, 2]}
    """
    value = from_json(text, allow_partial=True) if text.strip() else {}
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def whole_arguments(text: str) -> str:
    """``text`` where it is that of a JSON object, else that of what ``parse_arguments`` makes of it; raises as that.

    >>> whole_arguments('{"a":1}'), whole_arguments('{"a":1, "b": "x')
    ('{"a":1}', '{"a": 1}')
    """
    try:
        if isinstance(json.loads(text), dict):
            return text
    except (ValueError, RecursionError):
        pass
    return json.dumps(parse_arguments(text), ensure_ascii=False)

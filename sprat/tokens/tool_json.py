"""JSON as a model writes it in a call: where it ends, and what a whole call says."""

from __future__ import annotations

import json
import re

# Outside of strings JSON has no "<", "`" or backslash. So of two tags in one text the object behind one or the other
# ends soon, and no text can be read again from each of its tags to its end.
_OUTSIDE, _INSIDE = re.compile(r'["{}\[\]<`\\]'), re.compile(r'["\\]')


class Brackets:
    """Follows the brackets of a JSON text, which may come in pieces, to where the outermost one is closed.

    Attributes:
        depth: open brackets; 0 when the text is whole.
    """

    def __init__(self, depth: int = 0) -> None:
        self.depth, self._in_string, self._escaped = depth, False, False

    def advance(self, text: str, start: int) -> tuple[int, bool]:
        """Where the text ends, and whether it does: behind the last bracket, or before what no JSON has there.

        >>> Brackets().advance('{"a": "}"} b', 0), Brackets().advance('{"a": ', 0)
        ((10, True), (6, False))
        """
        position = start
        while position < len(text):
            if self._escaped:
                self._escaped, position = False, position + 1
                continue
            match = (_INSIDE if self._in_string else _OUTSIDE).search(text, position)
            if match is None:
                return len(text), False
            position, char = match.end(), match[0]
            if self._in_string:
                self._escaped, self._in_string = char == "\\", char == "\\"
            elif char == '"':
                self._in_string = True
            elif char in "{}[]":
                self.depth += 1 if char in "{[" else -1
                if self.depth <= 0:
                    return position, True
            else:
                return position - 1, True
        return position, False


def read_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a whole call, its members in any order; None where it is no call.

    >>> read_call('{"arguments": {"a": 1}, "name": "f"}'), read_call('{"name": "f"}'), read_call('{"name": 1}')
    (('f', '{"a": 1}'), ('f', '{}'), None)
    """
    try:
        members = json.loads(text, parse_constant=_refuse)
        name, arguments = members.get("name"), members.get("arguments", members.get("parameters"))
        if isinstance(arguments, str):
            written, arguments = arguments.strip(), json.loads(arguments, parse_constant=_refuse)
        else:
            arguments = {} if arguments is None else arguments
            written = json.dumps(arguments, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return (name, written) if isinstance(name, str) and isinstance(arguments, dict) else None


def read_string(text: str) -> str:
    """The string that JSON text stands for; an empty one where it is none."""
    try:
        return str(json.loads(text))
    except ValueError:
        return ""


def _refuse(text: str) -> None:
    """Raise ValueError: JSON has no such number."""
    raise ValueError(f"{text} is no number of JSON")

r"""Custom tools of OpenAI: tools that take one text, as it is, in the place of arguments.

Models know tools that take a JSON object. So a custom tool is shown to the model as one with a single argument, the
string ``input``, and is strict: what the model writes is such an object. Callers never see it: what they get bit by bit
is the string's value, and what they send back is made into such an object again.

The text is free, or it matches a regular expression as a whole, in the syntax that JSON schemas write patterns in (a
``grammar`` with the syntax ``regex``). Lark has no place in a JSON schema and is not had.
"""

from __future__ import annotations

import json
import re
from typing import Any

from sprat.serve.fields import Reader
from sprat.serve.generation import Tool

LARK = "grammars in Lark's syntax, only 'regex'"
MAX_PATTERN = 16 * 1024  # characters
_HEAD = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_COMPACT_HEAD = '{"input":"'
_LETTERS = re.compile(r'(?:[^"\\]|\\(?:u[0-9a-fA-F]{4}|[^u]))*', re.DOTALL)  # of a JSON string, each of them whole
_HALF = re.compile(r"(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}$")  # a letter of two escapes has its first one


def custom_tool(name: str, description: str, pattern: str | None, path: str) -> Tool:
    """A tool that takes a text, which matches ``pattern``; ``path`` says where the caller wrote that."""
    text: dict[str, Any] = {"type": "string"}
    if pattern is not None:
        text["pattern"] = f"^(?:{pattern})$"
    parameters = {"type": "object", "properties": {"input": text}, "required": ["input"], "additionalProperties": False}
    return Tool(name, description, parameters, strict=True, is_custom=True, path=path if pattern is not None else "")


def read_pattern(row: Reader, inner: str = "") -> tuple[str | None, str]:
    """The pattern of the ``format`` of a custom tool, None for free text, and its JSON path.

    Args:
        inner: the name of the object that has the grammar, where it is not ``format`` itself.

    Raises:
        RequestError: 400; it is none, or in a syntax that is not had.
    """
    form = row.object("format")
    if form is None or form.required("type", form.choice("type", ("text", "grammar"))) == "text":
        return None, ""
    grammar = form.required(inner, form.object(inner)) if inner else form
    if grammar.required("syntax", grammar.choice("syntax", ("lark", "regex"))) == "lark":
        raise grammar.not_offered("syntax", LARK)
    pattern = grammar.required("definition", grammar.text("definition", longest=MAX_PATTERN))
    where = f"{grammar.path}.definition"
    try:
        check_pattern(pattern)
    except ValueError as error:
        raise grammar.error("definition", f"cannot be used: {error}") from None
    return pattern, where


def check_pattern(pattern: str) -> None:
    """Raise ValueError where a pattern is none, as far as can be seen without building it."""
    from sprat.engine.sampling.grammar_source import ecma_to_rust

    if not pattern:
        raise ValueError("it is empty")
    ecma_to_rust(pattern)


def input_arguments(text: str) -> str:
    """The arguments of a call of a custom tool with ``text``, as the model writes them.

    >>> input_arguments("1 + 1")
    '{"input": "1 + 1"}'
    """
    return json.dumps({"input": text}, ensure_ascii=False)


class InputReader:
    r"""Reads the input of a call out of its arguments while they come.

    What is no such object (a model without a grammar may write anything) is given as it stands.

    >>> reader = InputReader()
    >>> reader.push('{"input": "a\\'), reader.push('nb\\ud83d'), reader.push('\\ude00"'), reader.push("}")
    ('a', '\nb', '😀', '')
    """

    def __init__(self) -> None:
        self._buffer = ""
        self._step = self._read_head

    def push(self, text: str) -> str:
        """What is known of the input now that ``text`` came."""
        self._buffer += text
        return self._step()

    def _read_head(self) -> str:
        if match := _HEAD.match(self._buffer):
            self._buffer, self._step = self._buffer[match.end() :], self._read_value
        elif _COMPACT_HEAD.startswith("".join(self._buffer.split())):
            return ""
        else:
            self._step = self._read_other
        return self._step()

    def _read_value(self) -> str:
        match = _LETTERS.match(self._buffer)
        end = match.end() if match else 0
        if self._buffer[end : end + 1] == '"':
            self._step = self._skip
        elif half := _HALF.search(self._buffer, 0, end):
            end = half.end() - 6
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        return _letters(text)

    def _read_other(self) -> str:
        text, self._buffer = self._buffer, ""
        return text

    def _skip(self) -> str:
        self._buffer = ""
        return ""


def _letters(text: str) -> str:
    """What the inside of a JSON string stands for; half a surrogate pair is no letter."""
    if "\\" not in text:
        return text
    try:
        return str(json.loads(f'"{text}"', strict=False)).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    except ValueError:
        return text

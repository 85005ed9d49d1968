"""The JSON schema of a Python function as a tool, from its type hints and its docstring (Google's style).

def look_up(key: str, limit: int = 3) -> str:
    '''Look a word up.

    Args:
        key: the word.
    '''
"""

from __future__ import annotations

import enum
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from sprat.errors import ConfigError

_SIMPLE: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    type(None): {"type": "null"},
    Any: {},
    inspect.Parameter.empty: {},
}
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns|Raises|Yields|Example|Examples|Note|Notes):\s*$")
_ARGUMENT = re.compile(r"^(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of ``function``, as chat templates and OpenAI's API have it.

    Raises:
        ConfigError: it takes ``*args`` or ``**kwargs``, or its parameters cannot be read.

    >>> def add(a: int, b: int = 0) -> int:
    ...     "Add two numbers."
    >>> function_schema(add)["function"]["parameters"]["required"]
    ['a']
    """
    name = getattr(function, "__name__", "")
    where, todo = f"tool {name or function!r}", "write it as a function with named parameters and type hints"
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise ConfigError("its parameters cannot be read", where=where, todo=todo) from None
    try:
        hints = typing.get_type_hints(function)
    except Exception:
        hints = {}
    summary, described = _read_docstring(inspect.getdoc(function) or "")
    properties, required = dict[str, Any](), []
    for parameter in parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"it takes *{parameter.name}", where=where, todo=todo)
        schema = _type_schema(hints.get(parameter.name, parameter.empty))
        if parameter.name in described:
            schema |= {"description": described[parameter.name]}
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    table = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": summary, "parameters": table}}


def _type_schema(hint: Any) -> dict[str, Any]:
    """The schema of a type hint; empty (anything) where it is none that JSON knows."""
    if hint in _SIMPLE:
        return dict(_SIMPLE[hint])
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type_schema(arguments[0])
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        options = [_type_schema(each) for each in arguments if each is not type(None)]
        return options[0] if len(options) == 1 else {"anyOf": options}
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return {"enum": [each.value for each in hint]}
    if origin in (list, tuple, set):
        return {"type": "array", "items": _type_schema(arguments[0])} if arguments else {"type": "array"}
    return {"type": "object"} if origin is dict else {}


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring says of its function, and of each parameter."""
    summary, described, section, last, indent = list[str](), dict[str, str](), "", "", 0
    for line in text.splitlines():
        if found := _SECTION.match(line):
            section, last = found[1], ""
            continue
        if not section:
            summary.append(line.strip())
            continue
        if section not in ("Args", "Arguments", "Parameters") or not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        argument = _ARGUMENT.match(line.strip())
        if argument and (not last or depth <= indent):
            last, indent = argument[1], depth
            described[last] = argument[2].strip()
        elif last:
            described[last] = f"{described[last]} {line.strip()}".strip()
    return " ".join(" ".join(summary).split()), described

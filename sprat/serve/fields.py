"""Reading a request's body: types are checked, what nobody asked for is ignored and listed.

Clients send more than their documentation says, and SDKs send ``null`` for what was left out: an unknown name and a
null are no reason to refuse a request. A wrong type is, and so is what JSON allows and no two readers take alike: a
name twice in one object, NaN, a number that no float holds, half a surrogate pair, nesting without end.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

from sprat.serve.errors import RequestError

MAX_DEPTH = 64  # levels of arrays and objects
MAX_DIGITS = 1024  # of an integer anywhere in a body; a field that is read as a number has 64 bits
MAX_HEADER = 1024  # characters of a list of names in a header
_T = TypeVar("_T")
_NUMBERS = {int: "a number", float: "a number"}
_TYPE_NAMES = {bool: "a boolean", str: "a string", list: "an array", dict: "an object", **_NUMBERS}


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object that a request's body is.

    Raises:
        RequestError: 400; it is no JSON in UTF-8, no object, nested deeper than ``MAX_DEPTH``, or says a name twice, a
            number that cannot be held, or half a character.

    >>> parse_json(b'{"temperature": NaN}')
    Traceback (most recent call last):
    sprat.serve.errors.RequestError: the body is not valid JSON: NaN is no number
    """
    try:
        content = json.loads(
            body.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_no_number,
        )
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise _invalid("it is not written in UTF-8") from None
    except ValueError as error:
        raise _invalid(str(error)) from None
    if not isinstance(content, dict):
        raise RequestError(400, f"the body must be a JSON object, not {_type_name(content)}", code="invalid_json")
    _check(content, has_surrogates=b"\\ud" in body or b"\\uD" in body)
    return content


def _invalid(reason: str) -> RequestError:
    return RequestError(400, f"the body is not valid JSON: {reason}", code="invalid_json")


def _too_deep() -> RequestError:
    return RequestError(400, f"the body is nested more than {MAX_DEPTH} levels deep", code="invalid_json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _invalid(f"an object says {shorten(name)!r} twice")
            seen.add(name)
    return result


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _invalid(f"a number has more than {MAX_DIGITS} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _invalid(f"{shorten(text)} is too large a number")
    return value


def _no_number(text: str) -> NoReturn:
    raise _invalid(f"{text} is no number")


def _check(body: dict[str, Any], *, has_surrogates: bool) -> None:
    """Walk all arrays and objects, without recursion."""
    stack: list[tuple[Any, str, int]] = [(body, "", 1)]
    while stack:
        container, path, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise _too_deep()
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, (dict, list)):
                stack.append((value, join(path, key), depth + 1))
            elif has_surrogates and isinstance(value, str) and not _is_text(value):
                where = join(path, key)
                raise RequestError(400, f"{where}: holds half a surrogate pair, which is no text", param=where)
            if has_surrogates and isinstance(key, str) and not _is_text(key):
                raise _invalid("a name holds half a surrogate pair, which is no text")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shorten(text: str) -> str:
    """A caller's text for a message: at most 64 characters, half characters escaped."""
    text = text if len(text) <= 64 else text[:61] + "..."
    return text.encode("utf-8", "backslashreplace").decode()


def join(path: str, key: str | int) -> str:
    """The JSON path of ``key`` in the value at ``path``: ``messages[3].content``."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{shorten(key)}" if path else shorten(key)


def _type_name(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), "null")


class Reader:
    """The fields of one object of a body, each read by its type; a null is read as what is not there.

    Args:
        body: the object.
        path: where it stands in the body, for errors; empty for the body itself.

    Raises:
        RequestError: 400, from every method that reads; it names the field by its JSON path.

    >>> body = Reader({"temperature": 0.5, "seed": None, "colour": "blue"})
    >>> body.number("temperature", 0, 2), body.integer("seed", 0, 9), body.rest()
    (0.5, None, ('seed', 'colour'))
    >>> Reader({"role": 1}, "messages[0]").text("role")
    Traceback (most recent call last):
    sprat.serve.errors.RequestError: messages[0].role: must be a string, not a number
    """

    def __init__(self, body: Any, path: str = "") -> None:
        self.body: dict[str, Any] = body if isinstance(body, dict) else {}
        self.path = path
        self._seen: set[str] = set()
        self._children: dict[str, Reader] = {}
        if not isinstance(body, dict):
            message = f"{path or 'the body'}: must be an object, not {_type_name(body)}"
            raise RequestError(400, message, param=path or None, code="invalid_type")

    def has(self, name: str) -> bool:
        """Whether ``name`` is there and not null; it is not read by this."""
        return self.body.get(name) is not None

    def raw(self, name: str) -> Any:
        """Any value; None where it is not there."""
        self._seen.add(name)
        return self.body.get(name)

    def text(self, name: str, *, longest: int | None = None) -> str | None:
        """A string, of at most ``longest`` characters."""
        value: str | None = self._typed(name, (str,), "a string")
        if value is not None and longest is not None and len(value) > longest:
            raise self.error(name, f"must have at most {longest} characters, not {len(value)}")
        return value

    def number(self, name: str, low: float, high: float, *, above: bool = False) -> float | None:
        """A number from ``low`` (``above``: more than that) to ``high``."""
        value = self._typed(name, (int, float), "a number")
        if value is None:
            return None
        if not low <= value <= high or (above and value == low):
            least = "more than" if above else "at least"
            raise self.error(name, f"must be {least} {low:g} and at most {high:g}")
        return float(value)

    def integer(self, name: str, low: int, high: int = 2**63 - 1) -> int | None:
        """A whole number from ``low`` to ``high``; 3.0 is one."""
        value = self._typed(name, (int, float), "a whole number")
        if value is None:
            return None
        if isinstance(value, float) and not value.is_integer():
            raise self.error(name, "must be a whole number")
        if not low <= value <= high:
            most = "" if high >= 2**63 - 1 and value < low else f" and at most {high}"
            raise self.error(name, f"must be at least {low}{most}")
        return int(value)

    def flag(self, name: str) -> bool | None:
        """True or false."""
        value: bool | None = self._typed(name, (bool,), "true or false")
        return value

    def choice(self, name: str, options: Collection[str]) -> str | None:
        """One of ``options``."""
        value = self.text(name)
        if value is not None and value not in options:
            raise self.error(name, f"must be one of {', '.join(map(repr, options))}, not {shorten(value)!r}")
        return value

    def items(self, name: str, *, most: int | None = None) -> list[Any] | None:
        """An array, of at most ``most`` values of any type."""
        value: list[Any] | None = self._typed(name, (list,), "an array")
        if value is not None and most is not None and len(value) > most:
            raise self.error(name, f"must have at most {most} items, not {len(value)}")
        return value

    def texts(self, name: str, *, most: int, longest: int) -> tuple[str, ...] | None:
        """An array of at most ``most`` strings of 1 to ``longest`` characters; a string alone is an array of one."""
        value = self.raw(name)
        values = [value] if isinstance(value, str) else self.items(name, most=most)
        for index, item in enumerate(values or ()):
            where = name if isinstance(value, str) else f"{name}[{index}]"
            if not isinstance(item, str):
                raise self.error(where, f"must be a string, not {_type_name(item)}", code="invalid_type")
            if not 0 < len(item) <= longest:
                raise self.error(where, f"must have 1 to {longest} characters, not {len(item)}")
        return None if values is None else tuple(values)

    def object(self, name: str) -> Reader | None:
        """An object."""
        value = self._typed(name, (dict,), "an object")
        return None if value is None else self._child(value, join(self.path, name))

    def objects(self, name: str, *, most: int | None = None) -> list[Reader] | None:
        """An array of objects."""
        values = self.items(name, most=most)
        path = join(self.path, name)
        return None if values is None else [self._child(value, join(path, n)) for n, value in enumerate(values)]

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object that is taken as it is (a JSON schema, metadata)."""
        value: dict[str, Any] | None = self._typed(name, (dict,), "an object")
        return value

    def required(self, name: str, value: _T | None) -> _T:
        """``value``, as one of the other methods has read it, where it may not be left out."""
        if value is None:
            raise self.error(name, "is missing", code="missing_required_parameter")
        return value

    def known(self, *names: str) -> None:
        """Names that are not listed as ignored though nothing is read of them."""
        self._seen.update(name for name in names if self.has(name))

    def error(self, name: str, message: str, *, code: str = "invalid_value") -> RequestError:
        """A refusal (400) that names a field of this object; an empty ``name`` is the object itself."""
        where = join(self.path, name) if name else self.path
        return RequestError(400, f"{where}: {message}" if where else message, param=where or None, code=code)

    def not_offered(self, name: str, what: str = "it") -> RequestError:
        """A refusal of what is known and not had here."""
        return self.error(name, f"this server does not offer {what}; leave it out", code="not_offered")

    def rest(self) -> tuple[str, ...]:
        """Paths of what was ignored, here and in what was read of it: names that nobody read, and nulls, each once."""
        unread = [name for name, value in self.body.items() if name not in self._seen or value is None]
        names = [re.sub(r"\[\d+\]", "[]", join(self.path, name)) for name in unread]
        return tuple(dict.fromkeys([*names, *(name for child in self._children.values() for name in child.rest())]))

    def _child(self, value: Any, path: str) -> Reader:
        """The reader of an object in this one, the same whenever it is asked for."""
        if path not in self._children:
            self._children[path] = Reader(value, path)
        return self._children[path]

    def _typed(self, name: str, types: tuple[type, ...], what: str) -> Any:
        """The value, of one of ``types``; no boolean is a number."""
        value = self.raw(name)
        if value is None or type(value) in types:
            return value
        raise self.error(name, f"must be {what}, not {_type_name(value)}", code="invalid_type")


def header_list(names: Iterable[str], limit: int = MAX_HEADER) -> str:
    """Names as the value of a header: ASCII, comma between them; where they are too many, the first and ``...``.

    >>> header_list(["seed", "größe", "a,b"])
    'seed, gr%C3%B6%C3%9Fe, a%2Cb'
    """
    text = ""
    for name in names:
        item = quote(name, safe=".[]*-_:()'!$&+;=@~")
        if len(text) + len(item) + 7 > limit:
            return f"{text}, ..." if text else "..."
        text = f"{text}, {item}" if text else item
    return text

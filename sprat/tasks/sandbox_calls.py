"""The answer's side of its tests: imports the answer and calls its functions as it is told. Must not import sprat.

What crosses the border is plain data in tagged JSON, built here by the type's own methods: a number is a number on the
other side, whatever class of the answer's it came from, so that an object that equals everything cannot cross. Other
objects stay here; outside, they are a number in a table.

All that a hostile answer can do to this file is to return other data, which it could anyway.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any, BinaryIO

MAX_DEPTH = 100


def encode(value: Any, objects: dict[int, Any], depth: int = 0) -> Any:
    """``value`` as tagged JSON; what is no data is put among ``objects``.

    Raises:
        ValueError: it is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise ValueError("the result is nested too deeply")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return {"i": format(int.__add__(value, 0), "x")}  # decimal digits are bounded and slow
    if isinstance(value, float):
        return {"f": float.__repr__(value)}
    if isinstance(value, complex):
        return {"c": [float.__repr__(value.real), float.__repr__(value.imag)]}
    if isinstance(value, (bytes, bytearray)):
        return {"b": bytes(value).hex()}
    kinds: dict[str, Any] = {"l": list, "t": tuple, "s": set, "z": frozenset}
    for tag, kind in kinds.items():
        if isinstance(value, kind):
            return {tag: [encode(item, objects, depth + 1) for item in kind.__iter__(value)]}
    if isinstance(value, dict):
        pairs = dict.items(value)
        return {"d": [[encode(key, objects, depth + 1), encode(item, objects, depth + 1)] for key, item in pairs]}
    objects[id(value)] = value
    return {"o": id(value)}


def decode(value: Any, objects: dict[int, Any]) -> Any:
    """The value of tagged JSON.

    Raises:
        ValueError: it is none.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("no value")
    ((tag, content),) = value.items()
    scalars: dict[str, Any] = {"i": lambda digits: int(digits, 16), "f": float, "b": bytes.fromhex}
    if tag in scalars:
        return scalars[tag](content)
    if tag == "c":
        return complex(float(content[0]), float(content[1]))
    if tag == "d":
        return {decode(key, objects): decode(item, objects) for key, item in content}
    if tag == "o":
        return objects[content]
    kinds: dict[str, Any] = {"l": list, "t": tuple, "s": set, "z": frozenset}
    return kinds[tag](decode(item, objects) for item in content)


def call(request: dict[str, Any], objects: dict[int, Any]) -> dict[str, Any]:
    """Do one request: ``get`` an attribute, ``call`` an object, or take the ``next`` item of one."""
    target = objects[request["object"]]
    if request["do"] == "get":
        return {"value": encode(getattr(target, request["name"]), objects)}
    if request["do"] == "next":
        try:
            return {"value": encode(next(target), objects)}
        except StopIteration:
            return {"end": True}
    if request["do"] == "operate":
        method = getattr(type(target), request["name"], None)
        if method is None:
            raise TypeError(f"{type(target).__name__} has no {request['name']}")
        target = method.__get__(target)
    arguments = [decode(item, objects) for item in request["arguments"]]
    named = {name: decode(item, objects) for name, item in request["named"].items()}
    value = target(*arguments, **named)
    return {"value": encode(value, objects), "arguments": [encode(item, objects) for item in arguments]}


def serve(stream: BinaryIO, path: str) -> None:
    """Import the file at ``path``, and answer requests until there is none."""
    objects: dict[int, Any] = {}
    spec = importlib.util.spec_from_file_location("solution", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    objects[0] = sys.modules["solution"] = module
    imported = False
    for line in stream:
        request = json.loads(line)
        try:
            if not imported:
                imported = True
                spec.loader.exec_module(module)
            reply = call(request, objects)
        except Exception as error:
            reply = {"raised": [kind.__name__ for kind in type(error).__mro__], "message": f"{error}"[:500]}
        stream.write(json.dumps({**reply, "nonce": request["nonce"]}).encode() + b"\n")
        stream.flush()

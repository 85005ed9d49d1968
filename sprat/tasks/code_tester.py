"""Runs a user's tests against an answer that lives in a sandbox. A process of its own, which must not import sprat.

The tests are here and the answer is not: a test that calls ``add(1, 2)`` sends the call over a socket and gets plain
data back (``sandbox_calls``). So the answer cannot change what a test is, what it compares with, or what is counted;
it cannot even see it. Whatever it writes, patches or ends happens on its own side. An object of the answer's own class
stays there and is a ``RemoteObject`` here, which is true of nothing and equal to itself alone.

The job comes as a line of JSON on stdin, with a number that nobody else knows; the verdict goes to stdout with it.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib.abc
import importlib.util
import json
import os
import resource
import secrets
import socket
import sys
import types
from typing import Any

MAX_REPLY_BYTES = 8 << 20
MEMORY_BYTES = 1 << 30
_OPERATORS = (
    "len getitem setitem delitem contains add sub mul truediv floordiv mod pow neg abs int float str lt le gt ge "
    "enter exit"
)


class Unsupported(BaseException):  # noqa: N818 - not an Exception: no test may catch it
    """The test does what cannot be done over a border: its own fault, not the answer's."""


class Gone(Exception):  # noqa: N818
    """The answer's process has ended."""


class RemoteObject:
    """An object of the answer's, by its number on the other side."""

    def __init__(self, border: Border, number: int) -> None:
        self.__dict__.update(_border=border, _number=number)

    def __getattr__(self, name: str) -> Any:
        return self._border.ask(self._number, "get", name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._border.ask(self._number, "operate", name="__setattr__", arguments=[name, value])

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._border.ask(self._number, "call", arguments=list(arguments), named=named)

    def __iter__(self) -> Any:
        iterator = self._border.ask(self._number, "operate", name="__iter__")
        return iterator if isinstance(iterator, RemoteObject) else iter(iterator)

    def __next__(self) -> Any:
        return self._border.ask(self._number, "next")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteObject) and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)

    def __bool__(self) -> bool:
        raise TypeError("an object of the answer's own class is neither true nor false")


def _operator(name: str) -> Any:
    def operate(self: RemoteObject, *arguments: Any) -> Any:
        return self._border.ask(self._number, "operate", name=name, arguments=list(arguments))

    return operate


for _name in _OPERATORS.split():
    setattr(RemoteObject, f"__{_name}__", _operator(f"__{_name}__"))


class Border:
    """The socket to the answer's process, one question at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._stream = connection.makefile("rwb")

    def ask(
        self, number: int, do: str, *, name: str = "", arguments: list[Any] | None = None, named: Any = None
    ) -> Any:
        """What the other side answers; lists, dicts and sets that it changed are changed here too.

        Raises:
            Gone: it is dead, or answers nonsense. Whatever the answer's code raised, by the name of a built-in class.
        """
        arguments, nonce = arguments or [], secrets.token_hex(8)
        request = {"object": number, "do": do, "name": name, "nonce": nonce}
        request["arguments"] = [self._encode(item) for item in arguments]
        request["named"] = {key: self._encode(item) for key, item in (named or {}).items()}
        try:
            self._stream.write(json.dumps(request).encode() + b"\n")
            self._stream.flush()
            line = self._stream.readline(MAX_REPLY_BYTES)
            reply = json.loads(line)
            if reply["nonce"] != nonce:
                raise ValueError
            if "raised" in reply:
                kinds, message = [str(kind) for kind in reply["raised"]], str(reply["message"])
            elif "end" in reply:
                raise StopIteration
            else:
                for item, changed in zip(arguments, reply.get("arguments", []), strict=False):
                    _update(item, self._decode(changed) if isinstance(item, (list, dict, set)) else None)
                return self._decode(reply["value"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Gone("the answer's process ended, or answered nonsense") from None
        raise _exception(kinds, message)

    def _encode(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, RemoteObject):
            return {"o": value._number}
        if isinstance(value, int):
            return {"i": format(value, "x")}
        if isinstance(value, float):
            return {"f": repr(value)}
        if isinstance(value, complex):
            return {"c": [repr(value.real), repr(value.imag)]}
        if isinstance(value, bytes):
            return {"b": value.hex()}
        for tag, kind in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
            if isinstance(value, kind):
                return {tag: [self._encode(item) for item in value]}
        if isinstance(value, dict):
            return {"d": [[self._encode(key), self._encode(item)] for key, item in value.items()]}
        raise Unsupported(f"a test hands over {type(value).__name__}, which is no plain data")

    def _decode(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return value
        ((tag, content),) = value.items()
        scalars: dict[str, Any] = {"i": lambda digits: int(digits, 16), "f": float, "b": bytes.fromhex}
        if tag in scalars:
            return scalars[tag](content)
        if tag == "c":
            return complex(float(content[0]), float(content[1]))
        if tag == "d":
            return {self._decode(key): self._decode(item) for key, item in content}
        if tag == "o":
            return RemoteObject(self, int(content))
        kinds: dict[str, Any] = {"l": list, "t": tuple, "s": set, "z": frozenset}
        return kinds[tag](self._decode(item) for item in content)


def _update(item: Any, changed: Any) -> None:
    """Make ``item`` hold what ``changed`` holds, where both are of one kind."""
    if type(item) is not type(changed):
        return
    if isinstance(item, list):
        item[:] = changed
    elif isinstance(item, (dict, set)):
        item.clear()
        item.update(changed)


def _exception(kinds: list[str], message: str) -> Exception:
    """An exception as the answer raised it: of its first class that Python has, else of one with that name."""
    for kind in kinds:
        found = getattr(builtins, kind, None)
        if isinstance(found, type) and issubclass(found, Exception) and kind != "Exception":
            try:
                return found(message)
            except TypeError:
                continue
    return Exception(f"{kinds[0] if kinds else '?'}: {message}")


class _Counted(ast.NodeTransformer):
    """Puts a call before every assert, so that tests that assert nothing are noticed."""

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:  # noqa: N802
        count = ast.Expr(ast.Call(ast.Name("__assert_begins__", ast.Load()), [], []))
        return [ast.copy_location(count, node), node]


class _Loader(importlib.abc.InspectLoader):
    """Loads the tests from the text at hand."""

    def __init__(self, source: str) -> None:
        self._source = source

    def get_source(self, fullname: str) -> str:
        return self._source

    def source_to_code(self, data: Any, path: Any = "<tests>") -> types.CodeType:  # type: ignore[override]
        tree = ast.fix_missing_locations(_Counted().visit(ast.parse(data)))
        return compile(tree, "<tests>", "exec", dont_inherit=True)


def missing_names(source: str) -> list[str]:
    """Names that the tests use and neither define nor import, nor Python has: the answer's."""
    tree = ast.parse(source)
    own = set(dir(builtins)) | {"__name__", "__file__", "__doc__"}
    used: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            own |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            own.add(node.name)
        elif isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                used.append(node.id)
            else:
                own.add(node.id)
    return sorted(set(used) - own)


def run(source: str, border: Border) -> dict[str, Any]:
    """Run the tests: ``passed``, and why not; or ``fault``, where they could not be run."""
    counted = [0]
    solution = types.ModuleType("solution")
    module_proxy = RemoteObject(border, 0)
    solution.__getattr__ = lambda name: getattr(module_proxy, name)  # type: ignore[method-assign]
    sys.modules["solution"] = solution
    loader = _Loader(source)
    spec = importlib.util.spec_from_loader("tests", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)

    def count() -> None:
        counted[0] += 1

    module.__dict__["__assert_begins__"] = count
    try:
        for name in missing_names(source):
            with contextlib.suppress(AttributeError):  # a NameError where it is used
                module.__dict__[name] = getattr(module_proxy, name)
        loader.exec_module(module)
        for name, test in list(module.__dict__.items()):
            if name.startswith("test") and isinstance(test, types.FunctionType):
                test()
    except Unsupported as error:
        return {"fault": str(error)}
    except (Exception, SystemExit) as error:
        return {"passed": False, "why": f"{type(error).__name__}: {error}"[:300]}
    return {"passed": True} if counted[0] else {"fault": "the tests asserted nothing"}


def main() -> None:
    """Do one job."""
    job = json.loads(sys.stdin.readline())
    verdicts = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a test prints is no verdict
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (job["cpu_seconds"], job["cpu_seconds"]))
    border = Border(socket.socket(fileno=int(sys.argv[1])))
    verdicts.write(json.dumps({**run(job["tests"], border), "nonce": job["nonce"]}) + "\n")
    verdicts.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

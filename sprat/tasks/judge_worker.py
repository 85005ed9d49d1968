"""Judges one answer by foreign code: a user's pattern, a JSON schema, a formula. A process of its own.

A pattern can take longer than the universe (``(a+)+b``), a schema holds patterns, and a formula is a program of a large
library (``9^{9^9}`` alone never ends). So each request has bounded CPU time, all of them bounded memory, and files
cannot be written. Requests are answered in a fork of this process, which has imported the libraries already: one that
goes over its bound is ended by the system, also where nobody waits for it any more, and the next one is there in
milliseconds. The bound is CPU time because a busy machine does not shorten it; a reply that says ``over`` is no
judgement of the answer.

Run as a script: a JSON object a line on stdin, one a line on stdout. It must not import sprat.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

MEMORY_BYTES = 1 << 30
ANSWERS_OF_A_FORK = 500  # a library's caches grow


def match_regex(source: str, answer: str | None, ignore_case: bool) -> bool:
    """Whether the pattern matches all of the answer; without an answer, whether it is a pattern.

    Raises:
        ValueError: it is none.
    """
    try:
        pattern = re.compile(source, re.IGNORECASE if ignore_case else 0)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"no regular expression: {error}") from None
    return answer is None or pattern.fullmatch(answer.strip()) is not None


def match_schema(source: str, answer: str | None, ignore_case: bool) -> bool:
    """Whether the answer is one JSON value as the schema describes it; without an answer, whether it is a schema.

    What lies elsewhere (``$ref`` to another document) is never fetched. ``format`` is not checked, as the standard has
    it. A name that stands twice in an object, NaN and Infinity are no JSON.

    Raises:
        ValueError: it is no schema, or refers to what is not in it.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry, Resource
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    schema = json.loads(source)
    validator_class = validator_for(schema, default=Draft202012Validator)
    if answer is None:
        try:
            validator_class.check_schema(schema)
        except SchemaError as error:
            raise ValueError(f"no JSON schema: {error.message}") from None
        document = Resource.from_contents(schema, default_specification=DRAFT202012)
        resolver = Registry().with_resource("", document).resolver()
        for reference in _references(schema):
            if not reference.startswith("#"):
                raise ValueError(f"the schema refers to {reference!r}, and other documents are never fetched")
            try:
                resolver.lookup(reference)
            except Unresolvable:
                raise ValueError(f"the schema refers to {reference!r}, which is not in it") from None
        return True
    try:
        value = json.loads(answer, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    try:
        return bool(validator_class(schema, registry=Registry()).is_valid(value))
    except Unresolvable as error:
        raise ValueError(f"the schema refers to what is not in it: {error}") from None


def match_formula(source: str, answer: str | None, ignore_case: bool) -> bool:
    """Whether math-verify and our own check take the answer for the formula; without one, whether it can be read."""
    return bool(_formulas().is_same(source, answer))


def match_texts(source: str, answer: str | None, ignore_case: bool) -> bool:
    """What math-verify itself says of two texts; ``source`` is JSON with its options (``formula_worker.compare``)."""
    return bool(_formulas().compare(json.loads(source), answer))


KINDS: dict[str, tuple[str, int, Callable[[str, str | None, bool], bool]]] = {  # package, CPU seconds of one answer
    "regex": ("re", 1, match_regex),
    "json_schema": ("jsonschema", 1, match_schema),
    "math": ("math_verify", 4, match_formula),
    "math_verify": ("math_verify", 10, match_texts),
}


def respond(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request: ``right``, or ``error``."""
    _, seconds, match = KINDS[request["kind"]]
    _limit_cpu(seconds)
    try:
        return {"right": match(request["source"], request["answer"], request["ignore_case"])}
    except ValueError as error:
        return {"error": " ".join(str(error).split())[:200]}


@functools.cache
def _formulas() -> Any:
    """The module beside this script that asks math-verify."""
    path = Path(__file__).with_name("formula_worker.py")
    spec = importlib.util.spec_from_file_location("formula_worker", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _references(schema: Any) -> Iterator[str]:
    """What the schema refers to."""
    if isinstance(schema, dict):
        yield from (schema[key] for key in ("$ref", "$dynamicRef") if isinstance(schema.get(key), str))
    if isinstance(schema, (dict, list)):
        for item in schema.values() if isinstance(schema, dict) else schema:
            yield from _references(item)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands in it twice")
    return result


def _refuse_constant(name: str) -> None:
    """NaN and Infinity are Python's, not JSON's."""
    raise ValueError(name)


def _limit_cpu(seconds: int) -> None:
    """Let this process run for so much longer, counted in CPU seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft_limit = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
    with contextlib.suppress(ValueError, OSError):  # a lower limit stands already
        resource.setrlimit(resource.RLIMIT_CPU, (soft_limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _limit_resources() -> None:
    """Bound what this process and those that it forks can take, all their lives."""
    for limit, value in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))


class Fork:
    """A forked copy of this process that answers requests until one of them kills it."""

    def __init__(self, libraries: int) -> None:
        self.libraries, self.num_answered = libraries, 0
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._requests)
            os.close(self._replies)
            serve(os.fdopen(requests, "r", encoding="utf-8"), os.fdopen(replies, "w", encoding="utf-8"))
            os._exit(0)
        os.close(requests)
        os.close(replies)
        self._writer = os.fdopen(self._requests, "w", encoding="utf-8")
        self._reader = os.fdopen(self._replies, "r", encoding="utf-8")

    def ask(self, line: str) -> str:
        """The reply to a request; empty if the fork died of it."""
        self.num_answered += 1
        with contextlib.suppress(OSError):
            self._writer.write(line)
            self._writer.flush()
        return self._reader.readline()

    def end(self) -> int:
        """Close it; the signal that killed it, or 0."""
        with contextlib.suppress(OSError):
            self._writer.close()
        self._reader.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) * -1


def serve(requests: Iterable[str], replies: TextIO) -> None:
    """Answer line by line, until there is none, or the memory was full."""
    for line in requests:
        try:
            reply = respond(json.loads(line))
        except MemoryError:
            reply = {"fault": "MemoryError", "over": True}
        except Exception as error:  # whatever foreign code does, the answer is not right
            reply = {"right": False, "fault": type(error).__name__}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if reply.get("over"):
            return


def main() -> None:
    """Import what is asked for once, and hand each request to a fork; a fork that dies has a fresh one after it."""
    _limit_resources()
    replies, fork, libraries = sys.stdout, None, 0
    sys.stdout = sys.stderr  # what a library prints is no reply
    for line in sys.stdin:
        package = KINDS[json.loads(line)["kind"]][0]
        reply = ""
        if package not in sys.modules:
            libraries += 1
            try:
                importlib.import_module(package)
            except ImportError:
                reply = json.dumps({"missing": package}) + "\n"
        if fork is not None and (fork.libraries < libraries or fork.num_answered >= ANSWERS_OF_A_FORK):
            fork.end()
            fork = None
        fork = fork or Fork(libraries)
        reply = reply or fork.ask(line)
        if not reply:
            signal_number = fork.end()
            fork = None
            told = "CPU time" if signal_number == signal.SIGXCPU else f"signal {signal_number}"
            reply = json.dumps({"fault": told, "over": True}) + "\n"
        elif '"over": true' in reply:
            fork.end()
            fork = None
        replies.write(reply)
        replies.flush()


if __name__ == "__main__":
    main()

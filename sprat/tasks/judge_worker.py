"""Judges one answer by foreign code: a user's pattern, a JSON schema, a formula. A process of its own.

A pattern can take longer than the universe (``(a+)+b``), a schema holds patterns, and a formula is a program of a large
library. So each request has bounded CPU time, all of them bounded memory, and files cannot be written. A process that
goes over its bound is ended by the system, also where nobody waits for it any more.

Run as a script: a JSON object a line on stdin, one a line on stdout. It must not import sprat.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

MEMORY_BYTES, CPU_SECONDS, IMPORT_SECONDS = 1 << 30, 1, 60


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
    """Whether math-verify takes the answer for the same as the formula; without an answer, whether it can read it.

    Only its LaTeX reader is asked: the other one executes what it reads.

    Raises:
        ValueError: it cannot read the formula.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> Any:
        return parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None, fallback_mode="no_fallback")

    gold = read(source)
    if not gold:
        raise ValueError("math-verify cannot read the formula")
    if answer is None:
        return True
    target = read(answer)
    return bool(target) and bool(verify(gold, target, timeout_seconds=None, strict=True))


KINDS: dict[str, tuple[str, Callable[[str, str | None, bool], bool]]] = {  # the package that each needs
    "regex": ("re", match_regex),
    "json_schema": ("jsonschema", match_schema),
    "math": ("math_verify", match_formula),
}


def respond(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request: ``right``, or ``error``, or the package that is ``missing``."""
    package, match = KINDS[request["kind"]]
    if package not in sys.modules:
        _limit_cpu(IMPORT_SECONDS)
        try:
            importlib.import_module(package)
        except ImportError:
            return {"missing": package}
    _limit_cpu(CPU_SECONDS)
    try:
        return {"right": match(request["source"], request["answer"], request["ignore_case"])}
    except ValueError as error:
        return {"error": " ".join(str(error).split())[:200]}


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
    """Bound what this process can take, all its life."""
    for limit, value in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))


def main() -> None:
    """Answer line by line, until there is none."""
    _limit_resources()
    replies = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no reply
    for line in sys.stdin:
        try:
            reply = respond(json.loads(line))
        except Exception as error:  # whatever foreign code does, the answer is not right
            reply = {"right": False, "fault": type(error).__name__}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()

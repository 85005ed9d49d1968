"""Renders one foreign chat template on a few conversations: a process of its own, which may do nothing else.

A template is a program. It runs in Jinja's immutable sandbox (no attribute that begins with an underscore, nothing
changed, ranges bounded), in a process without the caller's environment that has bounded memory and CPU time and can
neither write files nor start processes. What comes back is text, which the caller compares and never executes.

Options and functions are those of transformers' ``apply_chat_template``; ``strftime_now`` gives back how the date is
to be written, so that the caller fills in the day on which a prompt is made.

Run as a script: one JSON object on stdin, one JSON list on stdout. It must not import sprat.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from typing import Any

MEMORY_BYTES, CPU_SECONDS, TEXT_CHARS = 1 << 29, 3, 1 << 22


def render(request: dict[str, Any]) -> list[dict[str, str]]:
    """The texts of a template, ``{"text": …}`` or ``{"error": …}`` for each probe.

    Args:
        request: ``template``, ``tokens`` (the special ones, by name), and ``probes``: keyword arguments of each
            rendering (``messages`` and whatever else the template asks for).
    """
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant says, for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> Node | list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    _limit_resources()
    results: list[dict[str, str]] = []
    try:
        extensions = [loopcontrols, Generation]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = to_json
        environment.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda strftime_format: f"\0{strftime_format}\0",
        }
        compiled = environment.from_string(request["template"])
    except Exception as error:  # whatever a foreign template does is its fault
        return [{"error": _error_line(error)}] * len(request["probes"])
    for probe in request["probes"]:
        try:
            text = compiled.render(**{"tools": None, "documents": None, **request["tokens"], **probe})
            results.append({"text": text} if len(text) <= TEXT_CHARS else {"error": "the text is too long"})
        except Exception as error:
            results.append({"error": _error_line(error)})
    return results


def _error_line(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _limit_resources() -> None:
    """Bound what this process can take."""
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # a lower limit stands already
            resource.setrlimit(limit, (value, value))


if __name__ == "__main__":
    json.dump(render(json.load(sys.stdin)), sys.stdout)

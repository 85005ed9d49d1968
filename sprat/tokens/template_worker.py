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

MEMORY_BYTES, CPU_SECONDS, TEXT_CHARS = 1 << 29, 3, 1 << 16


def render(job: dict[str, Any]) -> list[dict[str, str]]:
    """The texts of a template, ``{"text": …}`` or ``{"error": …}`` for each probe.

    Args:
        job: ``template``, ``tokens`` (the special ones, by name), and ``probes``: keyword arguments of each rendering
            (``messages`` and whatever else the template asks for).
    """
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
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

    _confine()
    found: list[dict[str, str]] = []
    try:
        extensions = [loopcontrols, Generation]
        surroundings = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        surroundings.filters["tojson"] = to_json
        surroundings.globals |= {"raise_exception": refuse, "strftime_now": lambda how: f"\0{how}\0"}
        compiled = surroundings.from_string(job["template"])
    except Exception as error:  # whatever a foreign template does is its fault
        return [{"error": _said(error)}] * len(job["probes"])
    for probe in job["probes"]:
        try:
            text = compiled.render(**job["tokens"], tools=None, documents=None, **probe)
            found.append({"text": text} if len(text) <= TEXT_CHARS else {"error": "the text is too long"})
        except Exception as error:
            found.append({"error": _said(error)})
    return found


def _said(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _confine() -> None:
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

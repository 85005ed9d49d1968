"""The form that an answer's content must have, as text that any process can read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sprat.errors import EngineError

if TYPE_CHECKING:
    from sprat.tokens.tool_formats import ToolFormat


@dataclass(frozen=True)
class Response:
    """The form that the content of an answer must have (the reasoning is free).

    Attributes:
        kind: which language ``source`` is written in; ``auto_tools``: free text may stand before the calls.
        source: a JSON schema as JSON text, a regular expression, a JSON list of strings, or what ``tool_calls`` writes.
    """

    kind: Literal["schema", "regex", "choice", "tools", "auto_tools"]
    source: str

    def __post_init__(self) -> None:
        """Check the kind and that there is something to follow."""
        if (
            self.kind not in ("schema", "regex", "choice", "tools", "auto_tools")
            or not isinstance(self.source, str)
            or not self.source
        ):
            fault = f"{self.kind!r} is no form of a response"
            raise EngineError(fault, where="response", todo="use a JSON schema, a regex, a choice or tool calls")

    @classmethod
    def json(cls, schema: Mapping[str, Any] | str | None = None) -> Response:
        """A JSON value that ``schema`` describes; any JSON object without one.

        Raises:
            EngineError: ``schema`` cannot be written as JSON.
        """
        if isinstance(schema, str):
            return cls("schema", schema)
        try:
            return cls("schema", json.dumps({"type": "object"} if schema is None else dict(schema)))
        except (TypeError, ValueError, RecursionError) as error:
            raise EngineError(f"the schema is no JSON: {error}", where="response", todo="give a JSON schema") from None

    @classmethod
    def regex(cls, pattern: str) -> Response:
        r"""Text that ``pattern`` matches as a whole.

        Rust's syntax, without back-references and look-around; ``\d`` is ``[0-9]``, ``\w`` is ``[0-9A-Za-z_]``, and
        ``\s`` is ECMA-262's.
        """
        return cls("regex", pattern)

    @classmethod
    def choice(cls, options: Sequence[str]) -> Response:
        """One of ``options``, word by word.

        Raises:
            EngineError: there is no option, or one is not text or is empty.
        """
        if isinstance(options, str) or not options or not all(isinstance(item, str) and item for item in options):
            raise EngineError("a choice needs texts to choose from", where="response", todo="give a list of strings")
        return cls("choice", json.dumps(list(options)))

    @classmethod
    def tool_calls(
        cls,
        tools: Sequence[Mapping[str, Any]],
        tool_format: ToolFormat,
        *,
        choice: str = "required",
        name: str = "",
        parallel: bool = True,
        form: Mapping[str, Any] | None = None,
    ) -> Response:
        """Calls of ``tools``, as the model's family writes them (``tokens.tool_formats``).

        Arguments follow the schema of their tool where it can be compiled, else they are any JSON object; a tool that
        is ``strict`` needs a schema that can be.

        Args:
            tools: ``name`` of each, ``parameters`` (a JSON schema of an object; none: no arguments), and ``strict``.
            choice: ``required``: the content is calls and nothing else; ``named``: it is calls of the tool ``name``;
                ``auto``: it is free text, but a call that was opened is one, and only calls follow it.
            parallel: whether one call may follow another.
            form: with auto, a JSON schema: the content is a value that it describes, or it is calls.

        Raises:
            EngineError: there is no such tool, two have one name, a name or a schema cannot be written as JSON, or
                ``choice`` is auto and the format has no tags, or there is a form and calls are required.
        """
        if choice not in ("auto", "required", "named"):
            raise EngineError(f"{choice!r} is no choice of tools", where="tools", todo="use auto, required or named")
        if choice == "auto" and not tool_format.has_tags:
            todo = "require a call, or name one"
            raise EngineError(
                "this model cannot choose whether to call: its calls have no tags", where="tools", todo=todo
            )
        if form is not None and choice != "auto":
            raise EngineError("a call has a form of its own", where="response", todo="leave the form out")
        rows = [_tool(row) for row in tools if choice != "named" or row.get("name") == name]
        if not rows or len({row["name"] for row in rows}) < len(rows):
            fault = (
                "two tools have the same name" if rows else f"there is no tool {name!r}" if name else "there is no tool"
            )
            raise EngineError(fault, where="tools", todo="give tools with different names")
        strings = {key: getattr(tool_format, key) for key in ("calls", "call", "separator", "body", "is_json")}
        source = {"format": strings, "tools": rows, "parallel": parallel and tool_format.parallel, "form": form}
        try:
            return cls("auto_tools" if choice == "auto" and form is None else "tools", json.dumps(source))
        except (TypeError, ValueError, RecursionError) as error:
            raise EngineError(f"the tools are no JSON: {error}", where="tools", todo="give JSON schemas") from None

    @property
    def shapes_content(self) -> bool:
        """Whether all of the content has the form; not so where calls may stand behind free text."""
        return self.kind != "auto_tools"

    @property
    def language(self) -> str:
        """What ``source`` is written in."""
        return self.kind.removeprefix("auto_")


def _tool(row: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as ``Response.tool_calls`` keeps it."""
    name = row.get("name")
    if not isinstance(name, str) or not name:
        raise EngineError(f"a tool cannot be named {name!r:.80}", where="tools", todo="give it a name")
    return {"name": name, "parameters": row.get("parameters") or {}, "strict": bool(row.get("strict"))}

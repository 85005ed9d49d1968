"""The tools of chat completions, and which of them are called; functions are read as for Responses."""

from __future__ import annotations

import re

from sprat.serve.custom_tools import custom_tool, read_pattern
from sprat.serve.fields import Reader
from sprat.serve.generation import Tool, ToolChoice

MAX_TOOLS = 128
TOOL_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
KINDS = ("function", "custom")


def read_tools(reader: Reader) -> tuple[Tool, ...]:
    """``tools``: functions, and custom tools, which take a text."""
    tools: list[Tool] = []
    for row in reader.objects("tools", most=MAX_TOOLS) or ():
        kind = row.text("type") or "function"
        if kind not in KINDS:
            raise row.not_offered("type", f"tools of the type {kind!r:.40}")
        inner = row.required(kind, row.object(kind))
        tool = read_function(inner) if kind == "function" else read_custom(inner, "grammar")
        if tool.name in [other.name for other in tools]:
            raise inner.error("name", f"{tool.name!r} comes twice")
        tools.append(tool)
    return tuple(tools)


def read_function(row: Reader) -> Tool:
    """A function's name, description, schema and whether it is strict."""
    return Tool(_name(row), row.text("description") or "", row.mapping("parameters"), bool(row.flag("strict")))


def read_custom(row: Reader, grammar: str = "") -> Tool:
    """A custom tool's name, description and format; ``grammar`` is as in ``custom_tools.read_pattern``."""
    return custom_tool(_name(row), row.text("description") or "", *read_pattern(row, grammar))


def _name(row: Reader) -> str:
    name = row.required("name", row.text("name"))
    if not TOOL_NAME.fullmatch(name):
        raise row.error("name", "must have 1 to 64 letters, digits, dots, dashes and underscores")
    return name


def read_tool_choice(reader: Reader, tools: tuple[Tool, ...]) -> tuple[ToolChoice, tuple[Tool, ...]]:
    """``tool_choice``: a mode, a tool by name, or a mode for some; and the tools that the model is shown."""
    if isinstance(reader.body.get("tool_choice"), dict):
        row = reader.object("tool_choice")
        assert row is not None
        if row.required("type", row.choice("type", (*KINDS, "allowed_tools"))) != "allowed_tools":
            return ToolChoice("named", _chosen(row, tools)), tools
        allowed = row.required("allowed_tools", row.object("allowed_tools"))
        among = allowed.required("mode", allowed.choice("mode", ("auto", "required")))
        rows = allowed.required("tools", allowed.objects("tools"))
        names = {_chosen(each, tools) for each in rows}
        if not names:
            raise allowed.error("tools", "names no tool")
        return ToolChoice(among), tuple(tool for tool in tools if tool.name in names)  # type: ignore[arg-type]
    mode = reader.choice("tool_choice", ("none", "auto", "required"))
    if mode == "required" and not tools:
        raise reader.error("tool_choice", "there are no tools to call")
    return ToolChoice(mode or "auto"), tools  # type: ignore[arg-type]


def _chosen(row: Reader, tools: tuple[Tool, ...]) -> str:
    """The name of the tool that ``row`` refers to."""
    kind = row.choice("type", KINDS) or "function"
    inner = row.required(kind, row.object(kind))
    name = inner.required("name", inner.text("name"))
    if name not in [tool.name for tool in tools if tool.is_custom == (kind == "custom")]:
        raise inner.error("name", f"no {kind} tool is called {name[:64]!r}")
    return name

"""The tools of OpenAI's Responses, and which of them are called.

There are functions and custom tools, also in namespaces: agents put the tools of each MCP server into one. Models know
no namespaces, so to them such a tool has a longer name. Tools that only somebody else's server could run are ignored
beside these, as agents list all that they have, and refused alone; so are custom tools with a format in Lark's syntax.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from sprat.serve.custom_tools import LARK
from sprat.serve.errors import RequestError
from sprat.serve.fields import Reader, shorten
from sprat.serve.generation import Tool, ToolChoice
from sprat.serve.openai_tools import KINDS, MAX_TOOLS, read_custom, read_function

MAX_NAMESPACE = 64  # characters
ADDED_TOOLS = "additional_tools"  # an item with tools beside those of the request
_CHOICES: Mapping[str, ToolChoice] = {
    "auto": ToolChoice("auto"),
    "none": ToolChoice("none"),
    "required": ToolChoice("required"),
}


def read_tools(reader: Reader) -> tuple[tuple[Tool, ...], tuple[str, ...]]:
    """The tools that are had, and the paths of those that are not; the latter alone are refused."""
    tools: dict[str, Tool] = {}
    others: dict[str, RequestError] = {}
    for namespace, item in _listed(reader):
        if (refusal := _refusal(item)) is not None:
            item.known(*item.body)
            others[item.path] = refusal
            continue
        tool = read_function(item) if item.body["type"] == "function" else read_custom(item)
        if namespace:
            tool = replace(tool, name=qualified(namespace, tool.name), namespace=namespace, member=tool.name)
        if tool.name in tools:
            raise item.error("name", "stands twice; names of tools must be unique")
        tools[tool.name] = tool
    if len(tools) > MAX_TOOLS:
        raise reader.error("tools", f"must have at most {MAX_TOOLS} tools, not {len(tools)}")
    if others and not tools and reader.raw("tools"):
        raise next(iter(others.values()))
    return tuple(tools.values()), tuple(others)


def qualified(namespace: str, name: str) -> str:
    """The name by which a model knows a tool of a namespace.

    >>> qualified("mcp__files", "read"), qualified("mcp__files__", "read"), qualified("", "read")
    ('mcp__files__read', 'mcp__files__read', 'read')
    """
    return f"{namespace.removesuffix('__')}__{name}" if namespace else name


def _listed(reader: Reader) -> Iterator[tuple[str, Reader]]:
    """All tools, each with the name of its namespace, or ""."""
    for item in [*(reader.objects("tools") or ()), *_added_tools(reader)]:
        if item.required("type", item.text("type")) != "namespace":
            yield "", item
            continue
        name = item.required("name", item.text("name", longest=MAX_NAMESPACE))
        item.known("description")
        for member in item.required("tools", item.objects("tools")):
            yield name, member


def _refusal(item: Reader) -> RequestError | None:
    """Why a tool is not had, where it is not; what is wrong with one that would be is raised when it is read."""
    kind = item.required("type", item.text("type"))
    if kind not in KINDS:
        return item.not_offered("type", f"the tool {shorten(kind)!r}, only functions and custom tools")
    form = item.body.get("format") if kind == "custom" else None
    if not isinstance(form, dict) or form.get("type") != "grammar" or form.get("syntax") != "lark":
        return None
    grammar = item.required("format", item.object("format"))
    return grammar.not_offered("syntax", LARK)


def _added_tools(reader: Reader) -> list[Reader]:
    """Tools that come as items, which agents add to those of the request."""
    items = reader.objects("input") if isinstance(reader.raw("input"), list) else None
    rows: list[Reader] = []
    for item in items or ():
        if item.body.get("type") == ADDED_TOOLS:
            item.known("type", "role")
            rows += item.required("tools", item.objects("tools"))
    return rows


def read_tool_choice(reader: Reader, tools: tuple[Tool, ...]) -> tuple[ToolChoice, tuple[Tool, ...]]:
    """Which tools are called, and which of them the model is shown."""
    if reader.raw("tool_choice") is None:
        return ToolChoice(), tools
    if isinstance(reader.raw("tool_choice"), str):
        mode = reader.required("tool_choice", reader.choice("tool_choice", tuple(_CHOICES)))
        if mode == "required" and not tools:
            raise reader.error("tool_choice", "'required' needs tools, and there are none")
        return _CHOICES[mode], tools
    choice = reader.required("tool_choice", reader.object("tool_choice"))
    kind = choice.required("type", choice.text("type"))
    if kind in KINDS:
        return ToolChoice("named", _chosen(choice, tools)), tools
    if kind != "allowed_tools":
        raise choice.not_offered("type", f"the choice {shorten(kind)!r}")
    mode = choice.required("mode", choice.choice("mode", ("auto", "required")))
    allowed = {_chosen(item, tools) for item in choice.required("tools", choice.objects("tools"))}
    if not allowed:
        raise choice.error("tools", "names no tool")
    return _CHOICES[mode], tuple(tool for tool in tools if tool.name in allowed)


def _chosen(item: Reader, tools: tuple[Tool, ...]) -> str:
    """The name of the tool that ``item`` refers to."""
    is_custom = item.text("type") == "custom"
    name = item.required("name", item.text("name"))
    if name not in {tool.name for tool in tools if tool.is_custom == is_custom}:
        raise item.error("name", f"names none of the {'custom tools' if is_custom else 'functions'}")
    return name

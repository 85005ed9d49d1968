"""The tools of Anthropic's Messages, and which of them are called.

There are tools with an ``input_schema``. Those that Anthropic's models know by their type alone, or their servers run,
are ignored beside these, as agents list all that they have, and refused alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from sprat.serve.errors import RequestError
from sprat.serve.fields import Reader, shorten
from sprat.serve.generation import Tool, ToolChoice

_CHOICES: Mapping[str, ToolChoice] = {
    "auto": ToolChoice("auto"),
    "any": ToolChoice("required"),
    "none": ToolChoice("none"),
}


def read_tools(reader: Reader) -> tuple[tuple[Tool, ...], tuple[str, ...]]:
    """The caller's own tools, and the paths of others; those alone are refused."""
    tools: dict[str, Tool] = {}
    others: dict[str, RequestError] = {}
    for item in reader.objects("tools") or ():
        kind = item.text("type")
        if kind not in (None, "custom"):
            what = f"the tool {shorten(kind)!r}, only tools of your own with an input_schema"
            others[item.path] = item.not_offered("type", what)
            item.known(*item.body)
            continue
        name = item.required("name", item.text("name", longest=128))
        if not name or name in tools:
            raise item.error("name", "is empty" if not name else "stands twice; names of tools must be unique")
        item.known("cache_control")
        schema = item.required("input_schema", item.mapping("input_schema"))
        tools[name] = Tool(name, item.text("description") or "", schema, strict=bool(item.flag("strict")))
    if others and not tools:
        raise next(iter(others.values()))
    return tuple(tools.values()), tuple(others)


def read_tool_choice(reader: Reader, tools: tuple[Tool, ...]) -> tuple[ToolChoice, bool]:
    """Which tools are called, and whether several may be."""
    choice = reader.object("tool_choice")
    if choice is None:
        return ToolChoice(), True
    kind = choice.required("type", choice.choice("type", (*_CHOICES, "tool")))
    parallel = not choice.flag("disable_parallel_tool_use")
    if kind in ("any", "tool") and not tools:
        raise choice.error("type", f"{kind!r} needs tools, and there are none")
    if kind != "tool":
        return _CHOICES[kind], parallel
    name = choice.required("name", choice.text("name"))
    if name not in {tool.name for tool in tools}:
        raise choice.error("name", "names none of the tools")
    return ToolChoice("named", name), parallel

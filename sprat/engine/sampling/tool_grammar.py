"""The grammar of tool calls: fixed strings of the model's family around arguments that follow a schema each.

Where the model may choose, everything is allowed until it opens a call. The rule ``head`` is lazy: the first opening
tag ends it, so that what follows is a call whatever the text before was, and behind calls only calls may follow.
Without tags there is nothing to wait for, so there the first call stands at the beginning. So it does where the content
has a form: it is either a value of that schema or calls, as the first character says.

Each schema has the bounds of one that is given alone (``grammar_source``). One that cannot be translated or compiled
is an error only for a tool that is ``strict``; of the others any JSON object is taken. A tool without a schema has no
arguments. Where a schema names properties and does not say whether there may be others, there are none: a model that
is made to call shall not have to think of names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from sprat.engine.sampling.grammar_source import MAX_SOURCE, MAX_WORK, grammar_error, refuse_number, translate_schema
from sprat.engine.sampling_params import Response
from sprat.errors import EngineError

MAX_TOOLS, MAX_TOOLS_SOURCE = 128, 4 * MAX_SOURCE
MIN_WORK = MAX_WORK // 64  # that each of many schemas may cost at least
ANY_OBJECT: dict[str, Any] = {"type": "object"}
_OPENING_KEYS = (
    "patternProperties",
    "allOf",
    "anyOf",
    "oneOf",
    "$ref",
    "if",
    "dependentSchemas",
    "unevaluatedProperties",
)


def translate_tools(response: Response) -> Iterator[str]:
    """The source as it is compiled, then, where some tools are not strict, one that asks nothing of their arguments.

    Raises:
        EngineError: there are too many tools, or the schema of a strict one cannot be used.
    """
    if len(response.source) > MAX_TOOLS_SOURCE:
        raise EngineError("the tools are too long", where="tools", todo=f"use {MAX_TOOLS_SOURCE >> 10} KiB at most")
    source = json.loads(response.source, parse_float=Decimal, parse_constant=refuse_number)
    tools = source["tools"]
    if len(tools) > MAX_TOOLS:
        raise EngineError(f"there are {len(tools)} tools", where="tools", todo=f"give {MAX_TOOLS} at most")
    work = max(MAX_WORK // len(tools), MIN_WORK)
    schemas = [_arguments_schema(response, tool, work) for tool in tools]
    forms = [] if source["form"] is None else [_form_schema(source["form"])]
    rules = _rules(source, is_auto=response.kind == "auto_tools")
    yield json.dumps({"rules": rules, "schemas": [*schemas, *forms]}, default=float)
    looser = [schema if tool["strict"] else ANY_OBJECT for tool, schema in zip(tools, schemas, strict=True)]
    if looser != schemas:
        yield json.dumps({"rules": rules, "schemas": [*looser, *forms]}, default=float)


def _form_schema(schema: dict[str, Any]) -> Any:
    """The schema of the content where no tool is called.

    Raises:
        EngineError: it cannot be used.
    """
    try:
        if len(json.dumps(schema, default=float)) > MAX_SOURCE:
            raise ValueError("it is too long")
        return translate_schema(schema)
    except (ValueError, EngineError) as error:
        raise EngineError(
            f"the schema cannot be used: {error}", where="response", todo="correct or simplify it"
        ) from None


def _arguments_schema(response: Response, tool: dict[str, Any], max_work: int) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object.

    Raises:
        EngineError: it cannot be used, and the tool is strict.
    """
    schema = tool["parameters"]
    try:
        if len(json.dumps(schema, default=float)) > MAX_SOURCE:
            raise ValueError("the schema is too long")
        types = schema.get("type", "object") if isinstance(schema, dict) else None
        if types != "object" and not (isinstance(types, list) and "object" in types):
            raise ValueError("its schema is none of an object")
        schema = schema or {"properties": {}}
        closes = "properties" in schema and not any(key in schema for key in _OPENING_KEYS)
        closed = {"additionalProperties": False} if closes else {}
        translated: dict[str, Any] = translate_schema({**closed, **schema, "type": "object"}, max_work)
        return translated
    except (ValueError, EngineError) as error:
        if tool["strict"]:
            raise grammar_error(response, f"{tool['name']}: {error}") from None
        return ANY_OBJECT


def _rules(source: dict[str, Any], *, is_auto: bool) -> str:
    """The rules around the arguments, which are ``args_0`` and so on; the last is an answer that calls nothing."""
    form = source["format"]
    (first, last), (opening, closing), (before, between, after) = form["calls"], form["call"], form["body"]
    lines = ["%llguidance {}"]
    for index, tool in enumerate(source["tools"]):
        name = json.dumps(tool["name"])[1:-1] if form["is_json"] else tool["name"]
        lines.append(f"call_{index}: {_literal(before + name + between)} args_{index} {_literal(after + closing)}")
    lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(source["tools"]))))
    more = f"({_literal(form['separator'] + opening)} call)*" if source["parallel"] else ""
    calls = f"call {more} {_literal(last)}"
    if is_auto:
        begin = first or opening
        lines += ["TEXT: /(?s:.)*/", f"head[lazy]: TEXT {_literal(begin)}"]
        lines.append(f"start: TEXT | head {_literal(opening) if first else ''} {calls}")
    else:  # the form is the last schema
        form_rule = "" if source["form"] is None else f"args_{len(source['tools'])} | "
        lines.append(f"start: {form_rule}{_literal(first + opening)} {calls}")
    return "\n".join(lines)


def _literal(text: str) -> str:
    """A string of the grammar; nothing for an empty one."""
    return json.dumps(text) if text else ""

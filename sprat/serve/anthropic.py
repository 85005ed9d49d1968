"""Anthropic's Messages: the body of ``POST /v1/messages`` and of ``/v1/messages/count_tokens`` as a ``Generation``.

The conversation is read in ``anthropic_turns``, the tools in ``anthropic_tools``.

A request that does not mention ``thinking`` does without: such clients read the first block as the answer. A request
may ask for more tokens than the context holds and gets what there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sprat.serve.anthropic_tools import read_tool_choice, read_tools
from sprat.serve.anthropic_turns import read_turns
from sprat.serve.fields import Reader
from sprat.serve.generation import Generation

MAX_STOPS, MAX_STOP_LENGTH = 64, 256  # as many as the engine takes
_PATHS = {
    "messages": "messages",
    "thinking": "thinking",
    "max_tokens": "max_tokens",
    "max_think_tokens": "thinking.budget_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
}
_STATE = ("container", "mcp_servers", "thread")  # what they keep or call, and we do not


def parse_messages(body: Mapping[str, Any]) -> Generation:
    """What a body of ``POST /v1/messages`` asks for.

    Raises:
        RequestError: 400; a field is wrong, missing, or of what is not had here; it is named by its JSON path.
    """
    reader = Reader(body)
    generation = _conversation(reader)
    sampling: dict[str, Any] = {"fit": True}
    for name, low, high, above in (("temperature", 0, 2, False), ("top_p", 0, 1, True)):
        if (value := reader.number(name, low, high, above=above)) is not None:
            sampling[name] = value
    for name, low, high in (("top_k", 0, 2**31 - 1), ("seed", -(2**63), 2**63 - 1)):  # the seed is an extension
        if (count := reader.integer(name, low, high)) is not None:
            sampling[name] = count
    if stops := reader.texts("stop_sequences", most=MAX_STOPS, longest=MAX_STOP_LENGTH):
        sampling["stop"] = stops
    metadata = reader.object("metadata")
    return replace(
        generation,
        max_tokens=reader.required("max_tokens", reader.integer("max_tokens", 1, 2**31 - 1)),
        sampling=sampling,
        stream=bool(reader.flag("stream")),
        user=(metadata.text("user_id") if metadata else None) or "",
        ignored=(*reader.rest(), *generation.ignored),
    )


def parse_count_tokens(body: Mapping[str, Any]) -> Generation:
    """What a body of ``POST /v1/messages/count_tokens`` asks to count; raises as ``parse_messages``."""
    reader = Reader(body)
    generation = _conversation(reader)
    return replace(generation, ignored=(*reader.rest(), *generation.ignored))


def _conversation(reader: Reader) -> Generation:
    """What both bodies have: the model, the turns, the tools, whether to think, and the form of the answer."""
    for name in _STATE:
        if reader.raw(name):
            raise reader.not_offered(name)
    turns = read_turns(reader)
    continues = turns[-1].role == "assistant"
    if continues and turns[-1].tool_calls:
        last = len(reader.body["messages"]) - 1
        raise reader.error(f"messages[{last}]", "calls tools, and no tool_result follows", code="invalid_messages")
    if continues and not (turns[-1].content or turns[-1].reasoning) and len(turns) > 1:
        turns, continues = turns[:-1], False  # an empty beginning is none
    (tools, others), (thinking, budget, wishes) = read_tools(reader), _thinking(reader)
    tool_choice, parallel = read_tool_choice(reader, tools)
    response_format, paths = _response_format(reader), dict(_PATHS)
    if reader.has("output_format"):
        paths["response_format"] = "output_format"
    if continues and response_format is not None:
        raise reader.error(
            paths["response_format"],
            "has no beginning where an assistant's message is gone on with; end with the user's",
        )
    return Generation(
        model=reader.required("model", reader.text("model", longest=256)),
        messages=tuple(turns),
        continues=continues,
        thinking=thinking,
        thinking_wishes=wishes,
        max_think_tokens=budget,
        response_format=response_format,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel,
        paths=paths,
        ignored=others,
    )


def _thinking(reader: Reader) -> tuple[bool | None, int | None, tuple[str, ...]]:
    """Whether to think, with how many tokens, and where that is wished. An effort alone says: as the model likes."""
    config, output = reader.object("thinking"), reader.object("output_config")
    effort = output.choice("effort", ("low", "medium", "high", "xhigh", "max")) if output else None
    wishes = ("output_config.effort",) if effort else ()
    if config is None:
        return (None if effort else False), None, wishes
    kind = config.required("type", config.choice("type", ("enabled", "disabled", "adaptive", "between_tools")))
    budget = config.integer("budget_tokens", 1, 2**31 - 1)
    if kind == "disabled":
        return False, None, wishes
    return (True if kind == "enabled" else None), budget, ("thinking", *wishes)


def _response_format(reader: Reader) -> Mapping[str, Any] | None:
    """The form of the answer: ``output_config.format``, once ``output_format``."""
    output = reader.object("output_config")
    form = (output.object("format") if output else None) or reader.object("output_format")
    if form is None:
        return None
    kind = form.required("type", form.choice("type", ("json_schema",)))
    return {"type": kind, "schema": form.required("schema", form.mapping("schema"))}

"""Anthropic's Messages: the body of ``POST /v1/messages`` and of ``/v1/messages/count_tokens`` as a ``Generation``.

A message of theirs is a list of blocks, one of ours is a role and a text. What falls apart: a user's turn may hold
several ``tool_result`` blocks, each of which becomes a turn of the role ``tool``. What comes together: turns of one
role in a row are one turn, as their documentation has it. Blocks of text are paragraphs, so they are joined by a line
break, but for the assistant's, which are what it said without a gap. ``thinking`` blocks come back as reasoning, which
the chat format shows or leaves out; their signature means nothing here, and redacted ones say nothing.

A request that does not mention ``thinking`` does without: such clients read the first block as the answer. A request
may ask for more tokens than the context holds and gets what there is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sprat.serve.errors import RequestError
from sprat.serve.fields import Reader, shorten
from sprat.serve.generation import Generation, Tool, ToolChoice
from sprat.tokens.chat import Message, ToolCall

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
_PATHS = {
    "messages": "messages",
    "thinking": "thinking",
    "max_tokens": "max_tokens",
    "max_think_tokens": "thinking.budget_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
}
_STATE = ("container", "mcp_servers", "thread")  # what they keep or call, and we do not
_CHOICES: Mapping[str, ToolChoice] = {
    "auto": ToolChoice("auto"),
    "any": ToolChoice("required"),
    "none": ToolChoice("none"),
}


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
        ignored=reader.rest(),
    )


def parse_count_tokens(body: Mapping[str, Any]) -> Generation:
    """What a body of ``POST /v1/messages/count_tokens`` asks to count; raises as ``parse_messages``."""
    reader = Reader(body)
    return replace(_conversation(reader), ignored=reader.rest())


def _conversation(reader: Reader) -> Generation:
    """What both bodies have: the model, the turns, the tools, whether to think, and the form of the answer."""
    for name in _STATE:
        if reader.raw(name):
            raise reader.not_offered(name)
    turns = _turns(reader)
    continues = turns[-1].role == "assistant"
    if continues and turns[-1].tool_calls:
        last = len(reader.body["messages"]) - 1
        raise reader.error(f"messages[{last}]", "calls tools, and no tool_result follows", code="invalid_messages")
    if continues and not (turns[-1].content or turns[-1].reasoning) and len(turns) > 1:
        turns, continues = turns[:-1], False  # an empty beginning is none
    thinking, budget = _thinking(reader)
    tools = _tools(reader)
    tool_choice, parallel = _tool_choice(reader, tools)
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
        max_think_tokens=budget,
        response_format=response_format,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel,
        paths=paths,
    )


def _turns(reader: Reader) -> list[Message]:
    """The conversation, the system's prompt first; turns of one role in a row are one."""
    runs: list[list[Message]] = []
    if system := _text(reader, "system"):
        runs.append([Message("system", system)])
    for message in reader.required("messages", reader.objects("messages")):
        role = message.required("role", message.choice("role", tuple(_ROLES)))
        for turn in _ROLES[role](message):
            last = runs[-1][-1] if runs else None
            if last and last.role == turn.role != "tool" and not last.tool_calls:
                runs[-1].append(turn)
            else:
                runs.append([turn])
    if not runs or runs[-1][-1].role == "system":
        raise reader.error("messages", "needs at least one message to answer")
    return [_merge(run) for run in runs]


def _merge(turns: list[Message]) -> Message:
    """Turns of one role, as one."""
    reasoning = "\n".join(turn.reasoning for turn in turns if turn.reasoning) or None
    content = "\n".join(turn.content for turn in turns if turn.content)
    return replace(turns[-1], content=content, reasoning=reasoning)


def _blocks(owner: Reader, name: str) -> list[Reader]:
    """The blocks of a content; a string is one block of text."""
    value = owner.raw(name)
    if isinstance(value, str):
        return [Reader({"type": "text", "text": value}, owner.path)]
    return owner.objects(name) or []


def _block_text(block: Reader) -> str:
    """The text of a block that must be one of text."""
    kind = _kind(block)
    if kind != "text":
        raise _refusal(block, kind)
    block.known("citations", "cache_control")
    return block.required("text", block.text("text"))


def _kind(block: Reader) -> str:
    return block.required("type", block.text("type"))


def _refusal(block: Reader, kind: str) -> RequestError:
    """What is said to a block that cannot be read: of pictures and files, the source is named."""
    return block.not_offered("source" if block.has("source") else "type", f"blocks of type {shorten(kind)!r}")


def _text(owner: Reader, name: str) -> str:
    """Blocks of text, as one."""
    return "\n".join(filter(None, map(_block_text, _blocks(owner, name))))


def _system_turns(message: Reader) -> list[Message]:
    return [Message("system", _text(message, "content"))]


def _user_turns(message: Reader) -> list[Message]:
    """A user's message: what tools answered, each a turn of its own, and what the user says, in their order."""
    turns: list[Message] = []
    texts: list[str] = []
    for block in _blocks(message, "content"):
        if _kind(block) == "tool_result":
            if texts:
                turns.append(Message("user", "\n".join(texts)))
                texts = []
            turns.append(_tool_turn(block))
        elif text := _block_text(block):
            texts.append(text)
    if texts:
        turns.append(Message("user", "\n".join(texts)))
    if not turns:
        raise message.error("content", "is empty")
    return turns


def _tool_turn(block: Reader) -> Message:
    """What a tool answered; that it failed is said in words, as no chat format has a sign for it."""
    call_id = block.required("tool_use_id", block.text("tool_use_id"))
    block.known("cache_control")
    text = _text(block, "content")
    if block.flag("is_error"):
        text = f"Error: {text}" if text else "Error"
    return Message("tool", text, tool_call_id=call_id)


def _assistant_turns(message: Reader) -> list[Message]:
    """An assistant's message: its thinking, what it said, and what it called."""
    texts, reasoning, calls = [], [], []
    for block in _blocks(message, "content"):
        kind = _kind(block)
        if kind == "thinking":
            reasoning.append(block.required("thinking", block.text("thinking")))
            block.known("signature")
        elif kind == "redacted_thinking":
            block.known("data")
        elif kind == "tool_use":
            calls.append(_tool_call(block))
        else:
            texts.append(_block_text(block))
    return [Message("assistant", "".join(texts), "\n".join(filter(None, reasoning)) or None, tuple(calls))]


def _tool_call(block: Reader) -> ToolCall:
    block.known("caller", "cache_control")
    arguments = block.required("input", block.mapping("input"))
    name = block.required("name", block.text("name"))
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False), block.required("id", block.text("id")))


_ROLES: Mapping[str, Callable[[Reader], list[Message]]] = {
    "user": _user_turns,
    "assistant": _assistant_turns,
    "system": _system_turns,
}


def _thinking(reader: Reader) -> tuple[bool | None, int | None]:
    """Whether to think, and with how many tokens. An effort without more says: as the model likes."""
    config, output = reader.object("thinking"), reader.object("output_config")
    effort = output.choice("effort", ("low", "medium", "high", "xhigh", "max")) if output else None
    if config is None:
        return (None if effort else False), None
    kind = config.required("type", config.choice("type", ("enabled", "disabled", "adaptive")))
    budget = config.integer("budget_tokens", 1, 2**31 - 1)
    if kind == "disabled":
        return False, None
    return (True if kind == "enabled" else None), budget


def _response_format(reader: Reader) -> Mapping[str, Any] | None:
    """The form of the answer: ``output_config.format``, once ``output_format``."""
    output = reader.object("output_config")
    form = (output.object("format") if output else None) or reader.object("output_format")
    if form is None:
        return None
    kind = form.required("type", form.choice("type", ("json_schema",)))
    return {"type": kind, "schema": form.required("schema", form.mapping("schema"))}


def _tools(reader: Reader) -> tuple[Tool, ...]:
    tools: dict[str, Tool] = {}
    for item in reader.objects("tools") or ():
        kind = item.text("type")
        if kind not in (None, "custom"):
            raise item.not_offered("type", f"the tool {shorten(kind)!r}, only tools of your own with an input_schema")
        name = item.required("name", item.text("name", longest=128))
        if not name or name in tools:
            raise item.error("name", "is empty" if not name else "stands twice; names of tools must be unique")
        item.known("cache_control")
        schema = item.required("input_schema", item.mapping("input_schema"))
        tools[name] = Tool(name, item.text("description") or "", schema, strict=bool(item.flag("strict")))
    return tuple(tools.values())


def _tool_choice(reader: Reader, tools: tuple[Tool, ...]) -> tuple[ToolChoice, bool]:
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

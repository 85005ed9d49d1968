"""The conversation of a body of Anthropic's Messages.

A message of theirs is a list of blocks, one of ours is a role and a text. What falls apart: a user's turn may hold
several ``tool_result`` blocks, each of which becomes a turn of the role ``tool``. What comes together: turns of one
role in a row are one turn, as their documentation has it, and all that the system says, which agents also put between
and behind the turns, stands first. Blocks of text are paragraphs, so they are joined by a line break, but for the
assistant's, which are what it said without a gap. ``thinking`` blocks come back as reasoning, which the chat format
shows or leaves out; their signature means nothing here, and redacted ones say nothing.

Pictures and files are refused where the user sends them. In what a tool answered a note stands in their place: there
nobody can leave them out, and they would be sent with every further request of the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

from sprat.serve.errors import RequestError
from sprat.serve.fields import Reader, shorten
from sprat.serve.generation import left_out
from sprat.tokens.chat import Message, ToolCall

BILLING = "x-anthropic-billing-header:"  # with which Claude Code's first block begins


def read_turns(reader: Reader) -> list[Message]:
    """The conversation, the system's prompt first; turns of one role in a row are one."""
    systems = ["\n".join(filter(None, map(_block_text, _system_blocks(reader))))]
    runs: list[list[Message]] = []
    for message in reader.required("messages", reader.objects("messages")):
        role = message.required("role", message.choice("role", (*_ROLES, *_SYSTEMS)))
        if role in _SYSTEMS:
            systems.append(_text(message, "content"))
            continue
        for turn in _ROLES[role](message):
            last = runs[-1][-1] if runs else None
            if last and last.role == turn.role != "tool" and not last.tool_calls:
                runs[-1].append(turn)
            else:
                runs.append([turn])
    if not runs:
        raise reader.error("messages", "needs at least one message to answer")
    system = "\n\n".join(filter(None, systems))
    return [*([Message("system", system)] if system else []), *map(_merge, runs)]


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


def _system_blocks(reader: Reader) -> list[Reader]:
    """The system's prompt without what is none: a line for the books of Anthropic, another one in each conversation.

    It would stand before all that conversations have in common, and none could use what is cached of another one.
    """
    return [row for row in _blocks(reader, "system") if not str(row.body.get("text", "")).startswith(BILLING)]


def _kind(block: Reader) -> str:
    return block.required("type", block.text("type"))


def _block_text(block: Reader) -> str:
    """The text of a block that must be one of text."""
    kind = _kind(block)
    if kind != "text":
        raise _refusal(block, kind)
    block.known("citations", "cache_control")
    return block.required("text", block.text("text"))


def _refusal(block: Reader, kind: str) -> RequestError:
    """What is said to a block that cannot be read: of pictures and files, the source is named."""
    return block.not_offered("source" if block.has("source") else "type", f"blocks of type {shorten(kind)!r}")


def _text(owner: Reader, name: str) -> str:
    """Blocks of text, as one."""
    return "\n".join(filter(None, map(_block_text, _blocks(owner, name))))


def _source_text(block: Reader) -> str | None:
    """The text of a document or a search's result; None where it is none, or in another form than text."""
    kind = _kind(block)
    if kind == "search_result":
        return "\n".join(filter(None, (block.text("title"), block.text("source"), _text(block, "content"))))
    source = block.object("source") if kind == "document" else None
    if source is None or source.text("type") not in ("text", "content"):
        return None
    text = source.text("data") if source.body["type"] == "text" else _text(source, "content")
    source.known("media_type")
    return "\n".join(filter(None, (block.text("title"), text)))


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
            continue
        text = _source_text(block)
        if text := _block_text(block) if text is None else text:
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
    text = "\n".join(filter(None, map(_result_text, _blocks(block, "content"))))
    if block.flag("is_error"):
        text = f"Error: {text}" if text else "Error"
    return Message("tool", text, tool_call_id=call_id)


def _result_text(block: Reader) -> str:
    """A block of what a tool answered."""
    kind = _kind(block)
    if kind == "text":
        return _block_text(block)
    if kind == "tool_reference":
        return block.required("tool_name", block.text("tool_name"))
    text = _source_text(block)
    return left_out(kind) if text is None else text


def _assistant_turns(message: Reader) -> list[Message]:
    """An assistant's message: its thinking, what it said, and what it called.

    What somebody else's server called for itself is ignored: what came of it was said.
    """
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
        elif kind not in ("server_tool_use", "mcp_tool_use") and not kind.endswith("_tool_result"):
            texts.append(_block_text(block))
    return [Message("assistant", "".join(texts), "\n".join(filter(None, reasoning)) or None, tuple(calls))]


def _tool_call(block: Reader) -> ToolCall:
    block.known("caller", "cache_control")
    arguments = block.required("input", block.mapping("input"))
    name = block.required("name", block.text("name"))
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False), block.required("id", block.text("id")))


_SYSTEMS = ("system", "developer")
_ROLES: Mapping[str, Callable[[Reader], list[Message]]] = {"user": _user_turns, "assistant": _assistant_turns}

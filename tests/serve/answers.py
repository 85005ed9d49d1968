"""An answer read off a body, and off a stream, of each protocol, by hand and from their documentation.

Nothing of the server's is used here. A stream is read as clients read it: deltas are added up, whatever comes once must
come once, and counts are added up over all chunks that have some.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jiter

Json = dict[str, Any]
PATHS = {
    "chat": "/v1/chat/completions", "completions": "/v1/completions", "responses": "/v1/responses",
    "messages": "/v1/messages",
}  # fmt: skip


@dataclass
class Said:
    """One choice: its texts, its calls (name and arguments), why it ended, and the tokens' log-probabilities."""

    reasoning: str = ""
    content: str = ""
    calls: list[list[Any]] = field(default_factory=list)
    finish: Any = None
    logprobs: list[Any] = field(default_factory=list, compare=False)  # floats: compared by ``is_close``


@dataclass
class Answer:
    """All choices, and the usage as the protocol says it."""

    choices: list[Said]
    usage: Json
    ids: list[str] = field(default_factory=list, compare=False)  # of calls


def is_close(one: Any, other: Any) -> bool:
    """Whether two rows of log-probabilities are the same but for what a batch of another size rounds."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-3
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(is_close, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_close(one[name], other[name]) for name in one)
    return bool(one == other)


def events_of(text: str) -> Iterator[Json]:
    """The data of a stream's events."""
    for block in text.split("\n\n"):
        data = [line[6:] for line in block.split("\n") if line.startswith("data: ")]
        if data and data != ["[DONE]"]:
            yield json.loads("\n".join(data))


def add_up(usages: list[Json]) -> Json:
    """Counts added up, as LangChain does over chunks."""
    total: Json = {}
    for usage in usages:
        for name, value in usage.items():
            total[name] = (
                add_up([total.get(name, {}), value]) if isinstance(value, dict) else total.get(name, 0) + value
            )
    return total


def whole(protocol: str, body: Json) -> Answer:
    """What an answer says that came in one piece."""
    return _WHOLE[protocol](body)


def streamed(protocol: str, text: str) -> Answer:
    """What an answer says that came as a stream."""
    return _STREAM[protocol](text)


def _named(call: Json) -> str:
    """The name of a function or of a custom tool, where a call, or a piece of one, says it."""
    return str((call.get("function") or call["custom"]).get("name", ""))


def _text(call: Json) -> str:
    """The arguments of a function, or the input of a custom tool."""
    return str(call["function"]["arguments"] if "function" in call else call["custom"]["input"])


def _chat(body: Json) -> Answer:
    answer = Answer([], body["usage"])
    for index, row in enumerate(body["choices"]):
        assert row["index"] == index
        message, logprobs = row["message"], row["logprobs"] or {}
        calls = message.get("tool_calls", [])
        answer.ids += [call["id"] for call in calls]
        answer.choices.append(Said(
            message["reasoning_content"] or "", message["content"] or "",
            [[_named(call), _text(call)] for call in calls], row["finish_reason"],
            [*logprobs.get("reasoning_content", []), *logprobs.get("content", [])],
        ))  # fmt: skip
    return answer


def _chat_stream(text: str) -> Answer:
    assert text.endswith("data: [DONE]\n\n")
    said: dict[int, Said] = {}
    chunks, ids = list(events_of(text)), []
    for chunk in chunks:
        for row in chunk["choices"]:
            choice, delta = said.setdefault(row["index"], Said()), row["delta"]
            assert choice.finish is None, "a piece after the finish"
            choice.reasoning += delta.get("reasoning_content") or ""
            choice.content += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                if call["index"] == len(choice.calls):
                    ids.append(call["id"])
                    choice.calls.append([_named(call), ""])
                else:
                    assert call["index"] == len(choice.calls) - 1 and "id" not in call
                    assert not _named(call)
                choice.calls[-1][1] += _text(call)
            if logprobs := row["logprobs"]:
                choice.logprobs += [*logprobs.get("reasoning_content", []), *logprobs["content"]]
            choice.finish = row["finish_reason"]
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert len(usages) == 1, "exactly one chunk carries the usage"
    return Answer([said[index] for index in range(len(said))], add_up(usages), ids)


def _completion_logprobs(logprobs: Json | None) -> list[Any]:
    if logprobs is None:
        return []
    names = ("tokens", "token_logprobs", "top_logprobs")
    return list(zip(*(logprobs[name] for name in names), strict=True))


def _completions(body: Json) -> Answer:
    rows = body["choices"]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    return Answer(
        [Said("", row["text"], [], row["finish_reason"], _completion_logprobs(row["logprobs"])) for row in rows],
        body["usage"],
    )


def _completions_stream(text: str) -> Answer:
    assert text.endswith("data: [DONE]\n\n")
    said: dict[int, Said] = {}
    chunks = list(events_of(text))
    for chunk in chunks:
        for row in chunk["choices"]:
            choice = said.setdefault(row["index"], Said())
            assert choice.finish is None, "a piece after the finish"
            choice.content += row["text"]
            choice.logprobs += _completion_logprobs(row["logprobs"])
            choice.finish = row["finish_reason"]
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert len(usages) == 1, "exactly one chunk carries the usage"
    return Answer([said[index] for index in range(len(said))], add_up(usages))


def _responses(body: Json) -> Answer:
    said = Said(finish=(body["status"], (body["incomplete_details"] or {}).get("reason")))
    ids = []
    for item in body["output"]:
        if item["type"] in ("function_call", "custom_tool_call"):
            said.calls.append([item["name"], item["arguments" if item["type"] == "function_call" else "input"]])
            ids.append(item["call_id"])
            continue
        (part,) = item["content"]
        if item["type"] == "reasoning":
            said.reasoning += part["text"]
        else:
            said.content += part["text"]
            said.logprobs += part["logprobs"]
    return Answer([said], body["usage"], ids)


def _responses_stream(text: str) -> Answer:
    events = list(events_of(text))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas: Counter[Any] = Counter()
    items: dict[int, Json] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            items.setdefault(event["output_index"], {"text": ""})["text"] += event["delta"]
        elif event["type"] == "response.output_item.added":
            assert event["output_index"] not in items
            items[event["output_index"]] = {"item": event["item"], "text": ""}
        elif event["type"] == "response.output_item.done":
            deltas[event["output_index"]] += 1
            items[event["output_index"]]["done"] = event["item"]
    last = events[-1]
    assert last["type"] == f"response.{last['response']['status']}"
    assert [row["done"] for _, row in sorted(items.items())] == last["response"]["output"]
    assert set(deltas.values()) <= {1}
    answer = _responses(last["response"])
    for row in items.values():  # what was said bit by bit is what is said at the end
        item = row["done"]
        written = {"function_call": "arguments", "custom_tool_call": "input"}.get(item["type"])
        assert row["text"] == (item[written] if written else item["content"][0]["text"])
        assert item["id"] == row["item"]["id"]
    return answer


def _messages(body: Json) -> Answer:
    said, ids = Said(finish=(body["stop_reason"], body["stop_sequence"])), []
    for block in body["content"]:
        said.reasoning += block.get("thinking", "")
        said.content += block.get("text", "")
        if block["type"] == "tool_use":
            ids.append(block["id"])
            said.calls.append([block["name"], block["input"]])
    return Answer([said], body["usage"], ids)


def _messages_stream(text: str) -> Answer:
    said, ids, usage, kinds, open_block = Said(), [], {}, [], None
    for event in events_of(text):
        kind = event["type"]
        kinds.append(kind)
        if kind == "message_start":
            start = event["message"]["usage"]
        elif kind == "content_block_start":
            assert open_block is None
            open_block = event["content_block"]
            if open_block["type"] == "tool_use":
                ids.append(open_block["id"])
                said.calls.append([open_block["name"], ""])
        elif kind == "content_block_delta":
            assert open_block is not None
            delta = event["delta"]
            said.reasoning += delta.get("thinking", "")
            said.content += delta.get("text", "")
            if "partial_json" in delta:
                said.calls[-1][1] += delta["partial_json"]
        elif kind == "content_block_stop":
            assert open_block is not None
            open_block = None
        elif kind == "message_delta":
            usage = event["usage"]
            said.finish = (event["delta"]["stop_reason"], event["delta"]["stop_sequence"])
    assert kinds[-1] == "message_stop" and kinds.count("message_delta") == kinds.count("message_start") == 1
    for name in ("input_tokens", "cache_read_input_tokens"):
        assert start[name] == usage[name]
    for call in said.calls:  # as Anthropic's SDK reads them
        call[1] = jiter.from_json(call[1].encode(), partial_mode=True) if call[1] else {}
    return Answer([said], usage, ids)


_WHOLE = {"chat": _chat, "completions": _completions, "responses": _responses, "messages": _messages}
_STREAM = {
    "chat": _chat_stream, "completions": _completions_stream, "responses": _responses_stream,
    "messages": _messages_stream,
}  # fmt: skip

"""OpenAI's Responses: the events of an answer as their numbered stream, and as one ``Response``.

An answer is a list of items: reasoning, a message, and one for each call. In a stream an item is added, its part (of
reasoning and messages) is added, deltas follow, and text, part and item are said once more, whole, when they are done.
The last event carries the very body that is the answer where nobody streams: ``response.completed``, or
``response.incomplete`` where tokens or the server ended it, or ``response.failed``.

An answer that is complete without a word or a call has a message with an empty text. Log-probabilities are those of
the message's tokens: what came with no text waits for some, and those of calls have no place.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from sprat.serve.errors import RequestError
from sprat.serve.events import (
    ChoiceFinished,
    CollectedCall,
    Collector,
    Event,
    Failed,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
)
from sprat.serve.openai_responses_items import (
    ItemIds,
    call_item,
    message_item,
    reasoning_item,
    short_logprob,
    text_part,
    usage,
)
from sprat.serve.sse import server_sent

KEEP_ALIVE = ": keep-alive\n\n"
_FORMAT_FIELDS = ("type", "name", "description", "schema", "strict")
_CHOICE_FIELDS = {"function": ("type", "name"), "custom": ("type", "name"), "allowed_tools": ("type", "mode", "tools")}


def echo(body: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer repeats of a body that ``parse_responses`` has read, by the names of ``Response``."""
    text, reasoning, choice = (body.get(name) or {} for name in ("text", "reasoning", "tool_choice"))
    form, effort, parallel = text.get("format") or {}, reasoning.get("effort"), body.get("parallel_tool_calls")
    form = {name: form[name] for name in _FORMAT_FIELDS if form.get(name) is not None}
    if isinstance(choice, Mapping) and choice:
        choice = {name: choice[name] for name in _CHOICE_FIELDS[choice["type"]]}
    own = ("temperature", "top_p", "instructions", "prompt_cache_key", "safety_identifier", "user")
    limit = body.get("max_output_tokens")
    return {
        "model": body["model"],
        "max_output_tokens": None if limit is None else int(limit),
        "metadata": {name: value for name, value in (body.get("metadata") or {}).items() if value is not None},
        "parallel_tool_calls": parallel is None or parallel,
        "reasoning": {"effort": None if effort == "ultra" else effort, "summary": None},
        "text": {"format": form or {"type": "text"}},
        "tool_choice": choice or "auto",
        "tools": [_echoed_tool(tool) for tool in body.get("tools") or ()],
        "top_logprobs": int(body.get("top_logprobs") or 0),
        **{name: body.get(name) for name in own},
    }


def _echoed_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    names = {"custom": ("type", "name", "description", "format"), "namespace": ("type", "name", "description", "tools")}
    if tool["type"] in names:
        return {name: tool[name] for name in names[tool["type"]] if tool.get(name) is not None}
    return {name: tool.get(name) for name in ("type", "name", "description", "parameters", "strict")}


def whole(echoed: Mapping[str, Any], collector: Collector, *, response_id: str, created: int) -> dict[str, Any]:
    """The whole answer.

    Args:
        echoed: from ``echo``.
        collector: it has followed all events.
        response_id: ``resp_…``; the ids of the items are made of it.
        created: seconds since 1970.
    """
    choice, finished = collector.choices[0], collector.finished
    if choice.finish is None or finished is None:
        raise RuntimeError("the answer has not ended")
    is_complete = _is_complete(choice.finish)
    item_ids, items = ItemIds(response_id), []
    if choice.reasoning:
        items.append(reasoning_item(item_ids.reasoning, choice.reasoning))
    if choice.content or (not choice.calls and (choice.content_logprobs or is_complete)):
        items.append(message_item(item_ids.message, text_part(choice.content, choice.content_logprobs)))
    items += [
        call_item(item_ids.call(index, is_custom=call.is_custom), call) for index, call in enumerate(choice.calls)
    ]
    if items and not is_complete:
        items[-1]["status"] = "incomplete"
    body = _response(echoed, response_id, created, "completed" if is_complete else "incomplete")
    body |= {"output": items, "usage": usage(finished.usage)}
    if not is_complete:
        reason = "max_output_tokens" if choice.finish.reason == "length" and not choice.finish.ended_by else None
        body["incomplete_details"] = {"reason": reason}
    return body


async def stream_events(
    echoed: Mapping[str, Any], events: AsyncIterator[Event | None], *, response_id: str, created: int
) -> AsyncIterator[str]:
    """The answer as server-sent events; a comment for each None of ``events``. The rest is as in ``whole``."""
    stream = _Stream(echoed, response_id, created)
    async for event in events:
        if event is None:
            yield KEEP_ALIVE
            continue
        for body in stream.push(event):
            yield server_sent(body, str(body["type"]))


class _Stream:
    """Where a stream is: how many events there were, the item that is open, and the answer so far."""

    def __init__(self, echoed: Mapping[str, Any], response_id: str, created: int) -> None:
        self.echoed, self.response_id, self.created = echoed, response_id, created
        self.collector, self.item_ids = Collector(1), ItemIds(response_id)
        self._count, self._index = 0, -1
        self._open: str | int | None = None  # "reasoning", "content", or the index of a call
        self._item_id = ""
        self._held_logprobs: list[TokenLogprob] = []  # that came before the message had a word

    def push(self, event: Event) -> list[dict[str, Any]]:
        """The bodies of what one event makes."""
        if isinstance(event, Failed):
            return [*([] if self._count else self._start()), self._fail(event.error)]
        self.collector.push(event)
        if isinstance(event, Started):
            return self._start()
        if isinstance(event, TextDelta):
            return self._text(event)
        if isinstance(event, ToolCallDelta):
            call = CollectedCall(event.id, event.name, "", event.is_custom, event.namespace)
            self._held_logprobs = []
            bodies = [] if self._open == event.index else self._begin(event.index, call)
            name = "custom_tool_call_input" if event.is_custom else "function_call_arguments"
            return bodies + self._piece(f"response.{name}.delta", event.arguments)
        if isinstance(event, ChoiceFinished):
            is_complete = _is_complete(event)
            is_silent = self._open in (None, "reasoning") and (is_complete or bool(self._held_logprobs))
            bodies = self._begin("content") if is_silent else []
            bodies += self._words("", self._take_logprobs(())) if self._held_logprobs else []
            return bodies + self._end("completed" if is_complete else "incomplete")
        body = whole(self.echoed, self.collector, response_id=self.response_id, created=self.created)
        return [self._numbered(f"response.{body['status']}", response=body)]

    def _start(self) -> list[dict[str, Any]]:
        body = _response(self.echoed, self.response_id, self.created, "in_progress")
        return [self._numbered(f"response.{name}", response=body) for name in ("created", "in_progress")]

    def _fail(self, error: RequestError) -> dict[str, Any]:
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        body = _response(self.echoed, self.response_id, self.created, "failed")
        body["error"] = {"code": "invalid_prompt" if error.status in (400, 413) else code, "message": error.message}
        return self._numbered("response.failed", response=body)

    def _text(self, event: TextDelta) -> list[dict[str, Any]]:
        if event.kind == "reasoning":
            if not event.text:
                return []
            bodies = [] if self._open == "reasoning" else self._begin("reasoning")
            return bodies + self._piece("response.reasoning_text.delta", event.text, content_index=0)
        logprobs = () if self.collector.choices[0].calls else event.logprobs
        if not event.text and self._open != "content":
            self._held_logprobs += logprobs
            return []
        if not event.text and not logprobs:
            return []
        bodies = [] if self._open == "content" else self._begin("content")
        return bodies + self._words(event.text, self._take_logprobs(logprobs))

    def _take_logprobs(self, logprobs: Sequence[TokenLogprob]) -> list[TokenLogprob]:
        """``logprobs`` behind those that wait."""
        taken, self._held_logprobs = [*self._held_logprobs, *logprobs], []
        return taken

    def _words(self, text: str, tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        logprobs = [short_logprob(token) for token in tokens]
        return [self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)]

    def _piece(self, name: str, text: str, **fields: Any) -> list[dict[str, Any]]:
        return [self._of_item(name, delta=text, **fields)] if text else []

    def _begin(self, name: str | int, call: CollectedCall | None = None) -> list[dict[str, Any]]:
        """End the item that is open and add the next one, empty."""
        bodies = self._end("completed")
        self._open, self._index = name, self._index + 1
        if call is not None:
            self._item_id = self.item_ids.call(int(name), is_custom=call.is_custom)
            item = call_item(self._item_id, call)
        elif name == "reasoning":
            self._item_id = self.item_ids.reasoning
            item = reasoning_item(self._item_id, "")
        else:
            self._item_id = self.item_ids.message
            item = message_item(self._item_id, text_part("", ()))
        parts = [] if call is not None else item["content"]
        item |= {"status": "in_progress"} | ({} if call is not None else {"content": []})
        bodies.append(self._numbered("response.output_item.added", output_index=self._index, item=item))
        added = "response.content_part.added"
        return bodies + [self._of_item(added, content_index=0, part=part) for part in parts]

    def _end(self, status: str) -> list[dict[str, Any]]:
        """Say the item that is open once more, whole."""
        if self._open is None:
            return []
        choice = self.collector.choices[0]
        first: dict[str, Any] = {"content_index": 0}
        if isinstance(self._open, int):
            call = choice.calls[self._open]
            item = call_item(self._item_id, call)
            done, fields = "function_call_arguments", {"name": call.name, "arguments": call.arguments}
            if call.is_custom:
                done, fields = "custom_tool_call_input", {"input": call.arguments}
        elif self._open == "reasoning":
            item = reasoning_item(self._item_id, choice.reasoning)
            done, fields = "reasoning_text", first | {"text": choice.reasoning}
        else:
            item = message_item(self._item_id, text_part(choice.content, choice.content_logprobs))
            logprobs = [short_logprob(token) for token in choice.content_logprobs]
            done, fields = "output_text", first | {"text": choice.content, "logprobs": logprobs}
        bodies = [self._of_item(f"response.{done}.done", **fields)]
        for part in item.get("content", ()):
            bodies.append(self._of_item("response.content_part.done", content_index=0, part=part))
        self._open, item["status"] = None, status
        return [*bodies, self._numbered("response.output_item.done", output_index=self._index, item=item)]

    def _of_item(self, event: str, /, **fields: Any) -> dict[str, Any]:
        return self._numbered(event, output_index=self._index, item_id=self._item_id, **fields)

    def _numbered(self, event: str, /, **fields: Any) -> dict[str, Any]:
        self._count += 1
        return {"type": event, "sequence_number": self._count - 1, **fields}


def _is_complete(finish: ChoiceFinished) -> bool:
    return finish.reason in ("stop", "tool_calls") and not finish.ended_by


def _response(echoed: Mapping[str, Any], response_id: str, created: int, status: str) -> dict[str, Any]:
    """A response without output."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "output": [],
        "previous_response_id": None,
        "truncation": "disabled",
        "usage": None,
        **echoed,
    }

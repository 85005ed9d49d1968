"""OpenAI's Responses: the items of an answer, and its counts, as they are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sprat.serve.events import CollectedCall, TokenLogprob, Usage

_LOWEST = -9999.0  # in place of minus infinity, which JSON has not


class ItemIds:
    """The ids of an answer's items."""

    def __init__(self, response_id: str) -> None:
        self.suffix = response_id.removeprefix("resp_")
        self.reasoning, self.message = f"rs_{self.suffix}", f"msg_{self.suffix}"

    def call(self, index: int, *, is_custom: bool) -> str:
        """Of the call at ``index``."""
        return f"{'ctc' if is_custom else 'fc'}_{self.suffix}_{index}"


def reasoning_item(item_id: str, text: str) -> dict[str, Any]:
    """What was thought."""
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": item_id, "type": "reasoning", "summary": [], "content": content, "status": "completed"}


def message_item(item_id: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """What was said."""
    return {"id": item_id, "type": "message", "role": "assistant", "content": [part], "status": "completed"}


def text_part(text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The only part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [_logprob(item) for item in logprobs]}


def call_item(item_id: str, call: CollectedCall) -> dict[str, Any]:
    """A call of a function, or of a custom tool."""
    kind, text = ("custom_tool_call", "input") if call.is_custom else ("function_call", "arguments")
    item = {"id": item_id, "type": kind, "call_id": call.id, "name": call.name}
    namespace = {"namespace": call.namespace} if call.namespace else {}
    return {**item, **namespace, text: call.arguments, "status": "completed"}


def _logprob(item: TokenLogprob) -> dict[str, Any]:
    return _token(item.token, item.logprob) | {"top_logprobs": [_token(*other) for other in item.top]}


def _token(token: bytes, logprob: float | None) -> dict[str, Any]:
    text = token.decode("utf-8", "replace")
    return {"token": text, "bytes": list(token), "logprob": _LOWEST if logprob is None else max(logprob, _LOWEST)}


def short_logprob(item: TokenLogprob) -> dict[str, Any]:
    """As in the events of a stream, where tokens have no bytes."""
    full = _logprob(item)
    top = [{"token": other["token"], "logprob": other["logprob"]} for other in full["top_logprobs"]]
    return {"token": full["token"], "logprob": full["logprob"], "top_logprobs": top}


def usage(usage: Usage) -> dict[str, Any]:
    """Counts of tokens, by their names."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }

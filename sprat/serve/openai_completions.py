"""OpenAI's completions: text, or ids, that the model goes on with. ``echo`` says the prompt again, with its
log-probabilities where they are wanted (what lm-eval asks for); ``suffix`` fills in between, where the model has the
tokens for it. Several prompts are one request; choice ``i * n + j`` is the j-th answer to the i-th.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from sprat.serve.events import ChoiceFinished as Ended
from sprat.serve.events import Collector, Event, Failed, Finished, TextDelta, TokenLogprob
from sprat.serve.fields import Reader
from sprat.serve.generation import Generation
from sprat.serve.openai_chat import DONE, MAX_N, Extension, Head, usage_body
from sprat.serve.openai_fields import read_limit, read_sampling
from sprat.serve.sse import server_sent

MAX_PROMPTS, MAX_LOGPROBS = 64, 20


def parse_completion(body: dict[str, Any]) -> list[Generation]:
    """A body of ``POST /completions``: a request for each prompt.

    Raises:
        RequestError: 400; names the field by its JSON path.
    """
    reader = Reader(body)
    model = reader.required("model", reader.text("model", longest=256))
    prompts = _prompts(reader)
    n = reader.integer("n", 1, MAX_N) or 1
    if (best_of := reader.integer("best_of", 1)) not in (None, n):
        raise reader.error("best_of", f"must be n, which is {n}: this server does not choose among {best_of}")
    logprobs = reader.integer("logprobs", 0, MAX_LOGPROBS)
    echo = bool(reader.flag("echo"))
    limit = read_limit(reader, "max_tokens", 0)
    if limit == 0 and not echo:
        raise reader.error("max_tokens", "must be at least 1, or the prompt be said again with echo")
    suffix = reader.text("suffix")
    if suffix and (echo or not all(isinstance(prompt, str) for prompt in prompts)):
        raise reader.error("suffix", "goes with a prompt of text and without echo")
    options = reader.object("stream_options")
    common = Generation(
        model=model,
        max_tokens=limit,
        sampling={**read_sampling(reader), "top_logprobs": logprobs or 0},
        n=n,
        logprobs=logprobs is not None,
        echo=echo,
        suffix=suffix or "",
        stream=bool(reader.flag("stream")),
        include_usage=bool(options and options.flag("include_usage")),
        user=reader.text("user") or "",
        paths={"messages": "prompt", "prompt": "prompt", "max_tokens": "max_tokens"},
    ).with_ignored(reader.rest())
    is_list = isinstance(body["prompt"], list) and not all(type(row) is int for row in body["prompt"])
    paths = [{**common.paths, "ids": f"prompt[{index}]" if is_list else "prompt"} for index in range(len(prompts))]
    return [replace(common, prompt=prompt, paths=where) for prompt, where in zip(prompts, paths, strict=True)]


def _prompts(reader: Reader) -> list[str | tuple[int, ...]]:
    """``prompt``: text, ids, or a list of either."""
    value = reader.required("prompt", reader.raw("prompt"))
    if isinstance(value, str):
        return [value]
    rows = reader.required("prompt", reader.items("prompt"))
    if not rows:
        raise reader.error("prompt", "is empty")
    if all(type(row) is int for row in rows):
        return [_ids(reader, "prompt", rows)]
    if len(rows) > MAX_PROMPTS:
        raise reader.error("prompt", f"must have at most {MAX_PROMPTS} prompts")
    prompts: list[str | tuple[int, ...]] = []
    for index, row in enumerate(rows):
        if not isinstance(row, str | list):
            raise reader.error(f"prompt[{index}]", "must be text or ids of tokens")
        prompts.append(row if isinstance(row, str) else _ids(reader, f"prompt[{index}]", row))
    return prompts


def _ids(reader: Reader, name: str, rows: Sequence[Any]) -> tuple[int, ...]:
    for index, row in enumerate(rows):
        if type(row) is not int or not 0 <= row < 2**31:
            raise reader.error(f"{name}[{index}]", "must be the id of a token")
    if not rows:
        raise reader.error(name, "is empty")
    return tuple(rows)


def _logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """The ``logprobs`` of a piece of text that begins at character ``offset``.

    Each token is among its own ``top_logprobs``, so there may be one more than was asked for, as OpenAI has it.
    """
    texts = [each.token.decode("utf-8", "replace") for each in tokens]
    offsets = [offset]
    for text, each in zip(texts, tokens, strict=True):
        offsets.append(offsets[-1] + (0 if each.hidden else len(text)))
    tops = [
        {top.decode("utf-8", "replace"): value for top, value in ((each.token, each.logprob), *each.top)}
        if each.logprob is not None
        else None
        for each in tokens
    ]
    return {
        "tokens": texts,
        "token_logprobs": [each.logprob for each in tokens],
        "top_logprobs": tops,
        "text_offset": offsets[:-1],
    }


def whole(generation: Generation, collector: Collector, head: Head, extension: Extension) -> dict[str, Any]:
    """The answer as one object."""
    assert collector.finished is not None
    choices = []
    for index, choice in enumerate(collector.choices):
        tokens = choice.content_logprobs
        row = {
            "text": choice.content,
            "index": index,
            "logprobs": _logprobs(tokens, 0) if generation.logprobs else None,
        }
        choices.append({**row, "finish_reason": choice.finish.reason if choice.finish else "stop"})
    usage = usage_body(collector.finished.usage)
    return {**head.fields("text_completion"), "choices": choices, "usage": usage, "sprat": extension}


async def stream_events(
    generation: Generation, batches: AsyncIterator[list[Event] | None], head: Head, extension: Any
) -> AsyncIterator[str]:
    """The answer as text/event-stream; see ``openai_chat.stream_events``."""
    fields = head.fields("text_completion")
    offsets: dict[int, int] = {}
    pending: dict[str, Any] | None = None

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        null = {"usage": None} if head.include_usage else {}
        return server_sent({**fields, "choices": choices, **null, **more})

    def row(index: int, text: str, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish}

    async for batch in batches:
        if batch is None:
            yield ": keep-alive\n\n"
            continue
        for event in batch:
            if isinstance(event, TextDelta) and (event.text or event.logprobs):
                offset = offsets.get(event.choice, 0)
                logprobs = _logprobs(event.logprobs, offset) if generation.logprobs else None
                offsets[event.choice] = offset + len(event.text)
                yield chunk([row(event.choice, event.text, logprobs)])
            elif isinstance(event, Ended):
                if pending is not None:
                    yield chunk([pending])
                pending = row(event.choice, "", None, event.reason)
            elif isinstance(event, Finished):
                last = {"usage": usage_body(event.usage), "sprat": extension()}
                choices = [] if pending is None else [pending]
                if head.include_usage:
                    yield chunk(choices) + chunk([], **last) + DONE
                else:
                    yield chunk(choices, **last) + DONE
            elif isinstance(event, Failed):
                yield server_sent(event.error.body())

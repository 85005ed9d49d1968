"""What is asked of a model beside answers: embeddings, the ids of a text and back, and how many there are."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

from starlette.requests import Request

from sprat.serve import anthropic, anthropic_answers, openai_responses
from sprat.serve.access_log import describe
from sprat.serve.app_state import AppState
from sprat.serve.fields import Reader
from sprat.serve.generation import Generation
from sprat.serve.openai_chat import parse_chat
from sprat.serve.service import Service

MAX_EMBEDDINGS = 256
Body = dict[str, Any]
Worked = tuple[Body, tuple[str, ...]]  # an answer, and what of the request was ignored


async def embeddings(request: Request, state: AppState, body: Body) -> Worked:
    """Pooled hidden states of texts; ``dimensions`` are the first of them, scaled to length 1 again.

    Raises:
        RequestError: 400, a field is wrong; 404, no such model; 429 or 503, no place.
    """
    reader = Reader(body)
    name = reader.required("model", reader.text("model"))
    describe(request.scope["state"], model=name)
    service = state.find(name)
    value = reader.required("input", reader.raw("input"))
    rows = [value] if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int) else value
    if not isinstance(rows, list) or not rows or len(rows) > MAX_EMBEDDINGS:
        raise reader.error("input", f"must be text, ids, or a list of 1 to {MAX_EMBEDDINGS} of them")
    form = reader.choice("encoding_format", ("float", "base64")) or "float"
    dimensions = reader.integer("dimensions", 1)
    reader.text("user")
    prompts = await service.run_in_thread(
        lambda: [_embedding_ids(reader, service, n, row) for n, row in enumerate(rows)]
    )
    tokens = sum(map(len, prompts))
    vectors = await service.embed(prompts, name, request.state.tenant)
    describe(request.scope["state"], prompt_tokens=tokens)
    if dimensions is not None and dimensions > len(vectors[0]):
        raise reader.error("dimensions", f"must be at most {len(vectors[0])}, which is what this model has")
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(_shortened(vector, dimensions), form)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": name, "usage": usage}, reader.rest()


def _embedding_ids(reader: Reader, service: Service, index: int, row: Any) -> list[int]:
    """The ids of one input."""
    where = f"input[{index}]" if reader.body["input"] is not row else "input"
    vocab = service.engine.info.vocab_size
    if isinstance(row, list) and row and all(type(each) is int and 0 <= each < vocab for each in row):
        ids = row
    elif isinstance(row, str) and row:
        ids = service.prompts.tokenizer.encode_prompt(row)
    else:
        raise reader.error(where, f"must be text that is not empty, or ids of 0 … {vocab - 1}")
    if len(ids) > service.prompts.context:
        message = f"has {len(ids)} tokens, and this model's maximum context length is {service.prompts.context} tokens"
        raise reader.error(where, message, code="context_length_exceeded")
    return ids


def _shortened(vector: list[float], dimensions: int | None) -> list[float]:
    """The first ``dimensions`` of a vector, scaled to length 1 again (Matryoshka, arXiv 2205.13147).

    >>> [round(value, 6) for value in _shortened([0.48, 0.64, 0.6], 2)]
    [0.6, 0.8]
    """
    if dimensions is None or dimensions == len(vector):
        return vector
    kept = vector[:dimensions]
    length = math.hypot(*kept)
    return [value / length for value in kept] if length else kept


def _vector(vector: list[float], form: str) -> Any:
    if form == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def tokenize(request: Request, state: AppState, body: Body) -> Worked:
    """The ids of a text or of a conversation."""
    reader = Reader(body)
    name = reader.text("model") or state.services[0].names.served
    describe(request.scope["state"], model=name)
    service = state.find(name)
    prompts = service.prompts
    if reader.has("messages"):
        ids, ignored = await _ids(request, state, parse_chat({**body, "model": name}))
    else:
        text = reader.required("prompt", reader.text("prompt"))
        special = reader.flag("add_special_tokens") is not False
        encode = prompts.tokenizer.encode_prompt if special else prompts.tokenizer.encode
        ids, ignored = await service.run_in_thread(lambda: encode(text)), reader.rest()
    return {"count": len(ids), "max_model_len": prompts.context, "tokens": ids}, ignored


async def detokenize(request: Request, state: AppState, body: Body) -> Worked:
    """The text of ids."""
    reader = Reader(body)
    name = reader.text("model") or state.services[0].names.served
    describe(request.scope["state"], model=name)
    service = state.find(name)
    ids, vocab = reader.required("tokens", reader.items("tokens")), service.engine.info.vocab_size
    for index, each in enumerate(ids):
        if type(each) is not int or not 0 <= each < vocab:
            raise reader.error(f"tokens[{index}]", f"must be an id of 0 … {vocab - 1}")
    return {"prompt": await service.run_in_thread(lambda: service.prompts.tokenizer.decode(ids))}, reader.rest()


async def count_tokens(request: Request, state: AppState, body: Body) -> Worked:
    """How many tokens a request of Anthropic's has."""
    ids, ignored = await _ids(request, state, anthropic.parse_count_tokens(body))
    return anthropic_answers.token_count(len(ids)), ignored


async def input_tokens(request: Request, state: AppState, body: Body) -> Worked:
    """How many tokens a request of OpenAI's Responses has."""
    generation = openai_responses.parse_input_tokens(body, state.services[0].names.served)
    ids, ignored = await _ids(request, state, generation)
    return openai_responses.input_tokens(len(ids)), ignored


async def _ids(request: Request, state: AppState, generation: Generation) -> tuple[list[int], tuple[str, ...]]:
    """The ids of the prompt of a request that is not answered, and what of it is ignored."""
    describe(request.scope["state"], model=generation.model)
    service = state.find(generation.model)
    ids = await service.run_in_thread(lambda: service.prompts.ids(generation))
    return ids, (*generation.ignored, *service.prompts.unmet_wishes(generation))

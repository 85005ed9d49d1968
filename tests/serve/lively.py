"""Tiny random models whose answers are eventful: they end, they close their thinking, and they call tools.

A random model of 500 tokens says a given token once in 500. Here the head's rows of some tokens (the end, the think
tags, the tags of calls, what closes a string or an object) are longer than others, so that each of these is sometimes
the surest one and sometimes out of the question. Where the tag of a call is no token, each of its pieces is likely
behind the one before it. One family each of chat formats, and each with every way to draft.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from sprat.config.sizes import size
from sprat.engine import Engine
from sprat.engine.speculation import SpeculationMode
from sprat.model import Transformer
from sprat.serve import ServeConfig, create_app
from sprat.serve.app import ServedModel
from sprat.serve.engine_thread import ThreadEngineClient
from sprat.tokens import Tokenizer
from sprat.tokens.tool_formats import DEEPSEEK_V3_1, HERMES
from tests.unit.serve.live import serving

KEYS = ("key-of-one", "key-of-two", "key-of-three")
MODES: tuple[SpeculationMode, ...] = ("off", "ngram", "mtp")
CONTEXT, VOCABULARY = 2048, 640
CACHE_BYTES = 32 << 20  # room for what a test asks, so that nothing is dropped
PIECES = ("tool", "_call")  # of a tag that is text
# Our own names → the family's; and tokens of the text that it has beside them.
FAMILIES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "sprat": ({}, PIECES),
    "chatml": (
        {"<|pad|>": "<|endoftext|>", "<|bos|>": "<|im_start|>", "<|eos|>": "<|im_end|>", "<|system|>": "<|a|>",
         "<|user|>": "<|b|>", "<|assistant|>": "<|c|>"},
        HERMES.call,
    ),
    "deepseek": (
        {"<|pad|>": "<｜▁pad▁｜>", "<|bos|>": "<｜begin▁of▁sentence｜>", "<|eos|>": "<｜end▁of▁sentence｜>",
         "<|system|>": "<｜a｜>", "<|user|>": "<｜User｜>", "<|assistant|>": "<｜Assistant｜>"},
        (*DEEPSEEK_V3_1.calls, *DEEPSEEK_V3_1.call, "<｜tool▁sep｜>"),
    ),
    "llama3": (
        {"<|pad|>": "<|finetune_right_pad_id|>", "<|bos|>": "<|begin_of_text|>", "<|eos|>": "<|eot_id|>",
         "<|system|>": "<|start_header_id|>", "<|user|>": "<|end_header_id|>", "<|assistant|>": "<|a|>"},
        PIECES,
    ),
}  # fmt: skip
TEXTS = [
    'what is {"name": "get_weather", "arguments": {"city": "Paris"}}? it is sunny in Paris, and windy. ',
    "# Tools You may call one or more functions to assist with the user query. You are provided with function "
    "signatures within XML tags: For each function call, return a json object with function name and arguments. "
    '{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object", '
    '"properties": {"unit": {"type": "string", "enum": ["a", "b"]}}, "required": ["unit"]}}} ',
    "keep to yourself what opens the door: swordfish; say it in 3 words. Größe, naïve, 東京. ",
]
LOUD, DRAWN = 8.0, 2.0


def tokenizer_of(family: str) -> Tokenizer:
    """A tokenizer with the control tokens of a family; as tags that are tokens, as the real ones are."""
    names, tags = FAMILIES[family]
    table = json.loads(Tokenizer.train(TEXTS * 20, VOCABULARY).files()["tokenizer.json"])
    text = json.dumps(table, ensure_ascii=False)
    for ours, theirs in names.items():
        text = text.replace(json.dumps(ours), json.dumps(theirs, ensure_ascii=False))
    table = json.loads(text)
    if names:  # think tags of others are tokens of the text
        for token in table["added_tokens"]:
            token["special"] = "think>" not in token["content"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    first = max(table["model"]["vocab"].values()) + 1
    table["added_tokens"] += [{"id": first + index, "content": tag, **flags} for index, tag in enumerate(tags)]
    eos = names.get("<|eos|>", "<|eos|>")
    return Tokenizer(json.dumps(table, ensure_ascii=False), config={"eos_token": eos} if names else {})


def model_of(tokenizer: Tokenizer, seed: int = 3) -> Transformer:
    """A random model with a module that guesses the token after the next."""
    import torch

    ids = tokenizer.special_ids
    config = size(
        "pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT, num_nextn_predict_layers=1,
        bos_token_id=ids.bos, eos_token_id=ids.eos, pad_token_id=ids.pad,
    )  # fmt: skip
    model = Transformer.create(config, seed)
    loud = [tokenizer.encode(text)[0] for text in ('"', "}", '"}', "]", ",", "e")]
    loud += [ids.eos, ids.think_open, ids.think_close]
    loud += [tokenizer.control_tokens[tag] for tag in (HERMES.call[0], DEEPSEEK_V3_1.calls[0])
             if tag in tokenizer.control_tokens]  # fmt: skip
    with torch.no_grad():
        model.head.weight.mul_(2)
        model.head.weight[[token for token in loud if token >= 0]] *= LOUD / 2
        if tokenizer.control_tokens.keys().isdisjoint((HERMES.call[0], DEEPSEEK_V3_1.calls[0])):
            tag = tokenizer.encode(HERMES.call[0])
            model.head.weight[tag[0]] *= LOUD / 2
            for before, piece in itertools.pairwise(tag):
                drawn_by = model.embed_tokens.weight[before]
                model.head.weight[piece] += DRAWN * drawn_by / drawn_by.norm()
    return model


@contextmanager
def lively_server(families: tuple[str, ...], modes: tuple[SpeculationMode, ...] = MODES) -> Iterator[Lively]:
    """A server of each family with each way to draft, called ``chatml-ngram`` and so on, with a key for each tenant."""
    served, engines = [], {}
    for family in families:
        tokenizer = tokenizer_of(family)
        model = model_of(tokenizer)
        for mode in modes:
            name = f"{family}-{mode}"
            engines[name] = Engine(model, tokenizer, speculate=mode, frozen=True, cache_bytes=CACHE_BYTES)
            served.append(ServedModel(ThreadEngineClient(engines[name]), tokenizer, (name,)))
    config = ServeConfig(port=0, api_keys=KEYS, shutdown_timeout_seconds=0)
    with serving(create_app(served, config), config) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield Lively(client, engines)


class Lively:
    """A server to ask: ``client`` for requests, ``engines`` by the name of the model."""

    def __init__(self, client: httpx.Client, engines: dict[str, Engine]) -> None:
        self.client, self.engines = client, engines

    def post(self, path: str, body: dict[str, Any], key: str = KEYS[0]) -> httpx.Response:
        """The answer to a request of a tenant."""
        return self.client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})

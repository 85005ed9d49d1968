"""The server around the real engine and a tiny random model: what holds must hold there too."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from sprat.config.model import LoRAConfig
from sprat.engine import Engine
from sprat.errors import ServeError
from sprat.formats.load import load
from sprat.formats.peft import save_peft
from sprat.model.lora import adapters, add_lora, merge_lora
from sprat.serve import ServeConfig, create_app
from tests.unit.serve.live import live, tiny_model
from tests.unit.serve.scripted import within

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "what is 3 + 4?"}], "max_tokens": 12}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(folder)
    with live(Engine(*load(folder))) as address, httpx.Client(base_url=address, timeout=30) as client:
        yield client


def test_the_usage_is_the_engines_and_the_bill_follows_it(client: httpx.Client) -> None:
    answer = client.post(CHAT, json={**ASK, "thinking": {"type": "enabled"}}).json()
    usage, cost = answer["usage"], answer["sprat"]["cost"]
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"] > 0
    assert 0 < usage["completion_tokens"] <= 12
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] <= usage["completion_tokens"]
    assert answer["choices"][0]["message"]["reasoning_content"]
    assert cost["output"] == 16000 * usage["completion_tokens"]
    assert cost["total"] == cost["hit"] + cost["miss"] + cost["output"]


def test_the_same_seed_gives_the_same_answer_alone_in_a_crowd_and_as_a_stream(client: httpx.Client) -> None:
    ask = {**ASK, "seed": 11, "thinking": {"type": "disabled"}}
    alone = client.post(CHAT, json=ask).json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(lambda seed: client.post(CHAT, json={**ask, "seed": seed}).json(), [*range(7), 11]))
    assert crowd[-1]["choices"][0]["message"]["content"] == alone
    assert len({answer["choices"][0]["message"]["content"] for answer in crowd}) > 1
    again = client.post(CHAT, json={**ASK, "seed": crowd[0]["sprat"]["seed"], "thinking": {"type": "disabled"}}).json()
    assert again["choices"] == crowd[0]["choices"]


FORM = {"type": "json_schema", "name": "x", "schema": {"type": "object", "not": {"type": "string"}}}
ANTHROPIC = {"messages": ASK["messages"], "max_tokens": 9}


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        (CHAT, {**ASK, "response_format": {"type": "json_schema", "json_schema": FORM}}, "response_format"),
        ("/v1/responses", {"input": "a", "text": {"format": FORM}}, "text.format"),
        ("/v1/messages", {**ANTHROPIC, "output_config": {"format": FORM}}, "output_config.format"),
        ("/v1/messages", {**ANTHROPIC, "output_format": FORM}, "output_format"),
    ],
)
def test_a_form_that_cannot_be_followed_is_named_as_the_caller_named_it(
    client: httpx.Client, path: str, body: dict[str, Any], where: str
) -> None:
    answer = client.post(path, json={"model": "tiny", **body})
    assert answer.status_code == 400 and f"({where})" in answer.json()["error"]["message"], answer.text


def test_a_prompt_longer_than_the_context_is_refused_by_name(client: httpx.Client) -> None:
    ask = {**ASK, "messages": [{"role": "user", "content": "what is 3 + 4? " * 100}], "stream": True}
    answer = client.post(CHAT, json=ask)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"


def test_who_names_no_limit_gets_what_the_context_holds(client: httpx.Client) -> None:
    context = 128  # of the tiny model
    ask = {key: value for key, value in ASK.items() if key != "max_tokens"} | {"seed": 1, "ignore_eos": True}
    answer = client.post(CHAT, json=ask)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["total_tokens"] == context
    assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_hanging_up_gives_the_place_back(client: httpx.Client) -> None:
    with client.stream("POST", CHAT, json={**ASK, "max_tokens": 100, "stream": True, "temperature": 2}) as answer:
        next(answer.iter_lines())
    idle = 'sprat:num_requests_running{model_name="tiny"} 0.0'
    assert within(30, lambda: idle in client.get("/metrics").text)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("more", [127, 500])
def test_more_tokens_than_the_context_holds_are_refused_in_the_name_that_was_given(
    client: httpx.Client, name: str, more: int
) -> None:
    """In OpenAI's words, by which clients (litellm) know that it is the context."""
    ask = {key: value for key, value in ASK.items() if key != "max_tokens"}
    refused = client.post(CHAT, json={**ask, name: more})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert error["message"].startswith("This model's maximum context length is 128 tokens. However, you requested ")
    assert set(re.findall(r"max_\w*tokens", error["message"])) == {name} and "(prompt)" not in error["message"]
    assert f"{more} in the completion" in error["message"]


def test_a_request_chooses_an_adapter_by_its_model(tmp_path: Path) -> None:
    """As with vLLM: adapters are listed as models, and each answers as the model that it is merged into."""
    tiny_model(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    adapted = copy.deepcopy(model)
    add_lora(adapted, LoRAConfig(rank=4, targets=("o_proj", "kv_b_proj")), 1)
    for low_rank in adapters(adapted).values():
        torch.nn.init.normal_(low_rank.lora_B)
    save_peft(adapted, tmp_path / "adapter")
    merge_lora(adapted)
    ask = {**ASK, "temperature": 0, "thinking": {"type": "disabled"}}

    def answer(client: httpx.Client, name: str) -> str:
        body = client.post(CHAT, json={**ask, "model": name}).json()
        assert body["model"] == name
        return str(body["choices"][0]["message"]["content"])

    engine = Engine(model, tokenizer, adapters={"terse": tmp_path / "adapter"})
    with live(engine) as address, httpx.Client(base_url=address, timeout=30) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [(card["id"], card.get("parent")) for card in cards] == [("tiny", None), ("tiny:terse", "tiny")]
        assert client.get("/v1/models/tiny:terse").json()["id"] == "tiny:terse"
        plain, terse = answer(client, "tiny"), answer(client, "tiny:terse")
        assert answer(client, "terse") == terse, "its own name is enough"
        refused = client.post(CHAT, json={**ask, "model": "other"})
        assert refused.status_code == 404 and "'tiny', 'tiny:terse'" in refused.json()["error"]["message"]
    with live(Engine(adapted, tokenizer)) as address, httpx.Client(base_url=address, timeout=30) as client:
        assert answer(client, "tiny") == terse != plain
    with pytest.raises(ServeError, match="called 'terse'"):
        create_app(engine, ServeConfig(served_model_name="terse"))

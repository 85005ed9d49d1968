"""No tenant learns from the cache what another one has asked: not by counts, in any protocol.

What the clock would tell is measured by ``bench/serve.py``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve import answers
from tests.serve.answers import PATHS
from tests.serve.lively import KEYS, Lively, lively_server

SECRETS = ["swordfish", "password1", "letmein99", "trustno1x"]
PREFIX = "please keep to yourself what opens the door of our house, which nobody else may know of, and it is "


@pytest.fixture(scope="module")
def lively() -> Iterator[Lively]:
    with lively_server(("chatml",), ("off",)) as server:
        yield server


def body_of(protocol: str, text: str) -> dict[str, Any]:
    """A request in a protocol, of which one token is wanted."""
    turns = [{"role": "user", "content": text}]
    forms: dict[str, dict[str, Any]] = {
        "chat": {"messages": turns, "max_tokens": 1},
        "completions": {"prompt": text, "max_tokens": 1},
        "responses": {"input": text, "max_output_tokens": 1},
        "messages": {"messages": turns, "max_tokens": 1},
    }
    return {"model": "chatml-off", "seed": 1, **forms[protocol]}


def hit_tokens(lively: Lively, protocol: str, text: str, key: str, **fields: Any) -> tuple[int, int]:
    """Tokens of the prompt that were cached, and that were not, as the answer counts them."""
    reply = lively.post(PATHS[protocol], {**body_of(protocol, text), **fields}, key)
    assert reply.status_code == 200, reply.text
    stream = fields.get("stream")
    read = answers.streamed(protocol, reply.text) if stream else answers.whole(protocol, reply.json())
    usage = read.usage
    if protocol == "messages":
        return usage["cache_read_input_tokens"], usage["input_tokens"]
    if protocol == "responses":
        hit = usage["input_tokens_details"]["cached_tokens"]
        return hit, usage["input_tokens"] - hit
    hit = usage["prompt_cache_hit_tokens"]
    assert hit == usage["prompt_tokens_details"]["cached_tokens"]
    assert hit + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
    return hit, usage["prompt_cache_miss_tokens"]


@pytest.mark.parametrize("protocol", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_what_one_asked_is_new_when_another_asks_it(lively: Lively, protocol: str, stream: bool) -> None:
    """A user that a request names is none: what counts is the key."""
    text = f"{PREFIX}{protocol} {stream} " + "and so on " * 30
    first, again = (hit_tokens(lively, protocol, text, KEYS[0], stream=stream) for _ in range(2))
    assert again[0] > again[1] and sum(again) == sum(first)
    users = {"metadata": {"user_id": "one"}} if protocol == "messages" else {"user": "one"}
    other = hit_tokens(lively, protocol, text, KEYS[1], stream=stream, **users)
    assert other == first  # both begin with what they had asked themselves, which is the same
    assert hit_tokens(lively, protocol, text, KEYS[1], stream=stream)[0] == again[0]


def test_guesses_of_anothers_prompt_are_counted_as_if_it_had_never_been(lively: Lively) -> None:
    """Who guesses after the secret was asked counts what one counted who guessed before: the oracle is at chance."""
    draw = random.Random(5)
    for key in KEYS:  # what stands before every prompt is known to all
        hit_tokens(lively, "chat", PREFIX, key)
    for turn in range(12):
        prompts = {word: f"{turn} {PREFIX * 3}{word}, {turn}" for word in SECRETS}
        before = [hit_tokens(lively, "chat", prompts[word], KEYS[2]) for word in SECRETS]
        secret = draw.choice(SECRETS)
        for n in (1, 3):
            asked = lively.post(PATHS["chat"], {**body_of("chat", prompts[secret]), "n": n}, KEYS[0])
            assert asked.status_code == 200
        assert [hit_tokens(lively, "chat", prompts[word], KEYS[1]) for word in SECRETS] == before
        known = asked.json()["usage"]
        assert known["prompt_cache_hit_tokens"] > known["prompt_cache_miss_tokens"]  # its own tenant's is found


def test_metrics_and_models_say_nothing_of_a_single_tenants_prompts(lively: Lively) -> None:
    hit_tokens(lively, "chat", PREFIX + SECRETS[0], KEYS[0])
    for path in ("/metrics", "/v1/models", "/health", "/health/ready"):
        text = lively.client.get(path, headers={"Authorization": f"Bearer {KEYS[1]}"}).text
        assert SECRETS[0] not in text and KEYS[0] not in text, path

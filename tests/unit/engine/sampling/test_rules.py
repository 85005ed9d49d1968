"""Rules of a request, through the whole engine: alone, in company, and where one of them is broken."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from numpy.typing import NDArray

from sprat.engine import Engine, Response, Sampling
from sprat.errors import EngineError
from sprat.model import Transformer
from sprat.tokens import Tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(model: Transformer, tokenizer: Tokenizer) -> Iterator[Engine]:
    """One engine for all, so that what a request leaves behind would be seen by the next."""
    made = Engine(model, tokenizer, max_batch=8)
    yield made
    made.stop()
    assert made.check() == []


class Broken:
    """Raises at the fourth token."""

    starts_at, supports_drafts = 3, True

    def apply(self, logits_V: NDArray[np.float32], output_ids: Sequence[int], draft_ids: Sequence[int]) -> None:
        """Fail."""
        raise KeyError("lost")


def test_answers_have_their_form_whoever_else_is_in_the_batch(engine: Engine) -> None:
    forms = [
        Sampling(temperature=2, seed=seed, thinking=False, max_tokens=120, response=response)
        for seed, response in enumerate(
            4 * [Response.json(PERSON), Response.choice(["ja", "nein"]), Response.regex("[0-9]{3}é"), None]
        )
    ]
    outputs = engine.generate(["what is it?"] * len(forms), forms)
    for sampling, output in zip(forms, outputs, strict=True):
        if sampling.response is None or output.finish_reason != "stop":
            continue
        if sampling.response.kind == "schema":
            Draft202012Validator(PERSON).validate(json.loads(output.text))
        else:
            assert output.text in ("ja", "nein") or (len(output.text) == 4 and output.text.endswith("é"))
    assert sum(output.finish_reason == "stop" for output in outputs) >= 11
    for sampling, output in zip(forms[:4], outputs, strict=False):
        assert engine.generate(["what is it?"], sampling)[0].token_ids == output.token_ids


@pytest.mark.parametrize("speculate", ["ngram", "off"])
def test_what_was_drafted_changes_nothing(model: Transformer, tokenizer: Tokenizer, speculate: str) -> None:
    sampling = Sampling(
        temperature=0.7, seed=2, thinking=True, max_think_tokens=20, max_tokens=90, response=Response.json(PERSON),
        presence_penalty=0.5, repetition_penalty=1.2, logprobs=True, top_logprobs=3,
    )  # fmt: skip
    engine = Engine(model, tokenizer, speculate=speculate)  # type: ignore[arg-type]
    plain = Engine(model, tokenizer, speculate="off")
    found, expected = (one.generate(["the cat sat on the cat sat on the"], sampling)[0] for one in (engine, plain))
    assert found.token_ids == expected.token_ids and found.usage.reasoning_tokens <= 20
    assert found.top_logprobs is not None and found.logprobs is not None
    assert len(found.top_logprobs) == len(found.logprobs) == len(found.token_ids)
    for one in (engine, plain):
        one.stop()
        one._grammars.close()


def test_thinking_ends_in_time_and_the_answer_follows(engine: Engine, tokenizer: Tokenizer) -> None:
    output = engine.generate(["what?"], Sampling(thinking=True, max_think_tokens=7, max_tokens=30, temperature=2))[0]
    assert output.closed and output.usage.reasoning_tokens <= 7
    assert tokenizer.special_ids.think_close in output.token_ids[:8]


def test_top_logprobs_are_the_models_own(engine: Engine, model: Transformer, tokenizer: Tokenizer) -> None:
    sampling = Sampling(temperature=0.8, max_tokens=12, logprobs=True, top_logprobs=20, top_k=1, frequency_penalty=2)
    output = engine.generate([tokenizer.encode("the cat")], sampling)[0]
    ids = torch.tensor([output.prompt_ids + output.token_ids])
    with torch.no_grad():
        whole = (model(ids)[0] / 0.8).log_softmax(-1)[len(output.prompt_ids) - 1 : -1]
    assert output.top_logprobs is not None and output.logprobs is not None
    for place, top in enumerate(output.top_logprobs):
        torch.testing.assert_close(torch.tensor([p for _, p in top]), whole[place].topk(20).values, atol=2e-4, rtol=0)
        assert abs(output.logprobs[place] - float(whole[place, output.token_ids[place]])) < 2e-4


def test_a_stop_id_ends_the_answer_and_a_banned_word_never_comes(engine: Engine, tokenizer: Tokenizer) -> None:
    free = engine.generate(["a cat"], Sampling(temperature=0, max_tokens=20))[0].token_ids
    stopped = engine.generate(["a cat"], Sampling(temperature=0, max_tokens=20, stop_token_ids=(free[3],)))[0]
    assert stopped.token_ids == free[: free.index(free[3]) + 1] and stopped.finish_reason == "stop"
    other = engine.generate(["a cat"], Sampling(temperature=0, max_tokens=20, bad_words=(tuple(free[:2]),)))[0]
    assert other.token_ids[0] == free[0] and other.token_ids[1] != free[1]
    biased = engine.generate(["a cat"], Sampling(temperature=0, max_tokens=4, logit_bias={free[0]: -100}))[0]
    assert biased.token_ids[0] != free[0]


def test_a_broken_rule_costs_its_own_request_alone(engine: Engine) -> None:
    plain = Sampling(temperature=1, seed=5, max_tokens=12)
    expected = engine.generate(["a cat"], plain)[0].token_ids
    good = engine.submit("a cat", plain)
    bad = engine.submit("a cat", Sampling(max_tokens=12, processors=(lambda prompt: Broken(),)))
    with pytest.raises(EngineError, match="KeyError"):
        bad.result()
    assert good.result().token_ids == expected
    with pytest.raises(EngineError, match="response"):
        engine.submit("a cat", Sampling(max_tokens=12, response=Response.regex("(")))
    assert engine.check() == []

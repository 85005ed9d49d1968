"""Settings at the edge of what numbers can be: as float64 would have it, or refused by name, and no fault of others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sprat.engine import Engine, Sampling
from sprat.engine.backend import Batch
from sprat.engine.sampling import ops
from sprat.errors import EngineError
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.unit.engine.fake import Fake

NEIGHBOR = Sampling(max_tokens=12, seed=4, logprobs=True)
EXTREMES: list[dict[str, Any]] = [
    *(
        {"temperature": temperature, "logprobs": True, "top_logprobs": 20}
        for temperature in (1e-3, 1e-30, 2.9e-39, 1e-45, 1e-300)
    ),
    {"temperature": 1e-44, "top_k": 2, "top_p": 1e-300, "min_p": 5e-324, "logprobs": True},
    {"temperature": 100.0, "top_k": 2**31 - 1, "min_p": 1.0, "logprobs": True},
    {"repetition_penalty": 1e-30, "logprobs": True},
    {"repetition_penalty": 5e-324},
    {"repetition_penalty": 100.0, "frequency_penalty": 2.0, "presence_penalty": -2.0, "temperature": 1e-42},
    {"logit_bias": dict.fromkeys(range(9), -100), "temperature": 3e-39, "logprobs": True},
    {"seed": -(2**200)},
    {"seed": 2**200},
    {"max_think_tokens": 2**31 - 1, "thinking": True},
    {"min_think_tokens": 2**31 - 1, "thinking": True},
]


@pytest.fixture(params=["native", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both samplers."""
    if request.param == "numpy":
        monkeypatch.setattr(ops, "native", lambda: None)


@pytest.mark.usefixtures("way")
def test_an_extreme_request_is_answered_or_fails_alone(drafter: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(drafter, tokenizer, backend=Fake(drafter.config.vocab_size))
    alone = engine.generate(["what is it?"], NEIGHBOR)[0]
    extremes = [engine.submit("the cat sat", Sampling(max_tokens=12, **one)) for one in EXTREMES]
    beside = engine.submit("what is it?", NEIGHBOR)
    for one, handle in zip(EXTREMES, extremes, strict=True):
        try:
            output = handle.result()
        except EngineError as error:
            assert one == {"repetition_penalty": 5e-324} and "repetition_penalty" in str(error)
            continue
        assert output.token_ids
        assert all(-math.inf < logprob <= 1e-6 for logprob in output.logprobs or ()), one
        for row in output.top_logprobs or ():
            values = [logprob for _, logprob in row]
            assert all(math.isfinite(value) for value in values) and values == sorted(values, reverse=True)
    result = beside.result()
    assert result.token_ids == alone.token_ids and result.logprobs == pytest.approx(alone.logprobs, abs=1e-6)
    assert engine.check() == []


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("temperature", [1e-10, 2.95e-39, 2.9e-39, 1e-42, 1e-45])
def test_without_heat_the_likeliest_token_is_certain(
    drafter: Transformer, tokenizer: Tokenizer, temperature: float
) -> None:
    engine = Engine(drafter, tokenizer, backend=Fake(drafter.config.vocab_size))
    greedy = engine.generate(["what is it?"], Sampling(temperature=0, max_tokens=12))[0]
    cold = engine.generate(["what is it?"], Sampling(temperature=temperature, max_tokens=12, logprobs=True))[0]
    assert cold.token_ids == greedy.token_ids and cold.logprobs == [0.0] * len(cold.token_ids)


@pytest.mark.parametrize("name", ["top_k", "max_tokens", "min_think_tokens", "max_think_tokens", "n"])
def test_a_count_that_no_array_holds_is_refused_by_name(name: str) -> None:
    for value in (2**31, 2**63, 2**64, 10**400):
        with pytest.raises(EngineError, match=name) as caught:
            Sampling(**{name: value})
        assert caught.value.where == name


class Spoils(Fake):
    """Its logits are not a number wherever the token 9 was read."""

    def run(self, batch: Batch) -> torch.Tensor:
        logits_RV = super().run(batch)
        rows = np.repeat(np.arange(len(batch.starts_S) - 1), np.diff(batch.starts_S))
        for row, index in enumerate(batch.logits_index_R):
            last = int(batch.positions_T[index])
            table = batch.block_tables_SW[rows[index], : last // 64 + 1]
            if 9 in self.text[0, table].reshape(-1)[: last + 1]:
                logits_RV[row, 3] = torch.nan
        return logits_RV


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("speculate", ["off", "ngram"])
def test_logits_of_one_request_that_are_not_finite_fail_that_request_alone(
    drafter: Transformer, tokenizer: Tokenizer, temperature: float, speculate: Any
) -> None:
    vocab, how = (
        drafter.config.vocab_size,
        Sampling(temperature=temperature, max_tokens=20, seed=1, logit_bias={9: -100}),
    )
    prompts = [[5, 6, 7] * 9, [5, 9, 7] * 9, [8, 6, 7] * 9]
    plain = Engine(drafter, tokenizer, backend=Fake(vocab), speculate="off").generate([prompts[0], prompts[2]], how)
    engine = Engine(drafter, tokenizer, backend=Spoils(vocab), speculate=speculate)
    handles = [engine.submit(prompts[0], how)]
    while len(handles[0].sequence.output_ids) < 5:
        engine.step()
    handles += [engine.submit(prompt, how) for prompt in prompts[1:]]
    with pytest.raises(EngineError, match="not finite"):
        handles[1].result()
    assert [handles[at].result().token_ids for at in (0, 2)] == [output.token_ids for output in plain]
    assert engine.check() == []


def test_a_running_answer_that_spoils_fails_alone(drafter: Transformer, tokenizer: Tokenizer) -> None:
    vocab, how = drafter.config.vocab_size, Sampling(temperature=0, max_tokens=30)
    engine = Engine(drafter, tokenizer, backend=Spoils(vocab), speculate="off")
    forced = Sampling(temperature=0, max_tokens=30, processors=(lambda prompt: SaysNine(),))
    spoiled, fine = engine.submit([5, 6], forced), engine.submit([7, 8, 6], how)
    right = Engine(drafter, tokenizer, backend=Fake(vocab), speculate="off").generate([[7, 8, 6]], how)[0]
    with pytest.raises(EngineError, match="not finite"):
        spoiled.result()
    assert 9 not in right.token_ids and fine.result().token_ids == right.token_ids
    assert engine.check() == []


class SaysNine:
    """A processor that makes the third token a 9."""

    starts_at, supports_drafts = 2, True

    def apply(self, logits_V: Any, output_ids: Any, draft_ids: Any) -> None:
        """See ``Processor``."""
        if len(output_ids) + len(draft_ids) == 2:
            logits_V[np.arange(len(logits_V)) != 9] = -np.inf

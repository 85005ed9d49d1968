"""Speculation changes the speed and nothing else."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sprat.engine import Engine, Output, Sampling, speculation
from sprat.engine.backend import Batch
from sprat.engine.backends.native import NativeBackend
from sprat.engine.backends.torch import TorchBackend
from sprat.engine.sequence import DEFAULT_TENANT
from sprat.engine.speculation import NgramTable, Payoff, SpeculationMode
from sprat.errors import EngineError
from sprat.kernels import native
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.unit.engine.fake import Fake, scores
from tests.unit.engine.mtp import worst_guess

REPEATS = [3, 4, 5, 6, 7, 8] * 6
WITH_AND_WITHOUT: tuple[SpeculationMode, SpeculationMode] = ("mtp", "off")
PROMPTS = [REPEATS, [9, *REPEATS[:20]], list(range(30, 130)), [11]]


@pytest.mark.parametrize("mode", ["ngram", "mtp"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafted_answers_are_the_plain_ones(
    drafter: Transformer, tokenizer: Tokenizer, mode: SpeculationMode, temperature: float
) -> None:
    how = [Sampling(temperature=temperature, max_tokens=90, seed=s, logprobs=True) for s in range(len(PROMPTS))]
    plain = Engine(drafter, tokenizer, speculate="off").generate(PROMPTS, how)
    engine = Engine(drafter, tokenizer, backend=TorchBackend(drafter), speculate=mode, step_tokens=50, max_batch=3)
    drafted = engine.generate(PROMPTS, how)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    for one, other in zip(drafted, plain, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    stats = engine.stats()
    assert engine.check() == [] and (stats.drafted_tokens > 0 or (mode, temperature) == ("ngram", 0.8))
    assert stats.sampled_tokens == sum(len(one.token_ids) for one in drafted)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_whatever_is_asked_drafts_change_no_bit(
    drafter: Transformer, tokenizer: Tokenizer, temperature: float, batch: int
) -> None:
    """With a module that guesses right, and on the native step with guesses of which many are refused."""
    asks: list[dict[str, Any]] = [
        {},
        {"stop": ("a", "e")},
        {"logprobs": True, "top_logprobs": 3},
        {"repetition_penalty": 1.3, "stop_token_ids": (9,)},
        {"thinking": True, "min_think_tokens": 7},
        {"max_tokens": 2},
    ]
    how = [Sampling(**{"temperature": temperature, "max_tokens": 75, "seed": 5} | ask) for ask in asks]
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(len(how))]
    backends: list[list[Any]] = [[Fake(drafter.config.vocab_size, num_mtp_modules=1) for _ in WITH_AND_WITHOUT]]
    if native() is not None:
        backends.append([NativeBackend(drafter, threads=1) for _ in WITH_AND_WITHOUT])
    for pair in backends:
        engines = [
            Engine(drafter, tokenizer, backend=backend, speculate=mode, max_batch=batch)
            for backend, mode in zip(pair, WITH_AND_WITHOUT, strict=True)
        ]
        plain = engines[1].generate(prompts, how)
        if pair[0].draft.__func__ is NativeBackend.draft:
            pair[0].draft = guesses_from(plain, pair[0].draft)
        assert engines[0].generate(prompts, how) == plain
        stats = engines[0].stats()
        assert stats.accepted_tokens > 10 and engines[0].check() == []


def guesses_from(outputs: list[Output], draft: Callable[..., NDArray[np.int64]]) -> Callable[..., NDArray[np.int64]]:
    """``draft`` as it is, but its guess is what followed the same token somewhere in ``outputs``: often right."""
    after = {token: later for one in outputs for token, later in itertools.pairwise(one.token_ids)}

    def guess(batch: Batch, next_T: NDArray[np.int64], vocab: int) -> NDArray[np.int64]:
        guesses_SD = draft(batch, next_T, vocab)
        guesses_SD[:, 0] = [after.get(token, 0) for token in next_T[batch.starts_S[1:] - 1].tolist()]
        return guesses_SD

    return guess


def test_a_module_that_is_not_finite_drafts_nothing(drafter: Transformer, tokenizer: Tokenizer) -> None:
    fakes = [Fake(drafter.config.vocab_size, num_mtp_modules=1) for _ in range(2)]
    fakes[0].draft = lambda batch, next_T, vocab: np.full((len(batch.starts_S) - 1, 1), -1)  # type: ignore[method-assign]
    broken, plain = (
        Engine(drafter, tokenizer, backend=fake, speculate=mode)
        for fake, mode in zip(fakes, WITH_AND_WITHOUT, strict=True)
    )
    how = Sampling(temperature=0, max_tokens=20)
    assert broken.generate(PROMPTS, how) == plain.generate(PROMPTS, how) and broken.stats().drafted_tokens == 0


def test_good_drafts_save_steps(model: Transformer, tokenizer: Tokenizer) -> None:
    how = Sampling(temperature=0, max_tokens=60)
    fakes = {mode: Fake(model.config.vocab_size, num_mtp_modules=1) for mode in ("off", "mtp")}
    said = {}
    for mode, fake in fakes.items():
        engine = Engine(model, tokenizer, backend=fake, speculate="mtp" if mode == "mtp" else "off")
        said[mode] = engine.generate([[5] * 70], how)[0].token_ids
    count = len(said["off"])
    assert said["mtp"] == said["off"] and len(fakes["off"].batches) == count > 20
    assert len(fakes["mtp"].batches) == 1 + math.ceil((count - 1) / 2), "a step gives a token and a draft that holds"


def test_the_drafts_of_mtp_are_those_of_training(drafter: Transformer) -> None:
    model = Transformer.create(drafter.config.model_copy(update={"num_nextn_predict_layers": 2}), 8)
    worst, different = worst_guess(model, TorchBackend(model), list(range(40, 140)))
    assert worst < 1e-4 and different > 5


@pytest.mark.slow
def test_the_joint_distribution_of_drafted_tokens_is_the_models(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculation, "MAX_ROWS", 400)
    draws, kept, prompt = 20_000, 4, [5, 6, 7]
    engine = Engine(
        model, tokenizer, backend=Fake(model.config.vocab_size, num_mtp_modules=1), max_batch=400, speculate="mtp"
    )
    how = [Sampling(temperature=1.5, top_k=kept, max_tokens=4, seed=seed) for seed in range(draws)]
    sequences = [engine._request_builder.build(prompt, one, tenant=DEFAULT_TENANT) for one in how]
    handles = engine._enqueue(sequences, streams=False)
    seen = Counter(tuple(handle.result().token_ids) for handle in handles)
    stats = engine.stats()
    assert 0.2 < stats.accepted_tokens / stats.drafted_tokens < 0.9, "both ways out of a draft are taken"

    def likeliest(said: tuple[int, ...]) -> dict[int, float]:
        logits = scores(np.array([*prompt, *said], np.int32).tobytes(), model.config.vocab_size)
        logits = logits[: tokenizer.vocab_size].astype(np.float64) / 1.5
        best = np.argsort(-logits)[:kept]
        weight = np.exp(logits[best] - logits.max())
        return dict(zip(best.tolist(), (weight / weight.sum()).tolist(), strict=True))

    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(4):
        grown = [((*said, token), p * q) for said, p in expected.items() for token, q in likeliest(said).items()]
        expected = dict(grown)
    assert set(seen) <= set(expected)
    cells = [(seen[said], p * draws) for said, p in expected.items() if p * draws >= 5]
    rest = draws - sum(count for count, _ in cells), draws - sum(mean for _, mean in cells)
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = len(cells) - 1
    assert freedom > 50 and statistic < freedom + 3.5 * math.sqrt(2 * freedom), (statistic, freedom)


def test_an_ngram_table_finds_what_followed_last_time() -> None:
    table = NgramTable([1, 2, 3, 4, 5, 1, 2, 3, 6, 7], 100)
    assert table.propose([], 4) == []
    assert table.propose([1, 2, 3], 4) == [6, 7, 1, 2]
    assert table.propose([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert NgramTable([1], 100).propose([], 4) == []


def test_a_request_that_leaves_takes_its_ngram_table_along(model: Transformer, tokenizer: Tokenizer) -> None:
    fake = Fake(model.config.vocab_size, max_blocks=16)
    engine = Engine(model, tokenizer, backend=fake, speculate="ngram")
    how = Sampling(temperature=0, max_tokens=40, logit_bias={tokenizer.special_ids.eos: -100})
    handles = [engine.submit([*REPEATS, number], how) for number in range(3)]
    engine.step()
    engine.step()
    tables = engine.core.speculation.ngram_tables
    assert set(tables) == {handle.id for handle in handles}
    handles[0].cancel()
    engine.step()
    assert set(tables) == {handle.id for handle in handles[1:]}, "cancelled"
    handles[1].result()
    assert not tables, "finished"
    engine.submit(REPEATS, how)
    engine.step()
    engine.step()
    assert tables
    fake.fails = RuntimeError("out of luck")
    with pytest.raises(EngineError):
        engine.step()
    assert not tables and engine.check() == [], "failed"


def test_drafting_stops_where_it_does_not_pay_and_is_tried_again() -> None:
    payoff = Payoff()
    payoff.record_step(1, 1.0)
    assert payoff.pays(1, 4), "nobody knows yet"
    payoff.record_step(5, 1.2)
    payoff.record_accepted(3.0)
    assert payoff.pays(1, 4)
    for _ in range(60):
        payoff.record_accepted(0.0)
    assert sum(payoff.pays(1, 4) for _ in range(680)) == 40
    for _ in range(60):
        payoff.record_accepted(4.0)
    assert payoff.pays(1, 4)
    for _ in range(60):
        payoff.record_step(5, 6.0)
    assert not all(payoff.pays(1, 4) for _ in range(5))


def test_automatic_speculation_says_the_same(model: Transformer, tokenizer: Tokenizer) -> None:
    for modules, temperature in itertools.product((0, 1), (0.0, 1.0)):
        how = Sampling(temperature=temperature, max_tokens=100, n=3)
        engines = [
            Engine(model, tokenizer, backend=Fake(model.config.vocab_size, num_mtp_modules=modules), speculate=mode)
            for mode in ("auto", "off")
        ]
        auto, plain = ([one.token_ids for one in engine.generate([REPEATS], how)] for engine in engines)
        assert auto == plain


def test_what_cannot_speculate_is_said_at_once(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(EngineError, match="no way"):
        Engine(model, tokenizer, speculate="medusa")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="no MTP"):
        Engine(model, tokenizer, speculate="mtp")

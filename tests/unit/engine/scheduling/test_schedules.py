"""Whoever comes, goes, grows or is cancelled, in any order: no block is lost and no answer changes."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sprat.engine import Engine, Sampling, Tenant
from sprat.engine.request import RequestHandle
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.unit.engine.fake import Fake, oracle, scores

TEXT = [random.Random(7).randrange(5, 400) for _ in range(150)]
SCHEDULES = int(os.environ.get("SPRAT_SCHEDULES", "120"))  # the whole proof is 10,000, a quarter of an hour
LENGTHS = (1, 5, 63, 64, 65, 100, 127, 128, 140)


def walk(model: Transformer, tokenizer: Tokenizer, seed: int) -> int:
    """One random schedule; how often a request had to make mode."""
    chance = random.Random(seed)
    vocab, cache_blocks = model.config.vocab_size, chance.choice((4, 5, 7, 40))
    mode = chance.choice(("off", "off", "ngram", "mtp"))
    fake = Fake(vocab, max_blocks=chance.choice((cache_blocks, 100)), num_mtp_modules=1)
    engine = Engine(
        model,
        tokenizer,
        backend=fake,
        max_batch=chance.randint(1, 5),
        step_tokens=chance.choice((1, 40, 64, 300)),
        cache_bytes=cache_blocks * fake.block_bytes,
        frozen=chance.choice((False, True)),
        speculate=mode,
    )
    handles: list[RequestHandle] = []
    for _ in range(chance.randint(1, 40)):
        action = chance.random()
        if action < 0.3:
            handles += ask(engine, chance)
        elif action < 0.4 and handles:
            chance.choice(handles).cancel()
        else:
            engine.step()
        assert engine.check() == []
    patience = 3000
    while engine.busy and patience:
        engine.step()
        patience -= 1
    assert patience, "somebody waits for ever"
    assert engine.check() == [] and engine.stats().blocks_used == 0
    for handle in handles:
        output = handle.result()
        right = oracle(output.prompt_ids, 70, vocab, tokenizer.vocab_size, tokenizer.special_ids.eos)
        assert output.token_ids == right[: len(output.token_ids)]
        if output.finish_reason == "length":
            assert len(output.token_ids) == handle.sequence.max_tokens
        assert output.finish_reason != "stop" or output.token_ids[-1] == tokenizer.special_ids.eos
        if output.prompt_logprobs is not None and output.finish_reason != "cancelled":
            assert output.prompt_logprobs[1:] == pytest.approx(scored(output.prompt_ids, vocab), abs=1e-4)
    return engine.stats().preemptions


def scored(prompt: list[int], vocab: int) -> list[float]:
    """The log-probability of each token of a prompt but the first, without any engine."""
    rows = np.stack([scores(np.array(prompt[:end], np.int32).tobytes(), vocab) for end in range(1, len(prompt) + 1)])
    logprobs_TV = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
    return [float(row[token]) for row, token in zip(logprobs_TV[:-1], prompt[1:], strict=True)]


def ask(engine: Engine, chance: random.Random) -> list[RequestHandle]:
    """One request of some tenant, or several that share a prompt."""
    tenant = chance.choice((Tenant("a", b"a"), Tenant("b", b"b"), Tenant("c")))
    prompt = TEXT[: chance.choice(LENGTHS)]
    if chance.random() < 0.3:
        prompt = prompt[:-1] + [chance.randrange(5, 400)]
    how = Sampling(temperature=0, max_tokens=chance.choice((1, 3, 20, 55)))
    if chance.random() < 0.25:
        how = Sampling(temperature=0, max_tokens=chance.choice((0, 3, 20)), prompt_logprobs=True)
    group = next(engine._prompt_groups)
    sequences = [
        engine._request_builder.build(prompt, how, prompt_group=group, tenant=tenant)
        for _ in range(chance.choice((1, 3)))
    ]
    return engine._enqueue(sequences, streams=False)


@pytest.mark.timeout(0 if SCHEDULES > 1000 else 900)
@settings(max_examples=SCHEDULES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_a_random_schedule_loses_no_block_and_changes_no_answer(
    model: Transformer, tokenizer: Tokenizer, seed: int
) -> None:
    assert walk(model, tokenizer, seed) >= 0


def test_the_schedules_do_preempt(model: Transformer, tokenizer: Tokenizer) -> None:
    assert sum(walk(model, tokenizer, seed) for seed in range(60)) > 20

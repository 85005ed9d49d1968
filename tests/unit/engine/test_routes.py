"""The experts that an answer took are told for every place, however its prompt was cut, shared, cached or preempted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sprat.config.sizes import size
from sprat.engine import Engine, Output, Sampling
from sprat.engine.backend import Backend
from sprat.engine.backends.native import NativeBackend
from sprat.engine.backends.torch import TorchBackend
from sprat.engine.routes import Routes
from sprat.kernels import native
from sprat.model import Transformer
from sprat.tokens import Tokenizer

LONG = [(17 * place) % 400 + 5 for place in range(150)]
PROMPTS = [LONG, [7], LONG[:130], LONG[3:99], LONG[:64]]
ASKS = Sampling(max_tokens=12, routes=True, logprobs=True, seed=3)
BACKENDS = ["torch", *(["native"] if native() is not None else [])]


def backend_of(name: str, model: Transformer) -> Backend:
    return TorchBackend(model) if name == "torch" else NativeBackend(model, threads=1)


def check(model: Transformer, output: Output) -> None:
    """Hold the experts of an answer to those of a plain forward pass over all of it."""
    tokens = output.prompt_ids + output.token_ids
    with torch.no_grad():
        layers = model.hidden(torch.tensor([tokens])).routing
    expected_TLK = torch.stack([layer.index_NK for layer in layers], 1).numpy()
    routes = output.routes
    assert routes is not None and routes.dtype == np.uint8 and routes.shape == expected_TLK.shape
    assert np.array_equal(np.sort(routes[:-1], -1), np.sort(expected_TLK[:-1], -1))
    assert not routes[-1].any()  # nobody computes the last token


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("step_tokens", [512, 40])
def test_they_are_those_of_a_plain_forward_pass(
    model: Transformer, tokenizer: Tokenizer, name: str, step_tokens: int
) -> None:
    engine = Engine(model, tokenizer, backend=backend_of(name, model), step_tokens=step_tokens, max_batch=3)
    for output in engine.generate(PROMPTS, ASKS):
        check(model, output)
    assert not engine.core.check()


@pytest.mark.parametrize("name", BACKENDS)
def test_answers_to_one_prompt_share_it(model: Transformer, tokenizer: Tokenizer, name: str) -> None:
    engine = Engine(model, tokenizer, backend=backend_of(name, model), step_tokens=70)
    outputs = engine.generate([LONG, LONG[:20]], Sampling(max_tokens=9, routes=True, n=3))
    assert len({tuple(one.token_ids) for one in outputs}) == 6
    for output in outputs:
        check(model, output)
    assert [one.usage.cache_hit_tokens for one in outputs] == [0, 150, 150, 0, 20, 20]  # computed once
    plain = Sampling(max_tokens=9, n=3)
    mixed = engine.generate([LONG, LONG], [plain, Sampling(max_tokens=9, n=3, routes=True)])
    assert [one.routes is None for one in mixed] == [True] * 3 + [False] * 3
    for output in mixed[3:]:
        check(model, output)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_cached_is_computed_again_for_who_asks(model: Transformer, tokenizer: Tokenizer, name: str) -> None:
    engine = Engine(model, tokenizer, backend=backend_of(name, model), frozen=True)
    plain = engine.generate(PROMPTS, Sampling(max_tokens=12, logprobs=True, seed=3))
    again = engine.generate(PROMPTS, Sampling(max_tokens=12, logprobs=True, seed=3))
    assert sum(one.usage.cache_hit_tokens for one in again) > 300 and all(one.routes is None for one in again)
    for output, one in zip(engine.generate(PROMPTS, ASKS), plain, strict=True):
        check(model, output)
        assert output.token_ids == one.token_ids and output.usage.cache_hit_tokens == 0


@pytest.mark.parametrize("name", BACKENDS)
def test_a_preempted_answer_keeps_them(model: Transformer, tokenizer: Tokenizer, name: str) -> None:
    backend = backend_of(name, model)
    engine = Engine(model, tokenizer, backend=backend, max_batch=6, cache_bytes=5 * backend.block_bytes)
    prompts = [LONG[place : place + 40] for place in range(6)]
    outputs = engine.generate(prompts, Sampling(max_tokens=60, routes=True, ignore_eos=True))
    assert engine.stats().preemptions > 0
    for output in outputs:
        check(model, output)


@pytest.mark.skipif(native() is None, reason="drafts need rows that do not depend on the batch")
def test_drafts_leave_none_behind(drafter: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(drafter, tokenizer, backend=NativeBackend(drafter, threads=1), speculate="mtp")
    for output in engine.generate(PROMPTS, Sampling(max_tokens=40, routes=True, temperature=0.3)):
        check(drafter, output)
    quoting = Engine(drafter, tokenizer, backend=NativeBackend(drafter, threads=1), speculate="ngram")
    for output in quoting.generate([[5, 6, 7, 8] * 9], Sampling(max_tokens=40, routes=True, temperature=0)):
        check(drafter, output)
    assert engine.stats().accepted_tokens < engine.stats().drafted_tokens and quoting.stats().drafted_tokens


def test_prompts_alone_have_them_too(model: Transformer, tokenizer: Tokenizer) -> None:
    how = Sampling(max_tokens=0, temperature=0, prompt_logprobs=True, routes=True)
    (output,) = Engine(model, tokenizer, backend=TorchBackend(model), step_tokens=64).generate([LONG], how)
    with torch.no_grad():
        layers = model.hidden(torch.tensor([LONG])).routing
    expected_TLK = torch.stack([layer.index_NK for layer in layers], 1).numpy()
    assert output.routes is not None and np.array_equal(np.sort(output.routes, -1), np.sort(expected_TLK, -1))


def test_a_dense_model_has_none(tokenizer: Tokenizer) -> None:
    config = size("pico", vocab_size=tokenizer.vocab_size, n_routed_experts=0)
    model = Transformer.create(config, 3)
    assert not model.moe_layers()
    assert all(one.routes is None for one in Engine(model, tokenizer).generate(PROMPTS[1:2], ASKS))


def test_what_a_draft_left_behind_the_end_is_not_told() -> None:
    """A draft behind the last token was computed, too: whether there was one must not be seen in the answer."""
    experts = Routes(np.full((9, 2, 3), 7, np.uint8), num_prompt=2)
    told = experts.upto(6, 5)
    assert told.shape == (6, 2, 3) and (told[:5] == 7).all() and not told[5:].any()
    assert (experts.experts_PLK == 7).all()  # a copy

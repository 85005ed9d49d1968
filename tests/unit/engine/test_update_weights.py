"""Weights that change in the middle of an answer: each token is that of the weights it says, after all before it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sprat.engine import Engine, Output, Sampling
from sprat.engine.backend import Backend
from sprat.engine.backends.native import NativeBackend
from sprat.engine.backends.torch import TorchBackend
from sprat.errors import EngineError
from sprat.kernels import native
from sprat.model import Transformer
from sprat.tokens import Tokenizer

LONG = [(17 * place) % 400 + 5 for place in range(100)]
PROMPTS = [LONG, [7], LONG[:64], LONG[3:99]]
BACKENDS = ["torch", *(["native"] if native() is not None else [])]
NAMES = [4, 5, 7, 9]  # of the versions


def made(model: Transformer) -> list[Transformer]:
    """Four versions of a model, each far from the others."""
    versions = [copy.deepcopy(model)]
    for seed in range(1, len(NAMES)):
        generator = torch.Generator().manual_seed(seed)
        versions.append(copy.deepcopy(versions[-1]))
        with torch.no_grad():
            for weight in versions[-1].parameters():
                weight.add_(0.3 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator))
    return versions


class Changing:
    """An engine whose weights change before some of its steps."""

    def __init__(self, versions: list[Transformer], tokenizer: Tokenizer, name: str, every: int, **limits: int) -> None:
        own = copy.deepcopy(versions[0])
        backend: Backend = TorchBackend(own) if name == "torch" else NativeBackend(own, threads=1)
        if "blocks" in limits:
            limits["cache_bytes"] = limits.pop("blocks") * backend.block_bytes
        self.engine = Engine(own, tokenizer, backend=backend, **limits)  # type: ignore[arg-type]
        self.engine.update_weights(lambda: None, NAMES[0])
        self._own, self._versions, self._every, self._steps = own, versions, every, 0
        self.engine.before_step = self._before_step

    def _before_step(self) -> None:
        self._steps += 1
        number, rest = divmod(self._steps, self._every)
        if not rest and number < len(NAMES):
            self.engine.update_weights(lambda: self._write(number), NAMES[number])
            assert not self.engine.check()

    def _write(self, number: int) -> None:
        with torch.no_grad():
            for own, new in zip(self._own.parameters(), self._versions[number].parameters(), strict=True):
                own.copy_(new)


def check(versions: list[Transformer], output: Output, temperature: float, vocab: int) -> set[int]:
    """Hold every token of an answer to a plain pass of its own version over all before it; the versions it has."""
    tokens, prompt = output.prompt_ids + output.token_ids, len(output.prompt_ids)
    assert output.versions is not None and len(output.versions) == len(output.token_ids) == len(output.logprobs or [])
    assert output.versions == sorted(output.versions) and output.routes is not None
    for version in set(output.versions):
        with torch.no_grad():
            out = versions[NAMES.index(version)].hidden(torch.tensor([tokens[:-1]]))
            logits_TV = versions[NAMES.index(version)].logits(out.x_BTD[0])
        logprob_TV = (logits_TV / (temperature or 1)).log_softmax(-1)
        experts_TLK = torch.stack([layer.index_NK for layer in out.routing], 1).sort(-1).values.numpy()
        for place, (token, own) in enumerate(zip(output.token_ids, output.versions, strict=True), prompt - 1):
            if own != version:
                continue
            assert output.logprobs[place - prompt + 1] == pytest.approx(float(logprob_TV[place, token]), abs=1e-4)
            assert temperature or token == int(logits_TV[place, :vocab].argmax())
            assert np.array_equal(np.sort(output.routes[place], -1), experts_TLK[place])
    return set(output.versions)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_token_is_of_the_weights_that_it_says(
    model: Transformer, tokenizer: Tokenizer, name: str, temperature: float
) -> None:
    versions = made(model)
    how = Sampling(max_tokens=40, logprobs=True, routes=True, ignore_eos=True, temperature=temperature, n=2)
    changing = Changing(versions, tokenizer, name, 9, step_tokens=96)
    outputs = changing.engine.generate(PROMPTS, how)
    assert [check(versions, one, temperature, tokenizer.vocab_size) for one in outputs].count({4, 5, 7, 9}) >= 6
    again = Changing(versions, tokenizer, name, 9, step_tokens=96).engine.generate(PROMPTS, how)
    if name == "native":
        assert [(a.token_ids, a.logprobs, a.versions) for a in again] == [
            (one.token_ids, one.logprobs, one.versions) for one in outputs
        ]


@pytest.mark.parametrize("name", BACKENDS)
def test_also_where_memory_is_short_and_requests_wait(model: Transformer, tokenizer: Tokenizer, name: str) -> None:
    versions = made(model)
    how = Sampling(max_tokens=60, logprobs=True, routes=True, ignore_eos=True)
    changing = Changing(versions, tokenizer, name, 25, max_batch=3, blocks=5)
    outputs = changing.engine.generate([LONG[place : place + 50] for place in range(6)], how)
    assert changing.engine.stats().preemptions > 0
    seen = [check(versions, one, 1.0, tokenizer.vocab_size) for one in outputs if one.versions is not None]
    assert max(map(len, seen)) >= 3 and len(seen) == 6
    plain = changing.engine.generate([LONG[:5]], how)
    assert plain[0].versions is None  # it never changed while this one ran


@pytest.mark.skipif(native() is None, reason="drafts need rows that do not depend on the batch")
def test_drafts_of_older_weights_change_nothing(drafter: Transformer, tokenizer: Tokenizer) -> None:
    versions = made(drafter)
    how = Sampling(max_tokens=50, logprobs=True, routes=True, ignore_eos=True, temperature=0)
    for mode in ("mtp", "ngram", "off"):
        changing = Changing(versions, tokenizer, "native", 6, speculate=mode)  # type: ignore[arg-type]
        for output in changing.engine.generate([[5, 6, 7, 8] * 9, LONG], how):
            assert len(check(versions, output, 0.0, tokenizer.vocab_size)) >= 3


def test_a_frozen_engine_keeps_its_weights(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(EngineError, match="frozen"):
        Engine(model, tokenizer, frozen=True).update_weights(lambda: None, 1)

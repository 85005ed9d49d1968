"""Sampling: the right distribution, the right logprob, and noise that depends on nobody else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sprat.engine.sample import Dials, inverse_cdf, sample, truncate, uniform
from sprat.engine.sequence import Sampling, Sequence, noise_key
from sprat.errors import EngineError


def dials_of(*samplings: Sampling, ban: int = 0) -> Dials:
    """Settings of one row each."""
    dials = Dials(len(samplings))
    for row, sampling in enumerate(samplings):
        key = noise_key(sampling.seed, row, [1])
        dials.set(row, Sequence(row, [1], sampling, 9, key, ban=ban))
    return dials


def test_noise_is_uniform_and_a_pure_function_of_key_and_position() -> None:
    key = np.arange(20_000, dtype=np.uint64)
    position = np.full(20_000, 5, np.int64)
    noise = uniform(key, position)
    assert noise.min() >= 0 and noise.max() < 1
    counts = np.histogram(noise, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square, 19 degrees of freedom, p = 0.0007
    assert (uniform(key[7:8], position[7:8]) == noise[7]).all()
    assert abs(np.corrcoef(noise, uniform(key, position + 1))[0, 1]) < 0.03


def test_sampled_tokens_follow_the_softmax_at_that_temperature() -> None:
    logits = torch.randn(1, 150, generator=torch.Generator().manual_seed(0)) * 2
    rows = 40_000
    dials = dials_of(*[Sampling(temperature=0.7)] * 1)
    dials.reserve(rows)
    for name, value in vars(dials).items():
        value[:] = value[0]
        setattr(dials, name, value)
    dials.key[:] = np.random.default_rng(1).integers(0, 2**63, rows).astype(np.uint64)
    tokens = sample(logits.expand(rows, -1).contiguous(), dials).tokens_B
    expected = (logits[0] / 0.7).softmax(-1) * rows
    counts = torch.bincount(tokens, minlength=150)
    big = expected > 20
    assert ((counts[big] - expected[big]).square() / expected[big]).sum() < 1.6 * int(big.sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 1.0 - 2.0**-53]))
def test_a_token_of_weight_zero_is_never_chosen(vocab: int, seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(3, vocab, generator=generator) * (torch.rand(3, vocab, generator=generator) < 0.3)
    weight[:, seed % vocab] = 1e-6
    chosen = inverse_cdf(weight, torch.full((3,), noise, dtype=torch.float64))
    assert (weight.gather(1, chosen[:, None]) > 0).all()


def kept_naively(weight: Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The ids that survive, one step after another."""
    order = sorted(range(len(weight)), key=lambda i: (-float(weight[i]), i))
    order = order[:top_k] if top_k else order
    total, kept, mass = sum(float(weight[i]) for i in order), [], 0.0
    for index in order:
        if top_p < 1 and mass >= top_p * total:
            break
        kept.append(index)
        mass += float(weight[index])
    return {i for i in kept if float(weight[i]) >= min_p * float(weight[order[0]])}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from([0, 1, 3, 50]),
    st.sampled_from([0.1, 0.55, 0.9, 1.0]),
    st.sampled_from([0.0, 0.125, 1.0]),
)
def test_truncation_keeps_what_the_definitions_say(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    weight = torch.randn(1, 30, generator=torch.Generator().manual_seed(seed)).mul(2).exp()
    cut = truncate(weight, torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
    assert set(cut[0].nonzero()[:, 0].tolist()) == kept_naively(weight[0], top_k, float(np.float32(top_p)), min_p)


def test_logprobs_are_those_of_the_whole_distribution_whatever_was_cut() -> None:
    logits = torch.randn(4, 90, generator=torch.Generator().manual_seed(2)) * 3
    settings_of_rows = [
        Sampling(temperature=0.6, logprobs=True),
        Sampling(temperature=1.5, top_k=3, top_p=0.8, logprobs=True),
        Sampling(temperature=0, logprobs=True),
        Sampling(temperature=1, min_p=0.2, logprobs=True),
    ]
    for ban in (0, 1):
        result = sample(logits, dials_of(*settings_of_rows, ban=ban), banned=[int(logits[0].argmax()), 5], vocab=80)
        heat = torch.tensor([0.6, 1.5, 1.0, 1.0])
        expected = (logits / heat[:, None]).log_softmax(-1).gather(1, result.tokens_B[:, None])[:, 0]
        assert result.logprobs_B is not None
        torch.testing.assert_close(result.logprobs_B, expected, atol=2e-6, rtol=1e-6)


def test_banned_and_padded_tokens_never_come_out() -> None:
    logits = torch.zeros(300, 6)
    logits[:, 2] = 50
    logits[:, 5] = 60
    for heat in (0.0, 1.0):
        dials = dials_of(*[Sampling(temperature=heat)] * 300, ban=2)
        tokens = sample(logits, dials, banned=[2], vocab=5).tokens_B
        assert not ((tokens == 2) | (tokens == 5)).any()
        dials.position[:] = 2
        assert (sample(logits, dials, banned=[2], vocab=5).tokens_B == 2).all()


def test_greedy_and_sampled_rows_share_a_batch_without_touching_each_other() -> None:
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(4))
    rows = [Sampling(temperature=0), Sampling(seed=5), Sampling(temperature=0.3, top_k=2, seed=6)]
    together = sample(logits, dials_of(*rows)).tokens_B.tolist()
    assert together[0] == int(logits[0].argmax())
    for row in (1, 2):
        alone = dials_of(*rows)
        alone.move([row], [0])
        assert sample(logits[row : row + 1], alone).tokens_B.tolist() == [together[row]]


@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_a_broken_model_is_named_and_not_sampled(heat: float) -> None:
    logits = torch.zeros(2, 9)
    logits[1, 3] = torch.nan
    with pytest.raises(EngineError, match="not finite"):
        sample(logits, dials_of(*[Sampling(temperature=heat)] * 2))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -1.0),
        ("top_k", -1),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("n", 0),
        ("seed", "x"),
        ("stop", ("",)),
        ("thinking", "maybe"),
        ("min_think_tokens", True),
    ],
)
def test_a_bad_setting_is_one_clear_sentence(name: str, value: object) -> None:
    with pytest.raises(EngineError) as caught:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert caught.value.where == name and caught.value.todo and "\n" not in str(caught.value)

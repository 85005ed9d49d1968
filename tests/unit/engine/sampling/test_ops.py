"""Drawing: the right distribution, cut where the definitions say, and noise that depends on nobody else."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from sprat.engine.sampling.ops import (
    VOCAB_BLOCK,
    LogNormalizer,
    SoftmaxWeights,
    Truncation,
    argmax,
    inverse_cdf,
    logprob,
    sample,
    sample_numpy,
    top_k_top_p,
    uniform,
)
from sprat.errors import EngineError


def drawn(
    logits: Tensor,
    noise: NDArray[np.float64],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> NDArray[np.int64]:
    """Tokens of rows that share their settings."""
    rows = len(logits)
    kinds = ((top_k, np.int64), (top_p, np.float32), (min_p, np.float32))
    truncation = Truncation(*[np.full(rows, value, kind) for value, kind in kinds])  # type: ignore[arg-type]
    return sample(logits.numpy(), np.full(rows, temperature, np.float32), truncation, noise, logits.shape[1])[0]


def chi_square(tokens: NDArray[np.int64], expected: NDArray[np.float64]) -> tuple[float, int]:
    """The statistic over entries that are expected more than 20 times, and how many they are."""
    counts = np.bincount(tokens, minlength=len(expected))
    big = expected > 20
    return float(((counts - expected)[big] ** 2 / expected[big]).sum()), int(big.sum())


def test_noise_is_uniform_and_a_pure_function_of_key_and_position() -> None:
    key = np.arange(20_000, dtype=np.uint64)
    position = np.full(20_000, 5, np.int64)
    noise = uniform(key, position)
    assert noise.min() >= 0 and noise.max() < 1
    counts = np.histogram(noise, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square, 19 degrees of freedom, p = 0.0007
    assert (uniform(key[7:8], position[7:8]) == noise[7]).all()
    assert abs(np.corrcoef(noise, uniform(key, position + 1))[0, 1]) < 0.03


@pytest.mark.parametrize("implementation", ["native", "numpy"])
@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 30, "top_p": 0.9, "min_p": 0.02}]
)
def test_twenty_thousand_draws_follow_the_distribution_that_was_asked(
    cut: dict[str, float], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "numpy":
        monkeypatch.setattr("sprat.engine.sampling.ops.native", lambda: None)
    logits = torch.randn(1, 150, generator=torch.Generator().manual_seed(0)) * 2
    rows, temperature = 20_000, 1.3
    noise = uniform(np.random.default_rng(1).integers(0, 2**63, rows).astype(np.uint64), np.zeros(rows, np.int64))
    tokens = drawn(logits.expand(rows, -1).contiguous(), noise, temperature=temperature, **cut)  # type: ignore[arg-type]
    weight = (logits[0] / temperature).softmax(-1)
    kept = kept_naively(weight, int(cut.get("top_k", 0)), float(np.float32(cut.get("top_p", 1))), cut.get("min_p", 0.0))
    share = np.array([float(weight[i]) if i in kept else 0.0 for i in range(150)])
    statistic, cells = chi_square(tokens, share / share.sum() * rows)
    assert set(tokens.tolist()) <= kept and cells >= 6
    assert statistic < cells + 4 * (2 * cells) ** 0.5  # four standard deviations of chi-square


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 1.0 - 2.0**-53]))
def test_a_token_of_weight_zero_is_never_chosen(vocab: int, seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.random((3, vocab), np.float32) * (rng.random((3, vocab)) < 0.3)
    weight[:, seed % vocab] = 1e-6
    blocks = np.pad(weight, ((0, 0), (0, -vocab % VOCAB_BLOCK))).astype(np.float32).reshape(3, -1, VOCAB_BLOCK)
    weights = SoftmaxWeights(
        blocks, blocks.sum(-1).astype(np.float64), LogNormalizer(np.zeros(3, np.float32), np.zeros(3, np.float32))
    )
    chosen = inverse_cdf(weights, np.full(3, noise))
    assert (weight[np.arange(3), chosen] > 0).all()


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


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from([0, 1, 3, 29, 30, 50]),
    st.sampled_from([1e-6, 0.1, 0.55, 0.9, 0.9999, 1.0]),
    st.sampled_from([0.0, 0.125, 1.0]),
    st.sampled_from([0.0, 2.0, 20.0]),
    st.booleans(),
)
def test_truncation_keeps_what_the_definitions_say(
    seed: int, top_k: int, top_p: float, min_p: float, spread: float, ties: bool
) -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(seed)).mul(spread)
    weight = (logits.round() if ties else logits).sub(logits.max()).exp()
    ids, kept = top_k_top_p(weight.numpy(), float(weight.double().sum()), top_k, top_p, min_p)
    nothing = set((weight == 0).nonzero()[:, 0].tolist())
    assert set(ids.tolist()) == kept_naively(weight, top_k, top_p, min_p) - nothing
    assert (np.diff(ids) > 0).all() and (kept == weight.numpy()[ids]).all()


IMPLEMENTATIONS = {"native": sample, "numpy": sample_numpy}
DRAWS = int(os.environ.get("SPRAT_DRAWS", "400"))  # the whole fuzz is 20,000


def oracle(
    logits: NDArray[np.float32], temperature: np.float32, top_k: int, top_p: np.float32, min_p: np.float32, vocab: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """In float64, from the definitions: the shares that may be drawn, and the log-probabilities of the whole row."""
    scaled = (logits.astype(np.float64) - float(logits[:vocab].max())) / float(temperature)
    most = scaled.max()
    whole = scaled - (most + np.log(np.exp(scaled - most).sum()))
    weight = np.exp(scaled[:vocab])
    order = np.lexsort((np.arange(vocab), -weight))[: top_k or None]
    mass = np.concatenate(([0.0], weight[order].cumsum()))
    reached = mass[:-1] < float(top_p) * mass[-1] if top_p < 1 else np.full(len(order), True)
    kept = order[(reached | (np.arange(len(order)) == 0)) & (weight[order] >= float(min_p) * weight[order[0]])]
    share = np.zeros(vocab)
    share[kept] = weight[kept]
    return share / share.sum(), whole


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_settings_draw_what_float64_says(implementation: str) -> None:
    chance = np.random.default_rng(5)
    temperatures = [1e-45, 1e-40, 2.9e-39, 2.95e-39, 1e-38, 1e-30, 1e-12, 1e-6, 1e-3, 0.02, 0.3, 1.0, 1.7, 40.0, 100.0]
    tails = [0.0, 1e-45, 1e-30, 1e-7, 0.03, 0.5, 1.0]
    for number in range(DRAWS):
        vocab = int(chance.choice([1, 2, 5, 127, 128, 300]))
        width = vocab + int(chance.choice([0, 0, 1, 9]))
        spread = float(chance.choice([1e-30, 1e-3, 1.0, 8.0, 300.0, 1e30, 3e38]))
        logits = (chance.uniform(-1, 1, (1, width)) * spread).astype(np.float32)
        if chance.random() < 0.2:  # as a grammar leaves them
            logits[0, chance.random(width) < 0.7] = -np.inf
            logits[0, int(chance.integers(vocab))] = np.float32(spread)
        if chance.random() < 0.2:
            logits[0, vocab:] = logits[0, :vocab].max() * np.float32(0.5) + np.float32(min(spread, 1e38))
        temperature, top_k = np.float32(chance.choice(temperatures)), int(chance.choice([0, 0, 1, 2, 40, 2**31 - 1]))
        top_p, min_p = np.float32(chance.choice([1e-45, 1e-7, 0.4, 0.999, 1, 1])), np.float32(chance.choice(tails))
        if spread < temperature / 100:  # all weights are nearly 1, and which is greatest is up to rounding
            top_k, top_p, min_p = 0, np.float32(1), np.float32(0)
        noise = float(chance.choice([0.0, 1e-12, 1 - 2.0**-53, *chance.random(4)]))
        temperature_R, truncation = (
            np.array([temperature]),
            Truncation(np.array([top_k]), np.array([top_p]), np.array([min_p])),
        )
        tokens, normalizer = IMPLEMENTATIONS[implementation](
            logits, temperature_R, truncation, np.array([noise]), vocab
        )
        share, whole = oracle(logits[0], temperature, top_k, top_p, min_p, vocab)
        token, what = int(tokens[0]), (number, temperature, spread, top_k, top_p, min_p, noise, vocab, width)
        reached = share.cumsum()
        assert 0 <= token < vocab, what
        # What float32 rounds may move an edge of the interval of a token, or what a truncation keeps, by a little.
        assert reached[token] - share[token] - 1e-4 <= noise <= reached[token] + 1e-4 or edge(share, token), what
        found = float(logprob(logits[0, [token]], temperature_R, normalizer)[0])
        right = max(float(whole[token]), -3.4028235e38)
        assert abs(found - right) <= 1e-5 + 1e-6 * abs(right), (*what, found, right)


def edge(share: NDArray[np.float64], token: int) -> bool:
    """Whether ``token`` is as likely as the least likely that is kept, so that rounding decides."""
    return bool(share[share > 0].min() < 1e-4 or abs(share[token] - share[share > 0].min()) < 1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ids_behind_the_vocabulary_take_nothing_from_what_may_be_drawn(implementation: str) -> None:
    rows = 4000
    logits = np.tile(np.array([[0.0, 1.0, 2.0, 500.0]], np.float32), (rows, 1))
    ones, zeros = np.ones(rows, np.float32), np.zeros(rows, np.float32)
    truncation, noise = Truncation(np.zeros(rows, np.int64), ones, zeros), np.random.default_rng(0).random(rows)
    tokens, normalizer = IMPLEMENTATIONS[implementation](logits, ones, truncation, noise, 3)
    weight = np.exp(np.arange(3.0))
    statistic, cells = chi_square(tokens, weight / weight.sum() * rows)
    assert cells == 3 and statistic < 16.3  # 2 degrees of freedom, p = 0.0003
    assert logprob(
        logits[:1, 2], ones[:1], LogNormalizer(normalizer.max_R[:1], normalizer.log_sum_R[:1])
    ) == pytest.approx(-498)


def test_a_row_draws_the_same_in_any_company() -> None:
    logits = torch.randn(64, 700, generator=torch.Generator().manual_seed(3)) * 3
    noise = np.random.default_rng(0).random(64)
    for cut in ({}, {"top_p": 0.9}, {"top_k": 5}):
        together = drawn(logits, noise, **cut)  # type: ignore[arg-type]
        alone = [int(drawn(logits[row : row + 1], noise[row : row + 1], **cut)[0]) for row in range(64)]  # type: ignore[arg-type]
        assert together.tolist() == alone


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_model_is_named_and_not_sampled(bad: float) -> None:
    logits = torch.zeros(2, 9)
    logits[1, 3] = bad
    with pytest.raises(EngineError, match="not finite"):
        drawn(logits, np.zeros(2))
    with pytest.raises(EngineError, match="not finite"):
        argmax(logits.numpy(), 9)

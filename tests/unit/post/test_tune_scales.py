"""Tuning a rounded model's scales: it gets nearer to the original on text that it was not tuned on, or stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sprat import quant
from sprat.config.quant import QuantizeConfig
from sprat.data.loader import gather_rows
from sprat.data.pack import PackedDataset
from sprat.errors import DataError
from sprat.model import Transformer
from sprat.post.tune_scales import _kl, hold_out, tune_scales
from tests.unit.quant.families import divergence, model_of, text

FIELDS = ("tokens", "segments", "loss_mask")


def rows(count: int, seed: int, learned: slice = slice(None)) -> PackedDataset:
    """Text of which the tokens ``learned`` count."""
    tokens = text(count, seed).numpy().astype(np.int32)
    mask = np.zeros_like(tokens, np.uint8)
    mask[:, learned] = 1
    return PackedDataset(tokens, np.ones_like(tokens), mask)


def small_of(model: Transformer) -> Transformer:
    return quant.quantize_model(model, QuantizeConfig(head_bits=16))


@pytest.mark.parametrize("family", ["llama", "v3"])
def test_a_tuned_model_says_more_of_what_the_original_says(family: str) -> None:
    model = model_of(family)
    small = small_of(model)
    before, fresh = divergence(model, small, text(32, 9)), text(32, 9)
    codes = {name: packed.codes.clone() for name, packed in quant.quantized_weights(small).items()}
    seen = list[tuple[int, int]]()
    facts = tune_scales(
        small, model, [rows(96, 1)], steps=60, lr=0.004, on_progress=lambda done, of: seen.append((done, of))
    )
    assert divergence(model, small, fresh) < 0.8 * before
    assert facts["kl_after"] < facts["kl_before"] and facts["kept"] and seen[-1] == (60, 60)
    assert all(torch.equal(codes[name], packed.codes) for name, packed in quant.quantized_weights(small).items())
    assert not any(name.endswith("change") for name in small.state_dict())


def test_scales_that_got_no_better_stay() -> None:
    model = model_of("llama")
    small = small_of(model)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    facts = tune_scales(small, model, [rows(16, 1)], steps=5, lr=1.0)
    assert not facts["kept"] and facts["kl_after"] > facts["kl_before"]
    assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in before.items())


def test_only_what_is_learned_counts() -> None:
    """The KL of rows of which one token counts is that of its place alone."""
    model = model_of("llama")
    small, part = small_of(model), rows(4, 5, slice(20, 21))
    with torch.no_grad():
        measured = _kl(small, model, gather_rows(part, range(4)))
        truth, said = (each(text(4, 5))[:, 19].log_softmax(-1) for each in (model, small))
        expected = (truth.exp() * (truth - said)).sum(-1).mean()
    assert measured == pytest.approx(expected.item(), rel=1e-4)


def test_each_kind_of_rows_counts_alike() -> None:
    """Rows of few answers beside rows of text: the mean of both, not of all tokens."""
    model = model_of("llama")
    parts = [rows(4, 5, slice(20, 21)), rows(4, 6)]
    alone = [tune_scales(small_of(model), model, [part], steps=1, lr=1e-9)["kl_before"] for part in parts]
    both = tune_scales(small_of(model), model, parts, steps=1, lr=1e-9)["kl_before"]
    assert both == pytest.approx(sum(alone) / 2, rel=1e-4)


def test_rows_of_which_nothing_is_learned_say_nothing() -> None:
    """Of a long prompt most rows have no answer; they once counted as rows that lost nothing."""
    model = model_of("llama")
    answers, prompts = rows(4, 5, slice(20, 21)), rows(12, 6, slice(0))
    both = PackedDataset(*(np.concatenate([getattr(part, name) for part in (prompts, answers)]) for name in FIELDS))
    alone, diluted = (
        tune_scales(small_of(model), model, [part], steps=1, lr=1e-9)["kl_before"] for part in (answers, both)
    )
    assert diluted == pytest.approx(alone, rel=1e-4)
    with pytest.raises(DataError, match="0 rows of 32 tokens with something to learn are too few"):
        tune_scales(small_of(model), model, [prompts], steps=1, lr=1e-9)


@pytest.mark.parametrize("count", [2, 3])
def test_few_rows_are_not_judged_by_what_they_were_trained_on(count: int) -> None:
    part = rows(count, 5)
    train, apart = hold_out(part, 0)
    shown = [{tuple(row) for row in each.tokens.tolist()} for each in (train, apart)]
    assert not shown[0] & shown[1] and len(shown[0] | shown[1]) == count
    with pytest.raises(DataError, match="1 rows of 32 tokens"):
        hold_out(rows(1, 5), 0)

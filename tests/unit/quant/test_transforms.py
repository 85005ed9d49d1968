"""Rotated and scaled models are the same function before rounding, route the same, and round better."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from sprat import quant
from sprat.config.quant import QuantizeConfig
from sprat.errors import ConfigError
from sprat.model import Transformer
from sprat.quant.awq import awq_scale
from sprat.quant.layers import scheme_of
from sprat.quant.rotation import orthogonal_matrix, rotate, without_mtp
from tests.unit.quant.families import FAMILIES, MOE, divergence, model_of, text


def assert_same_function(mine: Transformer, model: Transformer) -> None:
    """Logits within float32 rounding, and the same experts for every token."""
    tokens = text(8, 5)
    with torch.no_grad():
        torch.testing.assert_close(mine(tokens), model(tokens), atol=2e-4, rtol=1e-4)
        ours, theirs = mine.hidden(tokens), model.hidden(tokens)
        for a, b in zip(ours.routing, theirs.routing, strict=True):
            assert torch.equal(a.index_NK.sort(-1).values, b.index_NK.sort(-1).values)
        for depth in range(1, len(model.mtp) + 1):
            drafts = [each.mtp_hidden(hidden, tokens, depth=depth) for each, hidden in ((mine, ours), (model, theirs))]
            torch.testing.assert_close(drafts[0].x_BTD, drafts[1].x_BTD, atol=2e-4, rtol=1e-4)


def scaled(model: Transformer, **settings: object) -> Transformer:
    """A copy with AWQ's scales folded in."""
    config, mine = QuantizeConfig(group=32, **settings), copy.deepcopy(model)  # type: ignore[arg-type]
    awq_scale(mine, text(32, 1), lambda name: scheme_of(config, name))
    return mine


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_are_folded_without_a_change_of_the_function(family: str) -> None:
    model = model_of(family)
    mine = scaled(model)
    changed = {n for n, w in mine.named_parameters() if not torch.equal(w, model.get_parameter(n))}
    readers = {"llama": "q_proj", "v2": "q_proj", "mtp": "eh_proj"}.get(family, "o_proj")
    assert any(readers in name for name in changed) and any("down" in name for name in changed)
    assert_same_function(mine, model)


@pytest.mark.parametrize("family", ["llama", "v3"])
def test_loud_channels_cost_less_once_they_are_scaled(family: str) -> None:
    model, calibration = model_of(family), text(96, 1)
    plain, awq = (
        quant.quantize_model(model, QuantizeConfig(awq=awq, head_bits=16), calibration_BT=calibration)
        for awq in (False, True)
    )
    assert divergence(model, awq, text(32, 7)) < 0.7 * divergence(model, plain, text(32, 7))


def test_padding_and_other_documents_do_not_move_the_scales() -> None:
    model, config = model_of("v3"), QuantizeConfig()
    alone, tokens = copy.deepcopy(model), text(32, 1)
    awq_scale(alone, tokens, lambda name: scheme_of(config, name))
    padded = torch.cat((tokens, torch.full((32, 16), 95)), 1)
    segments = torch.cat((torch.ones(32, 32), torch.zeros(32, 16)), 1).long()
    awq_scale(model, padded, lambda name: scheme_of(config, name), segments_BT=segments)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, alone.get_parameter(name), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mtp"])
def test_a_rotated_model_is_the_same_function(family: str) -> None:
    model = model_of(family)
    mine = rotate(copy.deepcopy(model), seed=3)
    assert_same_function(mine, model)
    assert not mine.config.tie_word_embeddings
    assert all(
        bool((w == 1).all()) for n, w in mine.named_parameters() if n.endswith("layernorm.weight") and "_a_" not in n
    )

    def loudest(of: Transformer) -> Tensor:
        table = of.embed_tokens.weight.square().mean(0)
        return table.max() / table.mean()

    assert loudest(mine) < 0.5 * loudest(model)


@pytest.mark.parametrize("width", [1, 9, 48, 64, 576])
def test_the_rotation_keeps_lengths_and_spreads_a_single_channel(width: int) -> None:
    matrix = orthogonal_matrix(width, 0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
    power = width & -width
    assert matrix.abs().max() <= power**-0.5 + 1e-9
    assert not torch.equal(matrix, orthogonal_matrix(width, 1)) or width == 1


def test_a_rotation_says_what_stands_in_its_way_and_may_leave_it_out() -> None:
    model = model_of("mtp")
    with pytest.raises(ConfigError, match="drop_mtp"):
        quant.quantize_model(model, QuantizeConfig(rotation="hadamard"))
    facts = quant.QuantizeFacts()
    small = quant.quantize_model(
        model, QuantizeConfig(rotation="hadamard", drop_mtp=True, bits=8, head_bits=16), facts=facts
    )
    assert facts.mtp_dropped == 1 and len(model.mtp) == 1
    assert divergence(without_mtp(copy.deepcopy(model)), small, text(8, 3)) < 0.01


@pytest.mark.parametrize("family", MOE)
def test_all_of_it_together_stays_near(family: str) -> None:
    model = model_of(family)
    config = QuantizeConfig(rotation="hadamard", awq=True, rounding="gptq", symmetric=False, clip="mse", head_bits=16)
    small = quant.quantize_model(model, config, calibration_BT=text(96, 1))
    assert divergence(model, small, text(32, 7)) < 0.7 * divergence(model, quant.quantize_model(model), text(32, 7))

"""Idle experts are asked more often, busy ones less, once a step."""

from __future__ import annotations

import pytest
import torch

from sprat.model import Transformer
from sprat.train import balance


def test_bias_rises_for_idle_and_falls_for_busy_experts(model: Transformer) -> None:
    load_E = torch.tensor([9, 7, 8, 8, 16, 0, 8, 8])
    balance.update_bias(model, [load_E], 0.01)
    bias_E = model.moe_layers()[0].gate.e_score_correction_bias
    torch.testing.assert_close(bias_E, torch.tensor([-0.01, 0.01, 0, 0, -0.01, 0.01, 0, 0]))
    assert not model.moe_layers()[1].gate.e_score_correction_bias.any()


def test_speed_zero_moves_nothing(model: Transformer) -> None:
    balance.update_bias(model, [torch.arange(8)], 0.0)
    assert not model.moe_layers()[0].gate.e_score_correction_bias.any()


def test_max_violation_reads_as_published() -> None:
    assert balance.max_violation([torch.full((8,), 5)]) == 0.0
    assert balance.max_violation([torch.tensor([0, 0, 0, 12])]) == pytest.approx(3.0)
    assert balance.max_violation([torch.tensor([4, 4]), torch.tensor([6, 2])]) == pytest.approx(0.5)
    assert balance.max_violation([]) == 0.0


def test_a_lopsided_router_evens_out(model: Transformer) -> None:
    """Only the bias moves: the busiest expert's share comes down to near the mean."""
    layer = model.moe_layers()[0]
    x_ND = torch.randn(256, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    layer.gate.e_score_correction_bias[0] = 1.0
    first = balance.max_violation([layer.gate(x_ND).load_E])
    for _ in range(200):
        balance.update_bias(model, [layer.gate(x_ND).load_E], 0.01)
    assert first > 2.5
    assert balance.max_violation([layer.gate(x_ND).load_E]) < 0.3


def test_padding_has_no_vote_in_the_balance(model: Transformer) -> None:
    """Rows that are two fifths padding, all of it alike: real tokens end as even as they do in full rows."""
    layer = model.moe_layers()[0]
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(320, 32, generator=generator) + 0.5
    valid_N = torch.arange(320) % 20 < 12
    x_ND[~valid_N] = x_ND[19].clone()
    for _ in range(200):
        balance.update_bias(model, [layer.gate(x_ND, valid_N).load_E], 0.01)
    chosen = layer.gate(x_ND, valid_N).index_NK[valid_N].flatten().tolist()
    mean = len(chosen) / 8
    assert all(0.7 * mean < chosen.count(expert) < 1.3 * mean for expert in range(8))

"""Muon turns matrices, AdamW moves the rest, and both can be stopped and gone on with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sprat.config import OptimConfig
from sprat.errors import CheckpointError
from sprat.model import Transformer
from sprat.train import optim


def test_newton_schulz_evens_out_singular_values() -> None:
    x_Gmn = torch.randn(5, 12, 30, generator=torch.Generator().manual_seed(0))
    before = x_Gmn.clone()
    values = torch.linalg.svdvals(optim.orthogonalise(x_Gmn))
    assert values.min() > 0.6 and values.max() < 1.25
    assert torch.equal(x_Gmn, before)


def test_newton_schulz_keeps_the_directions() -> None:
    x_Gmn = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(x_Gmn)
    rotated = u.transpose(1, 2) @ optim.orthogonalise(x_Gmn) @ vh.transpose(1, 2)
    off_diagonal = rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 1e-3


def test_a_stack_of_experts_moves_like_its_matrices_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(3, 6, 4, generator=generator) for _ in range(2))
    stacked = nn.Parameter(start.clone())
    alone = [nn.Parameter(matrix.clone()) for matrix in start]
    together = optim.Muon({"stack": stacked}, 0.9, 0.1)
    single = [optim.Muon({"one": one}, 0.9, 0.1) for one in alone]
    for _ in range(3):
        stacked.grad = grad.clone()
        together.step(0.1)
        for one, muon, its in zip(alone, single, grad, strict=True):
            one.grad = its.clone()
            muon.step(0.1)
    torch.testing.assert_close(stacked.data, torch.stack([one.data for one in alone]))


def test_tall_and_wide_matrices_share_a_batch_and_stay_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(6, 4, generator=generator)
    tall, wide = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(4, 6))
    muon = optim.Muon({"tall": tall, "wide": wide}, 0.95, 0.0)
    assert len(muon.shapes) == 1
    tall.grad, wide.grad = grad, grad.T.contiguous()
    muon.step(1.0)
    torch.testing.assert_close(tall.data, wide.data.T * (6 / 4) ** 0.5)


def test_adamw_equals_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {"matrix": torch.randn(4, 3, generator=generator), "gain": torch.randn(4, generator=generator)}
    ours = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    theirs = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    adamw = optim.AdamW(ours, (0.9, 0.98), 0.1)
    reference = torch.optim.AdamW(
        [{"params": [theirs["matrix"]], "weight_decay": 0.1}, {"params": [theirs["gain"]], "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.98),
    )
    for _ in range(4):
        for name in start:
            grad = torch.randn(start[name].shape, generator=generator)
            ours[name].grad, theirs[name].grad = grad.clone(), grad.clone()
        adamw.step(0.01)
        reference.step()
    for name in start:
        torch.testing.assert_close(ours[name].data, theirs[name].data)


def test_only_hidden_matrices_go_to_muon(model: Transformer) -> None:
    optimiser = optim.build(model, OptimConfig())
    assert sorted(optimiser.muon_names + optimiser.adamw_names) == sorted(dict(model.named_parameters()))
    assert {"embed_tokens.weight", "head.weight", "norm.weight", "layers.1.mlp.gate.weight"} <= set(
        optimiser.adamw_names
    )
    assert {"layers.1.mlp.experts.w_up_EFD", "layers.0.self_attn.o_proj.weight"} <= set(optimiser.muon_names)
    assert optim.build(model, OptimConfig(name="adamw")).muon_names == []


def test_clipping_scales_the_joint_norm(model: Transformer) -> None:
    optimiser = optim.build(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    expected = sum(parameter.numel() for parameter in model.parameters()) ** 0.5
    assert optimiser.clip(1.0) == pytest.approx(expected, rel=1e-5)
    assert optimiser.clip(1e9) == pytest.approx(1.0, rel=1e-4)


def test_state_of_another_optimiser_is_refused(model: Transformer) -> None:
    muon, adamw = optim.build(model, OptimConfig()), optim.build(model, OptimConfig(name="adamw"))
    with pytest.raises(CheckpointError, match="another model or optimiser"):
        muon.load(adamw.state())

"""Muon turns matrices, AdamW moves the rest, and both can be stopped and gone on with."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sprat.config import LoRAConfig, OptimConfig
from sprat.errors import CheckpointError, TrainingError
from sprat.model import Transformer
from sprat.model.lora import add_lora
from sprat.train import optim


def published_iteration(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Jordan's quintic, five times, on singular values as shares of the Frobenius norm."""
    for _ in range(5):
        share = 3.4445 * share - 4.7750 * share**3 + 2.0315 * share**5
    return share


def spread(rows: int, columns: int, condition: float) -> Tensor:
    """A random matrix whose singular values fall evenly (in their logarithms) from 1 to 1 / ``condition``."""
    generator = torch.Generator().manual_seed(rows)
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    return u @ torch.diag(torch.logspace(0, -math.log10(condition), rows)) @ vh


@pytest.mark.parametrize(("rows", "columns", "condition"), [(12, 30, 10), (16, 16, 100), (40, 40, 1e4), (24, 60, 1e6)])
def test_newton_schulz_turns_singular_values_as_published(rows: int, columns: int, condition: float) -> None:
    """Long or square, well- or ill-conditioned: the same directions, each value through the polynomial."""
    x_Gmn = spread(rows, columns, condition).unsqueeze(0)
    before = x_Gmn.clone()
    u, values, vh = torch.linalg.svd(x_Gmn[0].double(), full_matrices=False)
    turned = u.T @ optim.orthogonalize(x_Gmn)[0].double() @ vh.T
    share = (values / values.norm()).numpy()
    np.testing.assert_allclose(np.diag(turned.numpy()), published_iteration(share), atol=2e-3)
    assert (turned - torch.diag(turned.diag())).abs().max() < 2e-3
    reached = turned.diag().numpy()[share >= 0.0015]
    assert reached.min() >= 0.679 and reached.max() <= 1.211
    assert (turned.diag().numpy()[share < 0.0015] <= 485 * share[share < 0.0015] + 2e-3).all()
    assert torch.equal(x_Gmn, before)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (3, 6, 4)])
def test_muon_moves_as_published(shape: tuple[int, ...]) -> None:
    """Jordan's formula in numpy over three steps: momentum, Nesterov's look ahead, decay, and the factor of shape."""
    rng, lr, momentum, decay = np.random.default_rng(0), 0.1, 0.9, 0.3
    weight = rng.standard_normal(shape)
    parameter = nn.Parameter(torch.tensor(weight, dtype=torch.float32))
    muon, held = optim.Muon([parameter], lr, momentum, decay), np.zeros(shape)
    for _ in range(3):
        grad = rng.standard_normal(shape)
        parameter.grad = torch.tensor(grad, dtype=torch.float32)
        muon.step()
        held = momentum * held + (1 - momentum) * grad
        u, values, vh = np.linalg.svd((1 - momentum) * grad + momentum * held, full_matrices=False)
        turned = published_iteration(values / np.linalg.norm(values, axis=-1, keepdims=True))
        direction = u @ (turned[..., None] * vh)
        weight = weight * (1 - lr * decay) - lr * max(1.0, shape[-2] / shape[-1]) ** 0.5 * direction
    np.testing.assert_allclose(parameter.detach().numpy(), weight, atol=1e-4)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_decay_shrinks_what_no_gradient_moves(name: str) -> None:
    """Decoupled decay (Loshchilov and Hutter, eq. 12): a step takes ``lr * decay`` of a matrix, nothing of a gain."""
    module = nn.Linear(4, 3)
    before = {key: value.detach().clone() for key, value in module.named_parameters()}
    config = OptimConfig.model_validate({"name": name, "muon_lr": 0.1, "adam_lr": 0.1, "weight_decay": 0.5})
    optimizer = optim.build(module, config)
    for _ in range(2):
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(lr_factor=0.5)
    torch.testing.assert_close(module.weight.data, before["weight"] * (1 - 0.1 * 0.5 * 0.5) ** 2)
    assert torch.equal(module.bias.data, before["bias"])


def test_a_stack_of_experts_moves_like_its_matrices_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(3, 6, 4, generator=generator) for _ in range(2))
    stacked = nn.Parameter(start.clone())
    alone = [nn.Parameter(matrix.clone()) for matrix in start]
    together = optim.Muon([stacked], 0.1, 0.9, 0.1)
    single = [optim.Muon([one], 0.1, 0.9, 0.1) for one in alone]
    for _ in range(3):
        stacked.grad = grad.clone()
        together.step()
        for one, muon, its in zip(alone, single, grad, strict=True):
            one.grad = its.clone()
            muon.step()
    torch.testing.assert_close(stacked.data, torch.stack([one.data for one in alone]))


def test_tall_and_wide_matrices_share_a_batch_and_stay_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(6, 4, generator=generator)
    tall, wide = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(4, 6))
    muon = optim.Muon([tall, wide], 1.0, 0.95, 0.0)
    tall.grad, wide.grad = grad, grad.T.contiguous()
    muon.step()
    torch.testing.assert_close(tall.data, wide.data.T * (6 / 4) ** 0.5)


def adam(weight: NDArray[np.float64], grads: list[NDArray[np.float64]], lr: float, decay: float) -> NDArray[np.float64]:
    """Algorithm 2 of Loshchilov and Hutter, with betas (0.9, 0.98)."""
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step, grad in enumerate(grads, 1):
        mean, square = 0.9 * mean + 0.1 * grad, 0.98 * square + 0.02 * grad**2
        direction = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.98**step)) + 1e-8)
        weight = weight - lr * (direction + decay * weight)
    return weight


def test_adamw_moves_as_published() -> None:
    """Over four steps, a matrix and a gain; only the matrix is decayed."""
    rng, module = np.random.default_rng(0), nn.Linear(3, 4)
    optimizer = optim.build(module, OptimConfig(name="adamw", adam_lr=0.02, betas=(0.9, 0.98), weight_decay=0.1))
    before = {name: value.detach().double().numpy().copy() for name, value in module.named_parameters()}
    grads = {name: [rng.standard_normal(value.shape) for _ in range(4)] for name, value in before.items()}
    for step in range(4):
        for name, parameter in module.named_parameters():
            parameter.grad = torch.tensor(grads[name][step], dtype=torch.float32)
        optimizer.step(lr_factor=0.5)
    for name, parameter in module.named_parameters():
        wanted = adam(before[name], grads[name], 0.01, 0.1 if name == "weight" else 0.0)
        np.testing.assert_allclose(parameter.detach().numpy(), wanted, atol=1e-5)


def test_one_count_of_steps_holds_for_all_that_adamw_moves() -> None:
    """A gain that the loss reached for the first time in the third step is corrected as a third step."""
    module = nn.Linear(3, 4)
    optimizer = optim.build(module, OptimConfig(name="adamw", adam_lr=0.01, betas=(0.9, 0.98)))
    before = module.bias.detach().double().numpy().copy()
    for step in range(3):
        module.weight.grad = torch.ones_like(module.weight)
        module.bias.grad = torch.ones_like(module.bias) if step == 2 else None
        optimizer.step()
    first = 0.1 / (1 - 0.9**3) / np.sqrt(0.02 / (1 - 0.98**3))
    np.testing.assert_allclose(module.bias.detach().numpy(), before - 0.01 * first, atol=1e-6)


def test_both_are_torch_optimizers_and_muon_goes_on_from_its_torch_state() -> None:
    """What torch's tools save of Muon (state_dict) is all of it: a copy that loads it goes on to the same bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (4, 6), (3, 6, 4), (5, 5)]
    here = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    there = [nn.Parameter(parameter.detach().clone()) for parameter in here]
    one, other = optim.Muon(here, 0.1, 0.9, 0.1), optim.Muon(there, 0.3, 0.5, 0.0)
    for step in range(4):
        if step == 2:
            assert [state["momentum_buffer"].shape for state in one.state.values()] == shapes
            other.load_state_dict(one.state_dict())
            with torch.no_grad():
                for mine, theirs in zip(here, there, strict=True):
                    theirs.copy_(mine)
        for mine, theirs in zip(here, there, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            theirs.grad = mine.grad.clone()
        one.step()
        other.step()
    assert isinstance(one, torch.optim.Optimizer)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(here, there, strict=True))


def stepped(shape: tuple[int, ...] = (4, 6), dtype: torch.dtype = torch.float32) -> tuple[optim.Muon, nn.Parameter]:
    """A Muon after one step."""
    parameter = nn.Parameter(torch.ones(shape, dtype=dtype))
    muon = optim.Muon([parameter], 0.1)
    parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    muon.step()
    return muon, parameter


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda muon: pickle.loads(pickle.dumps(muon))])
def test_a_copy_of_muon_goes_on_as_the_original(copied: Any) -> None:
    muon, parameter = stepped()
    twin = copied(muon)
    (other,) = twin.param_groups[0]["params"]
    other.grad = parameter.grad
    muon.step()
    twin.step()
    assert other is not parameter and torch.equal(other, parameter)


def test_muon_asks_its_closure_with_gradients_and_forgets_when_its_state_is_cleared() -> None:
    muon, parameter = stepped()

    def closure() -> float:
        muon.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    expected = float((parameter.detach() ** 2).sum())
    assert muon.step(closure) == expected
    muon.state.clear()
    muon.step()
    assert parameter.grad is not None
    torch.testing.assert_close(muon.state[parameter]["momentum_buffer"], 0.05 * parameter.grad)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 6), {"lr": -1.0}), ((4, 6), {"lr": math.nan}), ((4, 6), {"momentum": 1.0}), ((4, 6), {"momentum": -0.1}),
        ((4, 6), {"weight_decay": -0.1}), ((4,), {}), ((), {}),
    ],
)  # fmt: skip
def test_muon_refuses_what_it_cannot_move_or_move_by(shape: tuple[int, ...], options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Muon"):
        optim.Muon([nn.Parameter(torch.ones(shape))], **{"lr": 0.1, **options})
    muon, _ = stepped()
    with pytest.raises(ValueError, match="Muon"):
        muon.add_param_group({"params": [nn.Parameter(torch.ones(shape))], **options})
    assert len(muon.param_groups) == 1


def test_muon_loads_only_states_that_are_its_own_and_else_stays_as_it_was() -> None:
    for shape in ((5, 6), (1, 6), (6, 4), (2, 4, 6)):
        muon, parameter = stepped()
        before = copy.deepcopy(muon.state_dict())
        with pytest.raises(ValueError, match="not Muon's of shape"):
            muon.load_state_dict(stepped(shape)[0].state_dict())
        adamw = torch.optim.AdamW([parameter])
        with pytest.raises(ValueError, match="momentum"):
            muon.load_state_dict(adamw.state_dict())
        after = muon.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert torch.equal(after["state"][0]["momentum_buffer"], before["state"][0]["momentum_buffer"])
    fresh = optim.Muon([nn.Parameter(torch.ones(4, 6))], 0.3)
    muon.load_state_dict(fresh.state_dict())
    assert muon.param_groups[0]["lr"] == 0.3 and not muon.state_dict()["state"]


def test_the_momentum_of_bfloat16_keeps_its_bits() -> None:
    muon, parameter = stepped(dtype=torch.bfloat16)
    twin = optim.Muon([other := nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))], 0.1)
    twin.load_state_dict(muon.state_dict())
    one, two = muon.state[parameter]["momentum_buffer"], twin.state[other]["momentum_buffer"]
    assert two.dtype == torch.float32 and torch.equal(one, two) and one is not two
    muon.step()
    assert not torch.equal(one, two)


def test_only_hidden_matrices_go_to_muon(model: Transformer) -> None:
    optimizer = optim.build(model, OptimConfig())
    assert sorted(optimizer.muon_names + optimizer.adamw_names) == sorted(dict(model.named_parameters()))
    assert {"embed_tokens.weight", "head.weight", "norm.weight", "layers.1.mlp.gate.weight"} <= set(
        optimizer.adamw_names
    )
    assert {"layers.1.mlp.experts.w_up_EFD", "layers.0.self_attn.o_proj.weight"} <= set(optimizer.muon_names)
    assert optim.build(model, OptimConfig(name="adamw")).muon_names == []


def test_adapters_go_to_adamw_and_nothing_else_is_moved(model: Transformer) -> None:
    add_lora(model, LoRAConfig(rank=4, dora=True))
    optimizer = optim.build(model, OptimConfig())
    assert not optimizer.muon_names and all("lora_" in name for name in optimizer.adamw_names)
    assert set(map(id, optimizer.parameters)) == {id(p) for p in model.parameters() if p.requires_grad}
    before = [parameter.clone() for parameter in optimizer.parameters]
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, old in zip(optimizer.parameters, before, strict=True):
        assert (parameter - old + 0.003).abs().max() < 1e-5  # the first step of Adam is its rate


def test_clipping_scales_the_joint_norm(model: Transformer) -> None:
    optimizer = optim.build(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    expected = sum(parameter.numel() for parameter in model.parameters()) ** 0.5
    assert optimizer.clip_grad_norm(1e9) == pytest.approx(expected, rel=1e-5)
    assert all((parameter.grad == 1).all() for parameter in model.parameters())  # a norm below the limit stays
    assert optimizer.clip_grad_norm(2.0) == pytest.approx(expected, rel=1e-5)
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, 2.0 / expected), rtol=1e-5, atol=0)


def test_both_optimisers_step_at_their_own_rate(model: Transformer) -> None:
    """AdamW's first step moves every number by its rate; Muon's moves a matrix by its rate times its own norm."""
    optimizer = optim.build(model, OptimConfig(muon_lr=0.02, adam_lr=0.003, weight_decay=0.0))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step(lr_factor=0.5)
    moved = {name: value.detach() - before[name] for name, value in model.named_parameters()}
    for name in optimizer.adamw_names:
        torch.testing.assert_close(moved[name].abs(), torch.full_like(moved[name], 0.0015), rtol=0, atol=3e-5)
    for name in optimizer.muon_names:
        rows, columns = moved[name].shape[-2:]
        values = torch.linalg.svdvals(moved[name]) / (0.01 * max(1, rows / columns) ** 0.5)
        assert values.median() > 0.67 and values.max() < 1.22


def test_state_of_another_optimiser_is_refused(model: Transformer) -> None:
    muon, adamw = optim.build(model, OptimConfig()), optim.build(model, OptimConfig(name="adamw"))
    with pytest.raises(CheckpointError, match="another model or optimiser"):
        muon.load_state_dict(adamw.state_dict())


def test_both_have_the_face_of_one_optimizer() -> None:
    module = nn.Linear(4, 3)
    optimizer = optim.build(module, OptimConfig(muon_lr=0.1, adam_lr=0.2))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.2]
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(lr_factor=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1, 0.1]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in module.parameters())
    with pytest.raises(TypeError):
        optimizer.step(lambda: 0.0)  # type: ignore[misc]
    with pytest.raises(TrainingError, match="no parameter"):
        optim.build(nn.Module(), OptimConfig())

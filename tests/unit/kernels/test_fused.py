"""Each native function beside its torch form, over random shapes; NaN and infinity are not hidden."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sprat.kernels import fused, library
from sprat.model.moe import MLP, Experts

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: torch does the work")
sizes = given(rows=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 99))
some = settings(max_examples=40, deadline=None)


def random(*shape: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@some
@sizes
def test_norm(rows: int, width: int, seed: int) -> None:
    x, weight, pull = (random(*s, seed=seed + n) for n, s in enumerate([(rows, width), (width,), (rows, width)]))
    out, scale = fused.rms_forward(x, weight, 1e-5)
    x.requires_grad_(), weight.requires_grad_()
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
    assert torch.allclose(out, plain, rtol=1e-5, atol=1e-5)
    grads = fused.rms_backward(pull, x.detach(), weight.detach(), scale)
    for ours, theirs in zip(grads, torch.autograd.grad(plain, (x, weight), pull), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


@some
@sizes
def test_gated_activation(rows: int, width: int, seed: int) -> None:
    both, pull = random(rows, 2 * width, seed=seed, scale=20.0).requires_grad_(), random(rows, width, seed=seed + 1)
    ours, plain = fused.swiglu(both), F.silu(both[:, :width]) * both[:, width:]
    assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-5)
    (mine,), (theirs,) = torch.autograd.grad(ours, both, pull), torch.autograd.grad(plain, both, pull)
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-4)


@some
@sizes
def test_cross_entropy(rows: int, width: int, seed: int) -> None:
    logits = random(rows, width, seed=seed, scale=10.0).requires_grad_()
    target = torch.randint(width, (rows,), generator=torch.Generator().manual_seed(seed))
    plain = F.cross_entropy(logits, target, reduction="sum")
    (theirs,) = torch.autograd.grad(plain, logits)
    ours = logits.detach().clone()
    assert fused.cross_entropy(ours, target) == pytest.approx(plain.item(), rel=1e-5, abs=1e-4)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    x = torch.ones(2, 40)
    x[1, 7] = bad
    out, _ = fused.rms_forward(x, torch.ones(40), 1e-5)
    assert out[0].isfinite().all() and not out[1].isfinite().all()
    assert not fused.swiglu(x)[1].isfinite().all()
    assert not math.isfinite(fused.cross_entropy(x.clone(), torch.tensor([0, 1])))


def test_layers_compute_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, experts = MLP(12, 20), Experts(3, 12, 20)
    for seed, weight in enumerate([*mlp.parameters(), *experts.parameters()]):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
    x, load = random(150, 12, seed=0, scale=1.0).requires_grad_(), torch.tensor([90, 0, 60])
    found = []
    for choice in (library, lambda: None):
        monkeypatch.setattr(fused, "library", choice)
        outs = (mlp(x), experts(x, load))
        inputs = [x, *mlp.parameters(), *experts.parameters()]
        found.append([*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), inputs)])
    for native, plain in zip(*found, strict=True):
        assert torch.allclose(native, plain, rtol=1e-4, atol=1e-2)


def test_only_plain_single_precision_tensors_are_taken() -> None:
    assert fused.applies(torch.ones(1))
    assert not fused.applies(torch.ones(1, dtype=torch.float64))
    assert not fused.applies(torch.ones(1, device="meta"))

"""Each native function beside its torch form, over random shapes; NaN and infinity are not hidden."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sprat.kernels import fused, native_library
from sprat.model.moe import MLP, Experts
from sprat.model.norm import rms_norm

pytestmark = pytest.mark.skipif(native_library() is None, reason="no C++ compiler: torch does the work")
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
    for choice in (native_library, lambda: None):
        monkeypatch.setattr(fused, "native_library", choice)
        outs = (mlp(x), experts(x, load))
        inputs = [x, *mlp.parameters(), *experts.parameters()]
        found.append([*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), inputs)])
    for native, plain in zip(*found, strict=True):
        assert torch.allclose(native, plain, rtol=1e-4, atol=1e-2)


def test_only_plain_single_precision_tensors_are_taken() -> None:
    assert fused.is_supported(torch.ones(1))
    assert not fused.is_supported(torch.ones(1, dtype=torch.float64))
    assert not fused.is_supported(torch.ones(1, device="meta"))


def test_gradients_may_come_in_any_layout() -> None:
    """What follows may hand back a transposed or an expanded gradient."""
    both, x, gain = (random(*shape, seed=n).requires_grad_() for n, shape in enumerate([(6, 10), (6, 5), (5,)]))
    plain = F.silu(both[:, :5]) * both[:, 5:], x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gain
    ours = fused.swiglu(both), rms_norm(x, gain, 1e-5)
    for pull in (random(5, 6, seed=9).T, random(5, seed=9).expand(6, 5)):
        for mine, theirs in zip(ours, plain, strict=True):
            found = torch.autograd.grad(mine, (both, x, gain), pull, allow_unused=True, retain_graph=True)
            wanted = torch.autograd.grad(theirs, (both, x, gain), pull, allow_unused=True, retain_graph=True)
            for one, other in zip(found, wanted, strict=True):
                assert (one is None) == (other is None)
                assert one is None or other is None or torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_autocast_is_left_to_torch() -> None:
    mlp, x = MLP(12, 20), random(150, 12, seed=0)
    for seed, weight in enumerate(mlp.parameters()):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = mlp(x)
        wanted = F.linear(
            F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight), mlp.down_proj.weight
        )
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)

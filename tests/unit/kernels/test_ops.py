"""Each operation is its plain formula, natively and in torch, over random shapes; NaN and infinity are not hidden."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sprat.kernels import native_library, ops
from sprat.model.moe import MLP, Experts

needs_native = pytest.mark.skipif(native_library() is None, reason="no C++ compiler: torch does the work")
sizes = given(rows=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 99))
some = settings(max_examples=40, deadline=None)


def random(*shape: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def halves(width: int) -> tuple[Tensor, Tensor]:
    """A gate and an up-projection that pick the first and the second half of a row, exactly."""
    gate_FD, up_FD = torch.eye(2 * width).split(width)
    return gate_FD, up_FD


@some
@sizes
def test_norm(rows: int, width: int, seed: int) -> None:
    x, weight, pull = (random(*s, seed=seed + n) for n, s in enumerate([(rows, width), (width,), (rows, width)]))
    x.requires_grad_(), weight.requires_grad_()
    ours, plain = ops.rms_norm(x, weight, 1e-5), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
    assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(out, (x, weight), pull) for out in (ours, plain))
    for mine, theirs in zip(*grads, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-3)


def test_norm_gradient_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=generator).requires_grad_()
    weight = torch.randn(5, generator=generator).requires_grad_()
    pull = torch.randn(6, 5, generator=generator)
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
    ours = ops.rms_norm(x, weight, 1e-5)
    assert (plain - ours).abs().max() < 1e-6
    for a, b in zip(
        torch.autograd.grad(plain, (x, weight), pull), torch.autograd.grad(ours, (x, weight), pull), strict=True
    ):
        assert (a - b).abs().max() < 1e-5


def test_norm_in_half_precision_computes_in_single() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 100
    half = ops.rms_norm(x.bfloat16(), torch.ones(64, dtype=torch.bfloat16), 1e-6)
    assert half.dtype == torch.bfloat16
    assert (half.float() - ops.rms_norm(x, torch.ones(64), 1e-6)).abs().max() < 0.03


@some
@sizes
def test_gated_activation(rows: int, width: int, seed: int) -> None:
    both, pull = random(rows, 2 * width, seed=seed, scale=20.0).requires_grad_(), random(rows, width, seed=seed + 1)
    ours, plain = ops.swiglu(both, *halves(width)), F.silu(both[:, :width]) * both[:, width:]
    assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-5)
    (mine,), (theirs,) = torch.autograd.grad(ours, both, pull), torch.autograd.grad(plain, both, pull)
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-4)


@some
@sizes
def test_cross_entropy(rows: int, width: int, seed: int) -> None:
    logits, head = random(rows, width, seed=seed, scale=10.0).requires_grad_(), torch.eye(width).requires_grad_()
    target = torch.randint(width, (rows,), generator=torch.Generator().manual_seed(seed))
    ours = ops.linear_cross_entropy(logits, head, target, num_items=1)
    plain = F.cross_entropy(logits, target, reduction="sum")
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5, abs=1e-4)
    (mine,), (theirs,) = torch.autograd.grad(ours, logits), torch.autograd.grad(plain, logits)
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    x, head = torch.ones(40, 40), torch.eye(40).requires_grad_()
    x[1, 7] = bad
    out = ops.rms_norm(x, torch.ones(40), 1e-5)
    assert out[0].isfinite().all() and not out[1].isfinite().all()
    assert not ops.swiglu(x, *halves(20))[1].isfinite().all()
    target = torch.arange(40).remainder(2)
    assert not ops.linear_cross_entropy(x.requires_grad_(), head, target).isfinite()


@needs_native
def test_layers_compute_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, experts = MLP(12, 20), Experts(3, 12, 20)
    for seed, weight in enumerate([*mlp.parameters(), *experts.parameters()]):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
    x, load = random(150, 12, seed=0, scale=1.0).requires_grad_(), torch.tensor([90, 0, 60])
    found = []
    for choice in (native_library, lambda: None):
        monkeypatch.setattr(ops, "native_library", choice)
        outs = (mlp(x), experts(x, load))
        inputs = [x, *mlp.parameters(), *experts.parameters()]
        found.append([*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), inputs)])
    for native, plain in zip(*found, strict=True):
        assert torch.allclose(native, plain, rtol=1e-4, atol=1e-2)


@needs_native
def test_only_plain_single_precision_tensors_are_taken() -> None:
    assert ops._is_native(torch.ones(1))
    assert not ops._is_native(torch.ones(1, dtype=torch.float64))
    assert not ops._is_native(torch.ones(1, device="meta"))


def test_gradients_may_come_in_any_layout() -> None:
    """What follows may hand back a transposed or an expanded gradient."""
    both, x, gain = (random(*shape, seed=n).requires_grad_() for n, shape in enumerate([(40, 10), (40, 5), (5,)]))
    plain = F.silu(both[:, :5]) * both[:, 5:], x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gain
    ours = ops.swiglu(both, *halves(5)), ops.rms_norm(x, gain, 1e-5)
    for pull in (random(5, 40, seed=9).T, random(5, seed=9).expand(40, 5)):
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


def _problem(rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x_ND = torch.randn(rows, width, generator=generator, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(vocabulary, width, generator=generator, dtype=dtype, requires_grad=True)
    targets_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets_N[::3] = -100
    return x_ND, weight_VD, targets_N


def test_cross_entropy_has_the_true_gradient() -> None:
    x_ND, weight_VD, targets_N = _problem(7, 11, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: ops.linear_cross_entropy(x, w, targets_N), (x_ND, weight_VD))


@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 5), (200, 4000), (1000, 300)])
def test_cross_entropy_equals_torch_over_many_chunks(rows: int, vocabulary: int) -> None:
    x_ND, weight_VD, targets_N = _problem(rows, vocabulary, 16, torch.float32)
    ours = ops.linear_cross_entropy(x_ND, weight_VD, targets_N)
    (ours * 3).backward()
    grads = [x_ND.grad, weight_VD.grad]
    x_ND.grad = weight_VD.grad = None
    theirs = F.cross_entropy(F.linear(x_ND, weight_VD), targets_N, ignore_index=-100)
    (theirs * 3).backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, [x_ND.grad, weight_VD.grad], rtol=1e-4, atol=1e-6)


def test_cross_entropy_survives_logits_that_would_overflow() -> None:
    x_ND = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight_VD = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    loss = ops.linear_cross_entropy(x_ND, weight_VD, torch.tensor([1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(1000.0)
    assert x_ND.grad is not None and torch.isfinite(x_ND.grad).all()


def test_rows_without_a_target_cost_and_pull_nothing() -> None:
    x_ND, weight_VD, _ = _problem(6, 9, 4, torch.float32)
    loss = ops.linear_cross_entropy(x_ND, weight_VD, torch.full((6,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert x_ND.grad is not None and not x_ND.grad.any()
    assert weight_VD.grad is not None and not weight_VD.grad.any()


def test_cross_entropy_needs_no_gradient_to_be_read() -> None:
    x_ND, weight_VD, targets_N = _problem(50, 40, 8, torch.float32)
    with torch.no_grad():
        alone = ops.linear_cross_entropy(x_ND, weight_VD, targets_N)
    assert alone.item() == pytest.approx(ops.linear_cross_entropy(x_ND, weight_VD, targets_N).item(), rel=1e-6)


def test_a_target_outside_the_vocabulary_is_an_error_and_nothing_is_written() -> None:
    x_ND, weight_VD, targets_N = _problem(50, 40, 8, torch.float32)
    for wrong in (40, -1):
        targets_N[3] = wrong
        with pytest.raises(IndexError, match="vocabulary of 40"):
            ops.linear_cross_entropy(x_ND, weight_VD, targets_N)


def test_cross_entropy_follows_autocast() -> None:
    x_ND, weight_VD, targets_N = _problem(300, 600, 32, torch.float32)
    exact = F.cross_entropy(F.linear(x_ND, weight_VD), targets_N, ignore_index=-100)
    wanted = torch.autograd.grad(exact, (x_ND, weight_VD))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.linear_cross_entropy(x_ND, weight_VD, targets_N)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    for mine, theirs in zip(torch.autograd.grad(loss, (x_ND, weight_VD)), wanted, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


@needs_native
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    heads=st.integers(1, 3),
    half=st.integers(1, 9),
    nope=st.integers(1, 40),
    value=st.integers(1, 40),
)
def test_any_shape_of_documents_equals_softmax_written_out(
    lengths: list[int], heads: int, half: int, nope: int, value: int
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens, rope = sum(lengths), 2 * half
    q = torch.randn(tokens, heads, nope + rope, generator=generator).requires_grad_()
    kv = torch.randn(tokens, heads, nope + value, generator=generator).requires_grad_()
    k_rope = torch.randn(tokens, rope, generator=generator).requires_grad_()
    freqs_cis = torch.polar(torch.ones(tokens, half), torch.rand(tokens, half, generator=generator))
    segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    metadata = ops.varlen_metadata(segments[None], 1, tokens, freqs_cis)
    assert metadata is not None and metadata.lengths.tolist() == lengths
    fast = ops.varlen_attention(q, kv, k_rope, metadata, 0.3)

    def rotated(x: Tensor) -> Tensor:
        real, imaginary = x[..., 0::2], x[..., 1::2]
        cosine, sine = freqs_cis.real[:, None], freqs_cis.imag[:, None]
        return torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), -1).flatten(-2)

    shared = rotated(k_rope[:, None]).expand(tokens, heads, rope)
    keys, queries = torch.cat((kv[..., :nope], shared), -1), torch.cat((q[..., :nope], rotated(q[..., nope:])), -1)
    scores = torch.einsum("ihd,jhd->hij", queries, keys) * 0.3
    hidden = (segments[:, None] != segments) | torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    plain = torch.einsum("hij,jhv->ihv", scores.masked_fill(hidden, float("-inf")).softmax(-1), kv[..., nope:])
    pull = torch.randn(plain.shape, generator=generator)
    assert (fast - plain).abs().max() < 1e-5
    for ours, theirs in zip(
        torch.autograd.grad(fast, (q, kv, k_rope), pull), torch.autograd.grad(plain, (q, kv, k_rope), pull), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-4


def test_long_documents_are_left_to_stock_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    freqs_cis = torch.ones(300, 2, dtype=torch.complex64)
    monkeypatch.setattr(ops, "MAX_SEQLEN", 280)
    assert ops.varlen_metadata((torch.arange(300) >= 281).long().expand(4, 300), 4, 300, freqs_cis) is None
    monkeypatch.setattr(ops, "native_library", lambda: None)
    assert ops.varlen_metadata(None, 4, 8, freqs_cis[:8]) is None

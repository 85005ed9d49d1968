"""The fused head and loss gives the numbers of the plain formula, and so do its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sprat.model.ops import linear_cross_entropy


def _problem(rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x_ND = torch.randn(rows, width, generator=generator, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(vocabulary, width, generator=generator, dtype=dtype, requires_grad=True)
    targets_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets_N[::3] = -100
    return x_ND, weight_VD, targets_N


def test_cross_entropy_has_the_true_gradient() -> None:
    x_ND, weight_VD, targets_N = _problem(7, 11, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets_N), (x_ND, weight_VD))


@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 5), (200, 4000), (1000, 300)])
def test_cross_entropy_equals_torch_over_many_chunks(rows: int, vocabulary: int) -> None:
    x_ND, weight_VD, targets_N = _problem(rows, vocabulary, 16, torch.float32)
    ours = linear_cross_entropy(x_ND, weight_VD, targets_N)
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
    loss = linear_cross_entropy(x_ND, weight_VD, torch.tensor([1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(1000.0)
    assert x_ND.grad is not None and torch.isfinite(x_ND.grad).all()


def test_rows_without_a_target_cost_and_pull_nothing() -> None:
    x_ND, weight_VD, _ = _problem(6, 9, 4, torch.float32)
    loss = linear_cross_entropy(x_ND, weight_VD, torch.full((6,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert x_ND.grad is not None and not x_ND.grad.any()
    assert weight_VD.grad is not None and not weight_VD.grad.any()


def test_cross_entropy_needs_no_gradient_to_be_read() -> None:
    x_ND, weight_VD, targets_N = _problem(50, 40, 8, torch.float32)
    with torch.no_grad():
        alone = linear_cross_entropy(x_ND, weight_VD, targets_N)
    assert alone.item() == pytest.approx(linear_cross_entropy(x_ND, weight_VD, targets_N).item(), rel=1e-6)


def test_a_target_outside_the_vocabulary_is_an_error_and_nothing_is_written() -> None:
    x_ND, weight_VD, targets_N = _problem(50, 40, 8, torch.float32)
    for wrong in (40, -1):
        targets_N[3] = wrong
        with pytest.raises(IndexError, match="vocabulary of 40"):
            linear_cross_entropy(x_ND, weight_VD, targets_N)


def test_cross_entropy_follows_autocast() -> None:
    x_ND, weight_VD, targets_N = _problem(300, 600, 32, torch.float32)
    exact = F.cross_entropy(F.linear(x_ND, weight_VD), targets_N, ignore_index=-100)
    wanted = torch.autograd.grad(exact, (x_ND, weight_VD))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x_ND, weight_VD, targets_N)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    for mine, theirs in zip(torch.autograd.grad(loss, (x_ND, weight_VD)), wanted, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.02 * theirs.norm()

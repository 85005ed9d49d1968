"""Products in bfloat16 are those of the rounded factors, and their gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sprat.kernels import mixed_precision, ops


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor) -> Tensor:
    return x.detach().bfloat16().double()


def near(found: Tensor | None, expected: Tensor) -> None:
    """To the last of bfloat16's eight bits, by the largest number."""
    assert found is not None and found.dtype == torch.float32
    assert float((found.double() - expected).abs().max()) < 2**-7 * float(expected.abs().max())


def test_a_product_and_its_gradients() -> None:
    x, weight, bias, grad = (
        draw(2, 5, 24).requires_grad_(),
        draw(12, 24, seed=1).requires_grad_(),
        draw(12),
        draw(2, 5, 12),
    )
    y = mixed_precision.linear(x, weight.to(torch.bfloat16), bias)
    y.backward(grad)  # type: ignore[no-untyped-call]
    near(y.detach(), rounded(x) @ rounded(weight).T + bias.double())
    near(x.grad, rounded(grad) @ rounded(weight))
    near(weight.grad, rounded(grad).flatten(0, 1).T @ rounded(x).flatten(0, 1))
    assert torch.equal(mixed_precision.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_adapted_matrices_side_by_side() -> None:
    """By autograd over the formula in float64."""
    x, weights, scaling = draw(3, 7, 16), [draw(8, 16, seed=1), draw(24, 16, seed=2)], 0.5
    downs, ups = [draw(4, 16, seed=3), draw(2, 16, seed=4)], [draw(8, 4, seed=5), draw(24, 2, seed=6)]
    inputs = [x, *downs, *ups]
    wide = [rounded(each).requires_grad_() for each in inputs]
    pairs = zip(weights, wide[1:3], wide[3:], strict=True)
    expected = torch.cat([wide[0] @ (rounded(w) + scaling * b @ a).T for w, a, b in pairs], -1)
    expected.square().sum().backward()  # type: ignore[no-untyped-call]
    for each in inputs:
        each.requires_grad_()
    y = mixed_precision.adapted_linear(x, weights, downs, ups, scaling, torch.bfloat16)
    y.square().sum().backward()  # type: ignore[no-untyped-call]
    assert float((y - expected).detach().norm() / expected.detach().norm()) < 0.01
    for own, exact in zip(inputs, wide, strict=True):
        assert own.grad is not None and exact.grad is not None and own.grad.dtype == torch.float32
        assert float((own.grad - exact.grad).norm() / exact.grad.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_a_large_vocabulary(dtype: torch.dtype) -> None:
    """By torch's own in float64; 300 rows are more than a chunk."""
    x, head = draw(300, 8), draw(8200, 8, seed=1) / 4
    targets = torch.arange(300) * 27
    exact = [rounded(each) if dtype == torch.bfloat16 else each.double() for each in (x, head)]
    for each in (*exact, x, head):
        each.requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets)
    loss = ops.linear_cross_entropy(x, head.to(dtype), targets)
    for total in (expected, loss):
        total.backward()  # type: ignore[no-untyped-call]
    assert float(loss) == pytest.approx(float(expected), rel=1e-5 if dtype == torch.float32 else 2e-3)
    for own, wide in zip((x, head), exact, strict=True):
        assert own.grad is not None and wide.grad is not None
        bound = 1e-5 if dtype == torch.float32 else 0.02
        assert float((own.grad - wide.grad).norm()) < bound * float(wide.grad.norm())

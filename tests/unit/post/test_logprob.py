"""The fused token losses equal plain autograd, and never hold all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sprat.post import logprob
from sprat.post.logprob import forward_kl, policy_loss, token_logprob

N, D, E, V = 53, 8, 12, 37


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 rows, so that the chunk loop and its ragged end are exercised."""
    monkeypatch.setattr(logprob, "_CHUNK_ELEMENTS", 16 * V)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets() -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(9))


def plain(x: Tensor, head: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log p(target), entropy) by torch's own log_softmax."""
    log_p = (x @ head.T / temperature).log_softmax(1)
    return log_p.gather(1, targets()[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprob_and_entropy_are_those_of_log_softmax(temperature: float) -> None:
    x, head = rand(N, D), rand(V, D, seed=1)
    found = token_logprob(x, head, targets(), temperature)
    for got, want in zip(found, plain(x, head, temperature), strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_loss_has_the_gradients_of_autograd(temperature: float) -> None:
    weight, old = rand(N, seed=2), rand(N, seed=3) - 3
    x, head = rand(N, D).requires_grad_(), rand(V, D, seed=1).requires_grad_()

    def surrogate(value: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        ratio = (value - old[rows]).exp() * weight[rows]
        return ratio, ratio

    loss, value, entropy = policy_loss(x, head, targets(), surrogate, temperature)
    (3 * loss).backward()
    x2, head2 = rand(N, D).requires_grad_(), rand(V, D, seed=1).requires_grad_()
    value2, entropy2 = plain(x2, head2, temperature)
    expected = ((value2 - old).exp() * weight).sum()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value, value2.detach(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(entropy, entropy2.detach(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.grad, head2.grad, rtol=1e-4, atol=1e-5)
    assert not value.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize(("kl_weight", "ce_weight", "temperature"), [(1.0, 0.0, 1.0), (0.4, 0.6, 2.0), (0.0, 1.0, 1.0)])
def test_distillation_loss_has_the_gradients_of_autograd(
    kl_weight: float, ce_weight: float, temperature: float
) -> None:
    teacher = (rand(N, E, seed=5), rand(V, E, seed=6))
    x, head = rand(N, D).requires_grad_(), rand(V, D, seed=1).requires_grad_()
    loss, kl, ce = forward_kl(
        x, head, *teacher, targets(), kl_weight=kl_weight, ce_weight=ce_weight, temperature=temperature
    )
    loss.backward()
    x2, head2 = rand(N, D).requires_grad_(), rand(V, D, seed=1).requires_grad_()
    logits, goal = x2 @ head2.T, teacher[0] @ teacher[1].T
    kl2 = torch.nn.functional.kl_div(
        (logits / temperature).log_softmax(1),
        (goal / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    ce2 = torch.nn.functional.cross_entropy(logits, targets())
    (kl_weight * temperature**2 * kl2 + ce_weight * ce2).backward()
    torch.testing.assert_close(ce, ce2.detach(), rtol=1e-5, atol=1e-5)
    if kl_weight:
        torch.testing.assert_close(kl, kl2.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.grad, head2.grad, rtol=1e-4, atol=1e-6)


def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient() -> None:
    x, head = rand(N, D).requires_grad_(), rand(V, D, seed=1).requires_grad_()
    loss, kl, _ = forward_kl(x, head, x.detach(), head.detach(), targets(), temperature=1.5)
    loss.backward()
    assert float(kl) == pytest.approx(0, abs=1e-6)
    assert x.grad is not None and float(x.grad.abs().max()) < 1e-7


def test_no_rows_cost_nothing() -> None:
    empty = torch.zeros(0, D).requires_grad_()
    head = rand(V, D).requires_grad_()
    loss, kl, ce = forward_kl(empty, head, torch.zeros(0, E), rand(V, E), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == float(kl) == float(ce) == 0
    assert head.grad is not None and not head.grad.any()

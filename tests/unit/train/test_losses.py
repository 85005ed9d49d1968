"""The losses count what they say they count; the fused ones equal plain autograd, and never hold all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sprat.config import TrainConfig
from sprat.data.loader import Batch, MixedBatchSource
from sprat.model import Transformer
from sprat.train import losses
from sprat.train.losses import forward_kl, next_token_loss, policy_loss, token_logprob

N, D, E, V = 53, 8, 12, 37


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 rows, so that the chunk loop and its ragged end are exercised."""
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 16 * V)


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


def test_loss_is_cross_entropy_of_the_models_own_logits(
    model: Transformer, source: MixedBatchSource, recipe: TrainConfig
) -> None:
    batch = source.batch(0)
    loss = next_token_loss(model, batch, recipe.replace(mtp_weight=0.0, balance_weight=0.0))
    logits = model(batch.tokens_BT, segments_BT=batch.segments_BT)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten())
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.metrics == {"loss": pytest.approx(expected.item(), rel=1e-5)}


def test_loads_count_every_choice_of_a_token_once(
    model: Transformer, source: MixedBatchSource, recipe: TrainConfig
) -> None:
    """Padding has no vote; in MTP a pair is one token's, and a pair across a border is nobody's."""
    batch, chosen = source.batch(0), model.config.num_experts_per_tok
    loss = next_token_loss(model, batch, recipe)
    assert len(loss.expert_loads) == len(model.moe_layers())
    rows = batch.segments_BT.tolist()
    tokens = sum(segment > 0 for row in rows for segment in row)
    pairs = sum(a == b > 0 for row in rows for a, b in zip(row, row[1:], strict=False))
    assert pairs < tokens < batch.tokens_BT.numel()
    assert [int(load.sum()) for load in loss.expert_loads] == [tokens * chosen] * (len(loss.expert_loads) - 1) + [
        pairs * chosen
    ]


def test_mtp_learns_the_token_after_the_next(model: Transformer, recipe: TrainConfig) -> None:
    """On rows that only MTP can see through, its loss falls and its weight is felt in the total."""
    tokens = torch.arange(33).remainder(7).expand(2, 33)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 32, dtype=torch.long))
    with_mtp = next_token_loss(model, batch, recipe.replace(mtp_weight=0.5, balance_weight=0.0))
    without = next_token_loss(model, batch, recipe.replace(mtp_weight=0.0, balance_weight=0.0))
    difference = with_mtp.total.item() - without.total.item()
    assert difference == pytest.approx(0.5 * with_mtp.metrics["mtp_loss"], rel=1e-4)
    hidden = model.mtp_hidden(model.hidden(batch.tokens_BT), batch.tokens_BT)
    logits = model.head(hidden.x_BTD)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten())
    assert with_mtp.metrics["mtp_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_mtp_does_not_look_across_documents(model: Transformer, recipe: TrainConfig) -> None:
    segments = torch.tensor([[1] * 4 + [2] * 4])
    tokens = torch.arange(8).unsqueeze(0)
    targets = torch.tensor([[1, 2, 3, -100, 5, 6, 7, -100]])
    mine = next_token_loss(model, Batch(tokens, targets, segments), recipe).metrics["mtp_loss"]
    assert torch.isfinite(torch.tensor(mine))
    hidden = model.hidden(tokens, segments_BT=segments)
    out = model.mtp_hidden(hidden, tokens, segments_BT=segments)
    wanted = torch.tensor([2, 3, -100, -100, 6, 7, -100])
    expected = F.cross_entropy(model.head(out.x_BTD)[0], wanted)
    assert mine == pytest.approx(expected.item(), rel=1e-5)


def test_balance_term_is_one_for_an_even_router(
    model: Transformer, source: MixedBatchSource, recipe: TrainConfig
) -> None:
    base = recipe.replace(mtp_weight=0.0, balance_weight=0.0)
    plain = next_token_loss(model, source.batch(0), base).total.item()
    weighted = next_token_loss(model, source.batch(0), base.replace(balance_weight=1.0)).total.item()
    assert 0.95 < weighted - plain < 2.5

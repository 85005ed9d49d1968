"""A student is pulled by what is known of its teacher, and what is not known never pulls it the wrong way."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sprat.config.teach import LogitsConfig
from sprat.post import distill_losses as losses
from sprat.train.losses import forward_kl as full_forward_kl


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_each_divergence_is_its_formula() -> None:
    teacher, student = logs(0.5, 0.5), logs(0.25, 0.75)
    assert losses.forward_kl(teacher, student).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert losses.reverse_kl(teacher, student).item() == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))
    mixture = 0.25 * 0.5 + 0.75 * 0.25  # beta 0.25: a quarter of the teacher
    expected = 0.25 * (0.5 * math.log(0.5 / mixture) + 0.5 * math.log(0.5 / (1 - mixture)))
    expected += 0.75 * (0.25 * math.log(0.25 / mixture) + 0.75 * math.log(0.75 / (1 - mixture)))
    assert losses.generalized_jsd(teacher, student, 0.25).item() == pytest.approx(expected)


def test_jsd_leans_to_one_kl_or_the_other() -> None:
    teacher, student = logs(0.6, 0.3, 0.1), logs(0.2, 0.3, 0.5)
    small = 1e-6
    forward, reverse = losses.forward_kl(teacher, student), losses.reverse_kl(teacher, student)
    assert losses.generalized_jsd(teacher, student, small) / small == pytest.approx(forward.item(), rel=1e-4)
    assert losses.generalized_jsd(teacher, student, 1 - small) / small == pytest.approx(reverse.item(), rel=1e-4)
    assert losses.generalized_jsd(logs(1 - 1e-300, 1e-300), logs(1e-300, 1 - 1e-300), 0.5) <= math.log(2) + 1e-12


@pytest.fixture
def both() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a teacher and a student, 7 rows of 40 words, far apart."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(7, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    return teacher, student


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_what_is_in_one_bucket_hides_a_difference_and_makes_none(
    name: str, both: tuple[torch.Tensor, torch.Tensor]
) -> None:
    teacher, student = both
    divergence = losses.select_divergence(LogitsConfig.model_validate({"divergence": name, "beta": 0.3}))
    whole = divergence(teacher.log_softmax(1), student.log_softmax(1))
    before = torch.zeros(7, dtype=torch.float64)
    for kept in (1, 4, 16, 39, 40):
        ids = teacher.topk(kept).indices
        bound = divergence(losses.bucket_log_probs(teacher, ids), losses.bucket_log_probs(student, ids))
        assert (bound >= before - 1e-12).all() and (bound <= whole + 1e-12).all()
        assert divergence(*[losses.bucket_log_probs(teacher, ids)] * 2).abs().max() < 1e-12
        before = bound
    torch.testing.assert_close(before, whole, rtol=1e-12, atol=1e-12)


def test_buckets_are_a_distribution_however_sure_the_teacher_is() -> None:
    logits = torch.tensor([[90.0, 1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    buckets = losses.bucket_log_probs(logits, torch.tensor([[0]]))
    expected = math.log(math.exp(1) + 1 + math.exp(-1)) - 90
    assert buckets[0, 1].item() == pytest.approx(expected, rel=1e-12)  # 1 - p would be 0, its log infinite
    losses.forward_kl(logs(0.5, 0.5), buckets).sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("kept", [5, 700])
def test_chunks_of_the_head_change_neither_loss_nor_gradient(name: str, kept: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x, head, teacher = (torch.randn(size, generator=generator) for size in ((900, 8), (700, 8), (900, 700)))
    targets, ids = torch.randint(700, (900,), generator=generator), teacher.topk(kept).indices
    config = LogitsConfig.model_validate({"divergence": name, "weight": 0.7, "temperature": 2.0})
    buckets = losses.bucket_log_probs(teacher / 2, ids)
    leaves = [each.clone().requires_grad_() for each in (x, head)]
    loss, divergence, ce = losses.head_divergence(*leaves, targets, ids, buckets, config)
    plain = [each.clone().requires_grad_() for each in (x, head)]
    logits = plain[0] @ plain[1].T
    expected_ce = F.cross_entropy(logits, targets, reduction="sum")
    formula = losses.select_divergence(config)
    expected = formula(buckets, losses.bucket_log_probs(logits / 2, ids)).sum()
    torch.testing.assert_close((divergence, ce), (expected.detach(), expected_ce.detach()), rtol=1e-4, atol=1e-3)
    (0.1 * loss).backward()
    (0.1 * (0.7 * 4 * expected + 0.3 * expected_ce)).backward()
    for ours, theirs in zip(leaves, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_with_all_words_it_is_the_loss_of_the_road() -> None:
    generator = torch.Generator().manual_seed(2)
    sizes = ((30, 8), (50, 8), (30, 12), (50, 12))
    x, head, teacher_x, teacher_head = (torch.randn(size, generator=generator) for size in sizes)
    targets = torch.randint(50, (30,), generator=generator)
    expected, _, _ = full_forward_kl(
        x, head, teacher_x, teacher_head, targets, kl_weight=0.6, ce_weight=0.4, temperature=1.5
    )
    logits = teacher_x @ teacher_head.T / 1.5
    ids = logits.topk(50).indices
    config = LogitsConfig.model_validate({"weight": 0.6, "temperature": 1.5})
    loss, _, _ = losses.head_divergence(x, head, targets, ids, losses.bucket_log_probs(logits, ids), config)
    assert loss.item() / 30 == pytest.approx(expected.item(), rel=1e-5)

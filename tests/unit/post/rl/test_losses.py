"""The losses of RL: each as its paper writes it, over padded rows and by autograd; TRL's own code: bench."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sprat.post.rl.losses import LossName, PolicyLoss, WholeAnswers, answer_weights, overlong_penalty
from sprat.train.losses import policy_loss, token_logprob

SIZES = [3, 1, 5, 2]
LOW, HIGH, MAX_TOKENS = 0.1, 0.3, 8
WORDS = 11


def drawn(seed: int) -> dict[str, Tensor]:
    """Padded rows [B, T]: mask, ids, logits [B, T, V], old and reference log-probabilities; advantages [B]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(SIZES), max(SIZES))
    logits = torch.randn(*shape, WORDS, generator=generator, dtype=torch.float64)
    ids = torch.randint(WORDS, shape, generator=generator)
    logprob = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    return {
        "mask": torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None],
        "ids": ids,
        "logits": logits,
        "old": logprob + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64),
        "reference": logprob + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64),
        "advantage": torch.tensor([1.0, -0.5, 0.25, -2.0], dtype=torch.float64),
    }


def by_the_paper(loss: LossName, given: dict[str, Tensor], logits: Tensor) -> Tensor:
    """The scalar to be minimized, as the paper of ``loss`` sums it."""
    logprob = logits.log_softmax(-1).gather(2, given["ids"][..., None])[..., 0]
    ratio = (logprob - given["old"]).exp()
    answers = []
    for row, size in enumerate(SIZES):
        advantage, own = given["advantage"][row], ratio[row, :size]
        if loss == "gspo":  # eq. 5 and 6: one ratio to the power 1 / |y|
            own = ((logprob - given["old"])[row, :size].sum() / size).exp().repeat(size)
        clipped = own.clamp(1 - LOW, 1 + HIGH)
        objective = torch.minimum(own * advantage, clipped * advantage)
        if loss == "cispo":  # eq. 4 and 5, without the lower bound, as the authors leave it
            objective = own.detach().clamp(max=1 + HIGH) * advantage * logprob[row, :size]
        answers.append(-objective)
    tokens = torch.cat(answers)
    if loss in ("grpo", "gspo"):
        return torch.stack([answer.mean() for answer in answers]).mean()
    return tokens.sum() / (len(SIZES) * MAX_TOKENS) if loss == "dr_grpo" else tokens.mean()


def ours(loss: LossName, given: dict[str, Tensor], logits: Tensor, limit: float | None = None) -> Tensor:
    mask, sizes = given["mask"], torch.tensor(SIZES)
    weights = torch.tensor(answer_weights(loss, SIZES, max_tokens=MAX_TOKENS), dtype=torch.float64)
    surrogate = PolicyLoss(
        given["old"][mask],
        given["advantage"].repeat_interleave(sizes),
        weights.repeat_interleave(sizes),
        LOW,
        HIGH,
        loss=loss,
        answer_N=torch.arange(len(SIZES)).repeat_interleave(sizes),
        off_policy_limit=limit,
    )
    x, head, targets = logits[mask], torch.eye(WORDS, dtype=torch.float64), given["ids"][mask]
    if not surrogate.is_of_tokens:
        return policy_loss(x, head, targets, WholeAnswers(surrogate, token_logprob(x, head, targets)[0]))[0]
    return policy_loss(x, head, targets, surrogate)[0]


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_loss_and_its_gradient_are_those_of_its_paper(loss: LossName, seed: int) -> None:
    given = drawn(seed)
    theirs, mine = (given["logits"].clone().requires_grad_() for _ in range(2))
    wanted, found = by_the_paper(loss, given, theirs), ours(loss, given, mine)
    torch.testing.assert_close(found, wanted)
    wanted.backward()  # type: ignore[no-untyped-call]
    found.backward()  # type: ignore[no-untyped-call]
    assert theirs.grad is not None and theirs.grad.abs().max() > 1e-4
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_bad_answers_that_are_far_off_policy_are_not_learned_from() -> None:
    given = drawn(2)
    given["old"][3] += 3.0  # a bad answer that the policy has left
    given["old"][2] += 3.0  # a good one
    logits = given["logits"].requires_grad_()
    ours("dapo", given, logits, limit=1.0).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    moved = logits.grad.abs().amax((1, 2)) > 0
    assert moved.tolist() == [True, True, True, False]


def test_a_token_whose_ratio_overflows_is_clipped_and_not_nan() -> None:
    loss = PolicyLoss(torch.tensor([-200.0, -1.0]), torch.tensor([1.0, 1.0]), 1.0, LOW, HIGH)
    found, slope = loss(torch.tensor([-0.1, -1.0]), slice(0, 2))
    assert slope.tolist() == [0.0, -1.0] and found.tolist() == [pytest.approx(-1 - HIGH), -1.0]


def test_weights_of_a_step_in_several_minibatches() -> None:
    weights = answer_weights("dapo", [2, 2], step_tokens=24, step_answers=12, minibatches=3, max_tokens=10)
    assert weights == [3 / 24] * 2, "tokens of the step, shared by its minibatches"
    assert answer_weights("bnpo", [2, 2], step_tokens=24, minibatches=3) == [1 / 4] * 2
    dr_grpo = answer_weights("dr_grpo", [2, 2], step_tokens=24, step_answers=12, minibatches=3, max_tokens=10)
    assert dr_grpo == [1 / (4 * 10)] * 2, "twelve answers in three minibatches, whoever has an advantage"


def test_only_the_end_of_the_room_is_punished() -> None:
    assert [overlong_penalty(tokens, 64, 0) for tokens in (1, 64)] == [0.0, 0.0], "off"
    found = [overlong_penalty(tokens, 64, 16) for tokens in (1, 48, 52, 64)]
    assert found == [0.0, 0.0, -0.25, -1.0] and not any(math.copysign(1, value) < 0 for value in found[:2])

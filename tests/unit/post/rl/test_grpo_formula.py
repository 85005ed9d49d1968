"""GRPO's numbers against TRL 1.16's formulas, written out here in plain torch, and against sums done by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sprat.config import Config, RLConfig
from sprat.errors import TrainingError
from sprat.model import Transformer
from sprat.post.rl import grpo as rl
from sprat.post.rl import update
from sprat.post.rl.grpo import grpo
from sprat.post.rl.losses import ClippedSurrogate, advantages
from sprat.post.rl.rewards import Response
from sprat.post.rl.rollout import Rollout, rollout_metrics, sample_groups
from sprat.tokens import Tokenizer
from sprat.trust.run import Run
from sprat.trust.run_record import read_metrics

Open = Callable[[str, Config], Run]
RL = RLConfig(steps=1, prompts_per_step=4, group_size=4, max_tokens=8, format_weight=0.0, temperature=0.8, gate=False)
SAID = Response("", "7", True)


@pytest.mark.parametrize("value", [100.1, 0.1, -1e30, 1e-30, 0.0, 7.0])
@pytest.mark.parametrize("size", [2, 3, 16])
def test_equal_rewards_teach_nothing_whatever_their_size(value: float, size: int) -> None:
    for normalise in (True, False):
        assert not advantages(torch.full((1, size), value), normalise).any()


def test_the_last_bit_of_a_reward_is_no_difference() -> None:
    reward = torch.full((1, 8), 100.1)
    reward[0, ::2] = torch.nextafter(reward[0, ::2], torch.tensor(torch.inf))
    assert not advantages(reward, True).any()
    assert advantages(torch.tensor([[100.1, 100.2]]), True).tolist() == [[-1.0, 1.0]]


@pytest.mark.parametrize("unit", [1e-30, 1e-9, 1.0, 1e20])
def test_advantages_do_not_depend_on_the_unit(unit: float) -> None:
    rewards = torch.tensor([[3.0, 1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 1.0]])
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(advantages(rewards * unit, True), (rewards - mean) / std)
    torch.testing.assert_close(advantages(rewards * unit, False), (rewards - mean) * unit)


def test_our_deviation_is_the_populations_and_trls_the_samples() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.25]])
    trl = (rewards - rewards.mean()) / (rewards.std() + 1e-4)  # GRPOTrainer, scale_rewards="group"
    torch.testing.assert_close(advantages(rewards, True) / trl, torch.full((1, 4), (4 / 3) ** 0.5), rtol=1e-3, atol=0)


def test_who_abstains_is_no_part_of_the_group() -> None:
    nan = float("nan")
    rewards = torch.tensor([[1.0, nan, 0.0, nan], [nan, nan, nan, 2.0], [nan] * 4, [0.0, 1.0, nan, 0.5]])
    alone = advantages(torch.tensor([[0.0, 1.0, 0.5]]), True)[0].tolist()
    expected = [[1.0, 0.0, -1.0, 0.0], [0.0] * 4, [0.0] * 4, [alone[0], alone[1], 0.0, alone[2]]]
    torch.testing.assert_close(advantages(rewards, True), torch.tensor(expected))


def trl_loss(logp: Tensor, old: Tensor, advantage: Tensor, ref: Tensor, importance: Tensor, config: RLConfig) -> Tensor:
    """Per token: ``GRPOTrainer._compute_loss`` of TRL 1.16, ``importance_sampling_level="token"``."""
    coef_1 = torch.exp(logp - old)
    coef_2 = torch.clamp(coef_1, 1 - config.clip_low, 1 + config.clip_high)
    loss = -torch.min(coef_1 * advantage, coef_2 * advantage) * importance
    kl = torch.exp(ref - logp) - (ref - logp) - 1
    return loss + config.kl_weight * (kl * coef_1 if config.kl_bias_correction else kl)


@pytest.mark.parametrize("corrected", [False, True])
def test_every_token_is_lost_and_moved_as_in_trl(corrected: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logp, old, ref = (-2 + 0.5 * torch.randn(200, generator=generator) for _ in range(3))
    advantage, importance = torch.randn(200, generator=generator), torch.rand(200, generator=generator) * 2
    config = RL.replace(kl_weight=0.3, kl_bias_correction=corrected, clip_low=0.1, clip_high=0.4)
    logp.requires_grad_()
    wanted = trl_loss(logp, old, advantage, ref, importance, config)
    surrogate = ClippedSurrogate(old, advantage, 0.25, 0.1, 0.4, ref, 0.3, corrected, importance)
    loss, slope = surrogate(logp.detach(), slice(0, 200))
    torch.testing.assert_close(loss, 0.25 * wanted.detach())
    torch.testing.assert_close(slope, 0.25 * torch.autograd.grad(wanted.sum(), logp)[0])


def test_only_the_corrected_kl_has_the_gradient_of_policy_against_start() -> None:
    logits = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    start = torch.randn(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64).log_softmax(0)

    def expected(ratio: bool) -> Tensor:
        """The mean over all tokens, drawn by the policy, of the estimator's gradient."""
        logp = logits.log_softmax(0)
        loss = ClippedSurrogate(logp.detach(), torch.zeros(7), 1.0, 0.2, 0.2, start, 1.0, ratio)
        slope = loss(logp.detach(), slice(0, 7))[1]
        return torch.autograd.grad((logp.exp().detach() * slope * logp).sum(), logits)[0]

    logp = logits.log_softmax(0)
    (to_start,) = torch.autograd.grad((logp.exp() * (logp - start)).sum(), logits, retain_graph=True)
    (from_start,) = torch.autograd.grad((start.exp() * (start - logp)).sum(), logits)
    torch.testing.assert_close(expected(True), to_start)
    torch.testing.assert_close(expected(False), from_start)
    assert (to_start - from_start).abs().max() > 0.05


class Noted:
    """An optimiser that keeps the gradients of each of its steps and moves nothing."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.found, self.limits = model, list[dict[str, Tensor]](), list[float]()

    def clip_grad_norm(self, limit: float) -> float:
        self.limits.append(limit)
        return 1.0

    def step(self, *, lr_factor: float) -> None:
        assert lr_factor == 1.0, "nobody asked the rate to fall"
        weights = self.model.named_parameters()
        self.found.append({name: weight.grad.clone() for name, weight in weights if weight.grad is not None})

    def zero_grad(self) -> None:
        self.model.zero_grad()


def sampled(model: Transformer, shift: float) -> list[Rollout]:
    """Six answers of different lengths, whose log-probabilities were ``shift`` * noise away from the model's."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(6):
        prompt = torch.randint(20, 90, (2 + number % 3,), generator=generator).tolist()
        answer = torch.randint(20, 90, (1 + 2 * number,), generator=generator).tolist()
        old = logprobs(model, prompt, answer, RL.temperature).detach()
        old = old + shift * torch.randn(len(old), generator=generator)
        rows.append(Rollout("t", prompt, answer, old.tolist(), SAID, 0.0, 0.0, 0))
    return rows


def logprobs(model: Transformer, prompt: list[int], answer: list[int], temperature: float) -> Tensor:
    """By a pass over this row alone, and torch's log_softmax."""
    logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)


@pytest.mark.parametrize("cap", [None, 1.1])
def test_the_gradient_of_a_minibatch_is_that_of_the_formula(
    cap: float | None, guesser: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, start = copy.deepcopy(guesser), copy.deepcopy(guesser)
    with torch.no_grad():
        for weight in start.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    config = RL.replace(kl_weight=0.2, max_mismatch=9.0, importance_cap=cap, clip_high=0.3, grad_clip=0.7)
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -1.5])
    rows, noted = sampled(model, 0.4), Noted(model)
    monkeypatch.setattr("sprat.post.rl.batch._MAX_MICRO_BATCH_TOKENS", 24)  # several parts of one minibatch
    found = update.update_policy(model, noted, rows, advantage, config, 1, start)  # type: ignore[arg-type]
    model.zero_grad()
    total, gaps = torch.zeros(()), []
    for row, value in zip(rows, advantage, strict=True):
        logp = logprobs(model, row.prompt_ids, row.token_ids, config.temperature)
        old, weight = torch.tensor(row.logprobs), torch.ones(len(logp))
        gaps.append((logp.detach() - old).abs())
        if cap is not None:
            old, weight = logp.detach(), (logp.detach() - old).exp().clamp(max=cap)
        ref = logprobs(start, row.prompt_ids, row.token_ids, config.temperature).detach()
        total = total + trl_loss(logp, old, value, ref, weight, config).sum()
    (total / sum(len(row.token_ids) for row in rows)).backward()
    assert len(noted.found) == 1 and noted.limits == [config.grad_clip]
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(noted.found[0][name], weight.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert found["mismatch"] == pytest.approx(float(torch.cat(gaps).max()), rel=1e-3)
    assert found["mismatch_mean"] == pytest.approx(float(torch.cat(gaps).mean()), rel=1e-3)


def test_the_rate_falls_over_the_last_share_of_the_steps(guesser: Transformer) -> None:
    """Eight steps, half of them falling, ending one step after the last; without a fall all are whole."""
    for fall, expected in ((0.5, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]), (0.0, [1.0] * 8)):
        config, factors = RL.replace(steps=8, decay_fraction=fall), list[float]()
        optimizer = SimpleNamespace(
            clip_grad_norm=lambda limit: 1.0,
            step=lambda *, lr_factor, factors=factors: factors.append(lr_factor),
            zero_grad=lambda: None,
        )
        for step in range(1, 9):
            update._step(optimizer, config, step)  # type: ignore[arg-type]
        assert factors == pytest.approx(expected)


def test_a_policy_that_was_not_sampled_from_stops_the_run_before_a_weight_moves(
    guesser: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Open
) -> None:
    strict = RL.replace(max_mismatch=3e-5)  # between float32's noise and bfloat16's rounding, whatever the processor
    run = open_stage("exact", strict)
    grpo(copy.deepcopy(guesser), tokenizer, [task], [1.0], strict, run, gate=False)
    assert read_metrics(run.folder)[0]["mismatch_mean"] < 3e-5
    half = copy.deepcopy(guesser).bfloat16()
    before = {name: value.clone() for name, value in half.state_dict().items()}
    with pytest.raises(TrainingError, match=r"nats from the sampler's .*rl\.max_mismatch.*importance_cap"):
        grpo(half, tokenizer, [task], [1.0], strict, open_stage("rl", strict), gate=False)
    assert all(torch.equal(value, half.state_dict()[name]) for name, value in before.items())
    allowed = RL.replace(max_mismatch=1.0, importance_cap=2.0)
    run = open_stage("corrected", allowed)
    grpo(half, tokenizer, [task], [1.0], allowed, run, gate=False)
    (row,) = read_metrics(run.folder)
    assert 3e-5 < row["mismatch_mean"] < row["mismatch"]


def test_by_default_a_tenth_of_a_nat_is_far_too_much(
    guesser: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def otherwise(*args: Any) -> list[Rollout]:
        return [replace(row, logprobs=[each - 0.1 for each in row.logprobs]) for row in sample_groups(*args)]

    monkeypatch.setattr(rl, "sample_groups", otherwise)
    with pytest.raises(TrainingError, match=r"0\.1 nats"):
        grpo(copy.deepcopy(guesser), tokenizer, [task], [1.0], RL, open_stage("rl", RL), gate=False)


@pytest.mark.parametrize(("flipped", "stops"), [(0, False), (2, False), (3, True), (100, True)])
def test_a_router_that_tips_over_in_one_answer_of_fifty_does_not_stop_the_run(flipped: int, stops: bool) -> None:
    sampled, found = torch.full((1000,), -1.0), update.LogprobMismatch()
    trained = sampled.clone()
    trained[: 10 * flipped] += 0.5  # of a hundred answers of ten tokens
    found.add(trained, sampled, [10] * 100)
    if stops:
        with pytest.raises(TrainingError, match="in step 7 .* nats"):
            found.check(1e-3, 7)
    else:
        assert found.check(1e-3, 7) == pytest.approx(
            {"mismatch": 0.5 if flipped else 0, "mismatch_mean": flipped / 200}
        )


def test_a_mismatch_that_is_no_number_stops_the_run() -> None:
    found = update.LogprobMismatch()
    found.add(torch.tensor([0.0, math.nan, 0.0]), torch.zeros(3), [1, 1, 1])
    with pytest.raises(TrainingError):
        found.check(1e9, 1)


def test_partial_credit_is_no_right_answer_and_abstentions_have_no_reward() -> None:
    rows = [
        Rollout("t", [1], [2], [0.0], SAID, reward, score, 0) for reward, score in [(0.5, 0.5), (1.0, 1.0), (None, 0)]
    ]
    found = rollout_metrics(rows)
    assert found["accuracy"] == found["accuracy/t"] == pytest.approx(1 / 3)
    assert found["reward"] == pytest.approx(0.75) and found["abstained"] == pytest.approx(1 / 3)


def test_only_paid_answers_of_groups_with_spread_are_learned_from(
    guesser: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    paid = [1.0, None, 0.0, 0.5, *[2.0, 2.0, None, 2.0], *[None] * 4]
    rows = [Rollout("t", [1], [2, number], [0.0, 0.0], SAID, each, 0.0, 1) for number, each in enumerate(paid)]
    heard: list[tuple[list[Rollout], list[float]]] = []

    def noted(model: Any, optimizer: Any, chosen: list[Rollout], advantage: Tensor, *_: Any) -> dict[str, float]:
        heard.append((chosen, advantage.tolist()))
        return {}

    monkeypatch.setattr(rl, "update_policy", noted)
    found = rl._train_step(guesser, None, rows, RL, 1, None, rl.RLResult())  # type: ignore[arg-type]
    assert [row.token_ids[1] for row in heard[0][0]] == [0, 2, 3]
    assert heard[0][1] == pytest.approx([1.5**0.5, -(1.5**0.5), 0.0])
    assert found["live_groups"] == pytest.approx(1 / 3)


def test_the_default_clip_is_dapos() -> None:
    assert (RLConfig().clip_low, RLConfig().clip_high) == (0.2, 0.28)  # arXiv 2503.14476, section 4.1

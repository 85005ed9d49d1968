"""RL moves the policy to what is paid, exactly as the paper says, and survives a kill."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sprat.config import Config, RLConfig
from sprat.engine import Engine
from sprat.errors import TrainingError
from sprat.eval.score import two_proportion_p_value
from sprat.eval.tasks import evaluate
from sprat.model import Transformer
from sprat.post.rl import grpo as rl
from sprat.post.rl.batch import micro_batches
from sprat.post.rl.gate import evaluate_gate
from sprat.post.rl.grpo import grpo
from sprat.post.rl.losses import ClippedSurrogate, advantages
from sprat.post.rl.rewards import Response
from sprat.post.rl.rollout import Rollout, sample_groups
from sprat.tasks import Problem
from sprat.tokens import Tokenizer
from sprat.train import checkpoint
from sprat.train.losses import policy_loss, token_logprob
from sprat.trust.run import Run
from sprat.trust.run_record import read_metrics

Open = Callable[[str, Config], Run]
RL = RLConfig(steps=12, prompts_per_step=8, group_size=8, max_tokens=10, lr=3e-3, format_weight=0.0, checkpoint_every=2)


def test_advantages_are_those_of_the_paper() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [1.1, 1.1, 0.1, 0.1]])
    three = 3**0.5
    expected = torch.tensor([[three, -1 / three, -1 / three, -1 / three], [0.0] * 4, [1.0, 1.0, -1.0, -1.0]])
    torch.testing.assert_close(advantages(rewards, True), expected)
    torch.testing.assert_close(advantages(rewards, False)[0], torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_a_group_paid_alike_teaches_nothing_even_with_float_noise() -> None:
    assert not advantages(torch.tensor([[0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2]]), True).any()


def test_surrogate_equals_the_paper_on_fixed_numbers() -> None:
    old = torch.tensor([0.5, 0.5, 0.5, 0.5]).log()
    new = (torch.tensor([1.5, 1.5, 0.5, 0.5]) * 0.5).log().requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, slope = ClippedSurrogate(old, advantage, 0.25, 0.2, 0.28)(new, slice(0, 4))
    expected = torch.tensor([-1.28, 1.5, -0.5, 0.8]) / 4  # -min(ratio A, clip(ratio, 0.8, 1.28) A)
    torch.testing.assert_close(loss.detach(), expected)
    ratio = (new - old).exp()
    plain = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).sum() / 4
    (wanted,) = torch.autograd.grad(plain, new)
    torch.testing.assert_close(slope.detach(), wanted)
    assert ClippedSurrogate(old, advantage, 0.25, 0.2, 0.28).clipped(new.detach()).tolist() == [
        True,
        False,
        False,
        True,
    ]


def test_kl_to_the_start_is_k3_with_its_gradient() -> None:
    old, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    new = torch.tensor([-1.2, -2.1], requires_grad=True)
    loss, slope = ClippedSurrogate(old, torch.zeros(2), 1.0, 0.2, 0.28, reference, 0.3)(new, slice(0, 2))
    back = reference - new
    plain = 0.3 * (back.exp() - 1 - back)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(slope.detach(), torch.autograd.grad(plain.sum(), new)[0])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_rewarded_token_becomes_likelier_and_a_punished_one_rarer(advantage: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, head = torch.randn(6, 8, generator=generator), torch.randn(11, 8, generator=generator).requires_grad_()
    targets = torch.tensor([3, 1, 4, 1, 5, 9])
    before, _ = token_logprob(x, head.detach(), targets)
    loss, _, _ = policy_loss(x, head, targets, ClippedSurrogate(before, torch.full((6,), advantage), 1 / 6, 0.2, 0.28))
    loss.backward()
    assert head.grad is not None
    after, _ = token_logprob(x, head.detach() - 0.1 * head.grad, targets)
    assert float((after - before).mean()) * advantage > 0


def test_micro_batches_hold_every_row_once_and_bound_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    response = Response("", "", True)
    rows = [Rollout("t", [0] * (3 + n % 7), [1] * (1 + n % 11), [], response, 0.0, 0.0, 0) for n in range(40)]
    monkeypatch.setattr("sprat.post.rl.batch._MAX_MICRO_BATCH_TOKENS", 64)
    parts = list(micro_batches(rows, range(40)))
    assert sorted(row for part in parts for row in part) == list(range(40))
    assert all(max(rows[row].length for row in part) * len(part) <= 64 for part in parts)


def test_rl_raises_the_reward_of_a_toy_task(
    guesser: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Open
) -> None:
    model = copy.deepcopy(guesser)
    engine = Engine(model, tokenizer, max_batch=200)
    before = evaluate(engine, task, count=200, thinking=None, max_tokens=10, temperature=1.0)
    run = open_stage("rl", RL)
    result = grpo(model, tokenizer, [task], [1.0], RL, run, gate=False)
    after = evaluate(engine, task, count=200, thinking=None, max_tokens=10, temperature=1.0)
    assert after.accuracy > before.accuracy + 0.3 and two_proportion_p_value(before, after) < 1e-6
    rows = read_metrics(run.folder)
    assert [row["step"] for row in rows] == list(range(1, 13)) and result.steps == 12
    names = {"reward", "accuracy", "format", "response_length", "think_share", "entropy", "clip_fraction", "kl"}
    assert all(names <= set(row) for row in rows)
    assert result.flops > 0 and result.tokens > 0


def test_the_trainer_sees_the_probabilities_that_the_engine_sampled_with(
    guesser: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Open
) -> None:
    run = open_stage("rl", RL.replace(steps=2, temperature=0.8))
    grpo(copy.deepcopy(guesser), tokenizer, [task], [1.0], RL.replace(steps=2, temperature=0.8), run, gate=False)
    assert all(row["mismatch"] < 1e-4 for row in read_metrics(run.folder))


def test_the_routers_bias_stays_where_pretraining_left_it(
    guesser: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Open
) -> None:
    model = copy.deepcopy(guesser)
    grpo(model, tokenizer, [task], [1.0], RL.replace(steps=1), open_stage("rl", RL.replace(steps=1)), gate=False)
    moved = {name for name, value in guesser.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    assert any("correction_bias" in name for name in guesser.state_dict())
    assert moved and not [name for name in moved if "bias" in name]


def test_a_run_that_was_killed_ends_with_the_same_bits(
    guesser: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RL.replace(steps=5, kl_weight=0.05, minibatch=24, epochs=2)
    whole = copy.deepcopy(guesser)
    expected = grpo(whole, tokenizer, [task], [1.0], config, open_stage("whole", config), gate=False)

    def dying(engine: Any, tasks: Any, weights: Any, config: Any, step: int, reward: Any) -> list[Rollout]:
        if step == 4:
            raise KeyboardInterrupt
        return sample_groups(engine, tasks, weights, config, step, reward)

    monkeypatch.setattr(rl, "sample_groups", dying)
    with pytest.raises(KeyboardInterrupt):
        grpo(copy.deepcopy(guesser), tokenizer, [task], [1.0], config, open_stage("killed", config), gate=False)
    monkeypatch.undo()
    model, run = copy.deepcopy(guesser), open_stage("killed", config)
    result = grpo(model, tokenizer, [task], [1.0], config, run, gate=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in whole.state_dict().items())
    assert result == expected
    assert read_metrics(run.folder) == read_metrics(run.folder.parent / "whole")


def test_ctrl_c_while_the_last_checkpoint_is_written_ends_the_run_there(
    guesser: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    config, save = RL.replace(steps=1), checkpoint.save

    def interrupted_save(folder: Path, *state: Any) -> Path:
        if folder.name != checkpoint.STABLE:
            signal.raise_signal(signal.SIGINT)
        return save(folder, *state)

    monkeypatch.setattr(checkpoint, "save", interrupted_save)
    run = open_stage("rl", config)
    with pytest.raises(KeyboardInterrupt):
        grpo(copy.deepcopy(guesser), tokenizer, [task], [1.0], config, run, gate=False)
    assert checkpoint.latest(run.checkpoints) is not None


def test_a_users_reward_replaces_the_judge(guesser: Transformer, tokenizer: Tokenizer, task: Any) -> None:
    def brief(problem: Problem, answer: Response) -> float:
        return -float(len(answer.content))

    engine = Engine(guesser, tokenizer, max_batch=64)
    rollouts = sample_groups(engine, [task], [1.0], RL.replace(format_weight=0.5), 1, brief)
    assert len(rollouts) == 64
    for rollout in rollouts:
        assert rollout.reward == 0.5 * rollout.response.well_formed - len(rollout.response.content)
        assert len(rollout.logprobs) == len(rollout.token_ids)
    assert len({tuple(rollout.prompt_ids) for rollout in rollouts[:8]}) == 1


def test_an_unready_policy_is_refused_with_advice(
    model: Transformer, guesser: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Open
) -> None:
    with pytest.raises(TrainingError, match=r"pass@8 is .*; pre-train longer"):
        grpo(model, tokenizer, [task], [1.0], RL, open_stage("raw", RL))
    easy = RL.replace(gate_pass_at_8=0.1)
    with pytest.raises(TrainingError, match="would teach it not to think"):
        grpo(copy.deepcopy(guesser), tokenizer, [task], [1.0], easy, open_stage("guesser", easy))


def test_nothing_to_learn_leaves_the_weights_alone(
    guesser: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Open
) -> None:
    config, model = RL.replace(steps=1), copy.deepcopy(guesser)
    run = open_stage("rl", config)
    grpo(model, tokenizer, [task], [1.0], config, run, gate=False, reward=lambda problem, answer: 1.0)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in guesser.state_dict().items())
    assert read_metrics(run.folder)[0]["live_groups"] == 0.0


def test_what_abstains_or_fails_is_left_out_and_counted(
    guesser: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Open
) -> None:
    def strict(problem: Problem, answer: Response) -> float | None:
        digit = answer.content.strip()
        return {"7": 1.0, "3": None}.get(digit, 0.0) if digit != "5" else 1 / 0

    config, seen = RL.replace(steps=1, prompts_per_step=16), list[str]()
    run = open_stage("rl", config)

    def reward(problem: Problem, answer: Response) -> float | None:
        seen.append(answer.content.strip())
        return strict(problem, answer)

    grpo(copy.deepcopy(guesser), tokenizer, [task], [1.0], config, run, gate=False, reward=reward)
    (row,) = read_metrics(run.folder)
    paid = [float(digit == "7") for digit in seen if digit not in ("3", "5")]
    assert "3" in seen and "5" in seen
    assert row["reward_faults"] == seen.count("5")
    assert row["abstained"] == pytest.approx(1 - len(paid) / len(seen))
    assert row["reward"] == pytest.approx(sum(paid) / len(paid))


def test_a_reward_that_fails_on_every_answer_ends_the_run(
    guesser: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Open
) -> None:
    config = RL.replace(steps=1)
    with pytest.raises(TrainingError, match=r"failed on each of 64 answers.*ZeroDivisionError"):
        grpo(guesser, tokenizer, [task], [1.0], config, open_stage("rl", config), gate=False, reward=lambda p, a: 1 / 0)


def test_answers_of_a_group_and_of_two_steps_are_drawn_apart(
    guesser: Transformer, tokenizer: Tokenizer, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = [(task, task.problem("train", 1))] * 8
    monkeypatch.setattr("sprat.post.rl.rollout.sample_problems", lambda *_: same)
    engine = Engine(guesser, tokenizer, max_batch=64)

    def drawn(step: int, seed: int = 0) -> list[tuple[int, ...]]:
        rollouts = sample_groups(engine, [task], [1.0], RL.replace(seed=seed), step)
        return [tuple(rollout.token_ids) for rollout in rollouts]

    first = drawn(1)
    groups = [first[start : start + 8] for start in range(0, 64, 8)]
    assert all(len(set(group)) > 2 for group in groups)  # ten digits, with or without a think
    assert len({tuple(group) for group in groups}) == 8
    assert first == drawn(1) and first != drawn(2) and first != drawn(1, seed=1)


def test_the_gate_asks_the_verifier_that_will_pay(guesser: Transformer, tokenizer: Tokenizer, task: Any) -> None:
    engine = Engine(guesser, tokenizer, max_batch=256)
    assert evaluate_gate(engine, [task], [1.0], RL, count=64).failure  # the judge: it is not better for thinking
    found = evaluate_gate(engine, [task], [1.0], RL, lambda p, a: float(bool(a.reasoning and a.content)), count=64)
    assert (
        not found.failure and found.thinking_accuracy > 0.9 and found.direct_accuracy == 0.0 and found.pass_at_8 > 0.9
    )
    never = evaluate_gate(engine, [task], [1.0], RL, lambda p, a: None, count=64)
    assert never.pass_at_8 == never.thinking_accuracy == never.direct_accuracy == 0.0
    with pytest.raises(TrainingError, match="paid 5"):
        evaluate_gate(engine, [task], [1.0], RL, lambda p, a: 5.0, count=64)

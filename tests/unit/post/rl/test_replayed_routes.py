"""A mixture of experts is trained with the experts that sampled; how far the two are apart is measured, and bounded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sprat.config import Config
from sprat.config.rl import RLRunConfig
from sprat.config.sizes import size
from sprat.engine import Engine, Sampling
from sprat.errors import TrainingError
from sprat.model import MoE, Transformer
from sprat.post.rl import grpo
from sprat.post.rl.batch import ResponseTokens, RouteCounts, forward_responses
from sprat.post.rl.logprob_gap import LogprobGap
from sprat.post.rl.problem_mix import StationProblems
from sprat.post.rl.rewards import Response
from sprat.post.rl.rollout import InProcess, Payer, Rollout
from sprat.tokens import Tokenizer
from sprat.train.losses import token_logprob
from sprat.trust.run import Run
from sprat.trust.run_record import read_metrics

CONFIG = RLRunConfig.model_validate(
    {"steps": 3, "prompts_per_step": 8, "group_size": 8, "max_tokens": 10, "lr": 3e-3, "gate": False}
)


def sampled(model: Transformer, tokenizer: Tokenizer, count: int = 8) -> list[Rollout]:
    """Answers to two prompts of different lengths, with their experts."""
    how = Sampling(max_tokens=12, logprobs=True, routes=True, n=count // 2, ignore_eos=True)
    rollouts = []
    for output in Engine(model, tokenizer).generate([[40, 41, 42], [50] * 7], how):
        assert output.logprobs is not None and output.routes is not None
        answer = output.prompt_ids, output.token_ids, output.logprobs
        routes = torch.from_numpy(output.routes)
        rollouts.append(Rollout("t", *answer, Response("", "", True), 0.0, 0.0, 0, versions=[0] * 12, routes=routes))
    return rollouts


def largest_gap(model: Transformer, rollouts: list[Rollout]) -> float:
    """The largest distance of the trainer's log-probabilities from the sampler's, in nats."""
    with torch.no_grad():
        tokens = forward_responses(model, rollouts, torch.zeros(len(rollouts)))
        logprob_N, _ = token_logprob(tokens.x_ND, model.head.dense_weight(), tokens.targets_N, 1.0)
    return float((logprob_N - tokens.old_N).abs().max())


def other_choices(model: Transformer) -> Transformer:
    """The same weights with other choices: the bias of a router takes no part in anything else."""
    other = copy.deepcopy(model)
    for layer in other.moe_layers():
        layer.gate.e_score_correction_bias.copy_(torch.linspace(0.3, -0.3, len(layer.gate.weight)))
    return other


def test_a_layer_takes_the_experts_that_it_is_given_with_its_own_weights(model: Transformer) -> None:
    layer = model.moe_layers()[0].double()
    config, generator = layer.gate.config, torch.Generator().manual_seed(1)
    x_BTD = torch.randn(2, 5, config.hidden_size, generator=generator, dtype=torch.float64)
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    given_BTK = torch.rand(2, 5, experts, generator=generator).argsort(-1)[..., :chosen]
    out_BTD, routing = layer(x_BTD, None, given_BTK)
    logits = x_BTD.float() @ layer.gate.weight.float().T  # the router computes in float32
    for row in range(2):
        for place in range(5):
            x, ids = x_BTD[row, place], given_BTK[row, place].tolist()
            scores = logits[row, place].sigmoid().double()
            expected = (
                torch.zeros_like(x) if layer.shared_experts is None else layer.shared_experts(x[None, None])[0, 0]
            )
            for expert in ids:
                weight = scores[expert] / scores[ids].sum() * config.routed_scaling_factor
                gate, up = layer.experts.w_gate_EFD[expert] @ x, layer.experts.w_up_EFD[expert] @ x
                expected = expected + weight * (layer.experts.w_down_EDF[expert] @ (F.silu(gate) * up))
            torch.testing.assert_close(out_BTD[row, place], expected, rtol=1e-5, atol=1e-7)
    own = layer(x_BTD)[1].index_NK.sort(-1).values
    differs_N = (own != given_BTK.flatten(0, 1).sort(-1).values).any(-1)
    assert routing.flipped_N is not None and torch.equal(routing.flipped_N, differs_N) and differs_N.any()
    out_BTD.sum().backward()
    assert layer.gate.weight.grad is not None and layer.gate.weight.grad.abs().sum() > 0
    given_BTK[0, 2] = -1  # nobody knows: the router's own choice
    _, mixed = layer(x_BTD, None, given_BTK)
    assert torch.equal(mixed.index_NK[2].sort().values, own[2]) and not bool(mixed.flipped_N[2])
    assert torch.equal(mixed.index_NK[3], given_BTK[0, 3])


def test_the_trainer_is_the_sampler_where_their_routers_choose_otherwise(
    guesser: Transformer, tokenizer: Tokenizer
) -> None:
    rollouts = sampled(other_choices(guesser), tokenizer)
    forgotten = [replace(one, routes=None) for one in rollouts]
    assert largest_gap(guesser, forgotten) > 1e-2
    assert largest_gap(guesser, rollouts) <= 1e-4
    half = [*rollouts[:4], *forgotten[4:]]
    assert largest_gap(guesser, half[:4]) <= 1e-4 < largest_gap(guesser, half)
    routes = forward_responses(guesser, half, torch.zeros(8)).routes
    layers, tokens = len(guesser.moe_layers()), sum(one.length - 1 for one in half)
    assert routes.places == layers * tokens and routes.replayed == layers * sum(one.length - 1 for one in half[:4])
    assert 0 < routes.flipped <= routes.replayed
    assert forward_responses(guesser, sampled(guesser, tokenizer), torch.zeros(8)).routes.flipped == 0


def test_each_layer_takes_its_own(tokenizer: Tokenizer) -> None:
    trainer = Transformer.create(size("pico", vocab_size=tokenizer.vocab_size, num_hidden_layers=4), 1)
    with torch.no_grad():
        trainer.head.weight.mul_(4)
    assert len(trainer.moe_layers()) == 3 and not isinstance(trainer.layers[0].mlp, MoE)
    rollouts = sampled(other_choices(trainer), tokenizer)
    assert largest_gap(trainer, [replace(one, routes=None) for one in rollouts]) > 1e-2
    assert largest_gap(trainer, rollouts) <= 1e-4
    trainer.activation_checkpointing = True
    tokens = forward_responses(trainer, rollouts, torch.zeros(8))
    assert tokens.routes.replayed == tokens.routes.places
    tokens.x_ND.sum().backward()


def test_the_gap_is_that_of_tokens_of_the_trainers_own_weights() -> None:
    answer = Rollout(
        "t", [1], [2] * 200, [0.0] * 200, Response("", "", True), 0.0, 0.0, 0, versions=[2] * 100 + [3] * 100
    )
    gap_N = torch.cat((torch.full((100,), 50.0), torch.linspace(0.01, 1.0, 100)))
    gap = LogprobGap(step=4)
    nothing = torch.zeros(0)
    tokens = ResponseTokens(nothing, nothing, torch.zeros(200), nothing, None, RouteCounts(40, 40, 10))
    gap.compare(-gap_N, tokens, [answer])
    found = gap.metrics()
    assert found["logprob_gap_mean"] == pytest.approx(0.505) and found["logprob_gap_p99"] == pytest.approx(0.99)
    assert found["logprob_gap_max"] == 1.0 and found["route_flips"] == 0.25


def test_the_gradient_is_that_of_the_experts_that_sampled(guesser: Transformer, tokenizer: Tokenizer) -> None:
    sampler, trainer = other_choices(guesser), copy.deepcopy(guesser)
    rollouts = sampled(sampler, tokenizer)
    for model, answers in ((sampler, [replace(one, routes=None) for one in rollouts]), (trainer, rollouts)):
        tokens = forward_responses(model, answers, torch.zeros(8))
        logprob_N, _ = token_logprob(tokens.x_ND, model.head.dense_weight(), tokens.targets_N, 1.0)
        (tokens.x_ND.sum() + logprob_N.sum()).backward()
    for (name, one), other in zip(sampler.named_parameters(), trainer.parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None, name
            continue
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("fault", ["layers", "positions", "twice", "number"])
def test_experts_of_another_model_are_refused(guesser: Transformer, tokenizer: Tokenizer, fault: str) -> None:
    rollouts = sampled(guesser, tokenizer)
    routes = rollouts[3].routes
    assert routes is not None
    changed = {"layers": routes[:, :-1], "positions": routes[1:], "twice": routes * 0, "number": routes + 100}[fault]
    rollouts[3] = replace(rollouts[3], routes=changed)
    with pytest.raises(TrainingError, match="the experts of an answer are not those of this model.*replay_routes"):
        forward_responses(guesser, rollouts, torch.zeros(8))


def run_of(
    model: Transformer, sampler: Transformer, tokenizer: Tokenizer, task: Any, run: Run, config: RLRunConfig
) -> list[dict[str, Any]]:
    """The log of a run of ``model`` whose answers are those of ``sampler``."""
    problems, payer = StationProblems([task], [1.0], config), Payer(tokenizer, config)
    source = InProcess(Engine(sampler, tokenizer, max_batch=64), problems, config, payer)
    grpo.train(model, source, config, run)
    return read_metrics(run.folder)


@pytest.mark.parametrize("changes", [{}, {"importance_cap": 2.0}, {"minibatch": 8, "epochs": 2, "kl_weight": 0.1}])
def test_a_run_replays_all_of_them_and_says_how_far_the_two_are(
    guesser: Transformer,
    tokenizer: Tokenizer,
    task: Any,
    open_stage: Callable[[str, Config], Run],
    changes: dict[str, Any],
) -> None:
    config, model = CONFIG.replace(**changes), copy.deepcopy(guesser)
    for row in run_of(model, model, tokenizer, task, open_stage("rl", config), config):
        assert row["routes_replayed"] == 1.0 and 0 <= row["route_flips"] < 0.01
        assert 0 < row["logprob_gap_mean"] <= row["logprob_gap_p99"] <= row["logprob_gap_max"] <= 1e-4


def test_without_replay_nothing_is_replayed(
    guesser: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Callable[[str, Config], Run]
) -> None:
    config, model = CONFIG.replace(replay_routes=False), copy.deepcopy(guesser)
    for row in run_of(model, model, tokenizer, task, open_stage("rl", config), config):
        assert row.get("routes_replayed", 0.0) == 0.0 and "route_flips" not in row and "logprob_gap_max" in row


def test_the_log_says_the_share_that_would_flip(
    guesser: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Callable[[str, Config], Run]
) -> None:
    config = CONFIG.replace(steps=1)
    model, sampler = copy.deepcopy(guesser), other_choices(guesser)
    (row,) = run_of(model, sampler, tokenizer, task, open_stage("rl", config), config)
    assert row["routes_replayed"] == 1.0 and row["route_flips"] > 0.2 and row["logprob_gap_max"] <= 1e-4
    assert isinstance(model.layers[-1].mlp, MoE)

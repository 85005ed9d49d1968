"""Answers that are sampled in fewer bits are weighed by how likely the policy finds them, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sprat.config import Config
from sprat.config.quant import QuantizeConfig
from sprat.config.rl import RLRunConfig
from sprat.engine import Sampling
from sprat.errors import ConfigError, TrainingError
from sprat.kernels import native
from sprat.model import Transformer
from sprat.post.rl import grpo, update
from sprat.post.rl.problem_mix import StationProblems
from sprat.post.rl.rewards import Response
from sprat.post.rl.rollout import InProcess, Payer, Rollout
from sprat.post.rl.rollout_engine import RolloutEngine
from sprat.quant import dequantize_model, quantize_model
from sprat.tokens import Tokenizer
from sprat.trust.run import Run
from sprat.trust.run_record import read_metrics

SETTINGS: dict[str, Any] = {
    "steps": 3, "prompts_per_step": 8, "group_size": 8, "max_tokens": 10, "lr": 3e-3, "gate": False,
    "importance_cap": 2.0,
}  # fmt: skip
ROUNDED = ["bfloat16", "int4"]


def config_of(precision: str, **changes: Any) -> RLRunConfig:
    return RLRunConfig.model_validate(SETTINGS | {"rollout": {"precision": precision}} | changes)


def rounded(model: Transformer, precision: str) -> Transformer:
    """A float32 model with the values that ``precision`` leaves of its matrices."""
    if precision == "int4":
        return dequantize_model(quantize_model(model, QuantizeConfig(rounding="nearest", symmetric=False)))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if weight.dim() > 1 and not name.endswith("gate.weight"):
                weight.copy_(weight.bfloat16().float())
    return other


@pytest.mark.parametrize("precision", ROUNDED)
def test_rounded_rollouts_without_a_correction_are_refused(precision: str) -> None:
    with pytest.raises(ValueError, match=f"rollout.precision={precision} samples from another policy.*importance_cap"):
        config_of(precision, importance_cap=None)
    assert config_of("float32", importance_cap=None).max_mismatch == config_of("float32").max_mismatch == 1e-3
    assert 1e-3 < config_of(precision).max_mismatch < 1 and config_of(precision, max_mismatch=0.01).max_mismatch == 0.01


@pytest.mark.parametrize("precision", ROUNDED)
def test_the_copy_samples_with_rounded_weights_and_follows_the_policy(
    guesser: Transformer, tokenizer: Tokenizer, precision: str
) -> None:
    model = copy.deepcopy(guesser)
    rollouts, before = RolloutEngine(model, tokenizer, config_of(precision), 8), copy.deepcopy(model)
    for moved in (False, True):
        if moved:
            with torch.no_grad():
                model.head.weight.mul_(0.5)
            rollouts.take_over()
        how = Sampling(max_tokens=20, logprobs=True, ignore_eos=True, routes=True)
        (output,) = rollouts.engine.generate([[40, 41, 42]], how)
        assert output.logprobs is not None
        tokens, gaps = output.prompt_ids + output.token_ids, {}
        routes = torch.from_numpy(output.routes)[None, :-1].long()
        for name, one in (("rounded", rounded(model, precision)), ("exact", model), ("before", before)):
            with torch.no_grad():
                hidden = one.hidden(torch.tensor([tokens[:-1]]), routes_BTLK=routes).x_BTD[0, 2:]
                logprob_NV = one.logits(hidden).log_softmax(-1)
            expected = logprob_NV.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
            gaps[name] = float((expected - torch.tensor(output.logprobs)).abs().mean())
        if native() is not None or precision == "int4":  # torch rounds what lies between the matrices, too
            assert gaps["rounded"] < gaps["exact"] / 3
        assert 1e-4 < gaps["exact"] < 0.2 and (gaps["before"] > 2 * gaps["exact"]) == moved


class Gradient:
    """An optimizer that only looks."""

    def __init__(self, model: Transformer) -> None:
        self._model, self.seen = model, dict[str, torch.Tensor]()

    def clip_grad_norm(self, limit: float) -> float:
        return 1.0

    def step(self, lr_factor: float) -> None:
        self.seen = {name: p.grad.clone() for name, p in self._model.named_parameters() if p.grad is not None}

    def zero_grad(self) -> None:
        self._model.zero_grad()


@pytest.mark.parametrize("precision", ROUNDED)
def test_the_gradient_is_that_of_the_policy_and_not_of_its_copy(guesser: Transformer, precision: str) -> None:
    """All answers of one token, each as often as the copy samples it: an expectation without any noise."""
    model, prompt = copy.deepcopy(guesser), [40, 41, 42]
    sampler, reward_V = copy.deepcopy(guesser), torch.linspace(-1, 2, model.config.vocab_size)
    if precision == "bfloat16":  # its gap is small: show the same with a gap that is not
        with torch.no_grad():
            sampler.head.weight.mul_(1.5)
    with torch.no_grad():
        q_V = rounded(sampler, precision)(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    response = Response("", "", True)
    answers = [
        Rollout("t", prompt, [token], [float(q)], response, 0.0, 0.0, 0, versions=[0]) for token, q in enumerate(q_V)
    ]
    advantage_B, count = q_V.exp() * reward_V, len(q_V)
    policy = model(torch.tensor([prompt]))[0, -1].log_softmax(-1).exp()
    (-(policy * reward_V).sum() / count).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    off: dict[float | None, float] = {}
    for cap in (1e6, None):
        config = RLRunConfig.model_validate(SETTINGS | {"importance_cap": cap, "minibatch": count, "max_mismatch": 9.0})
        looking: Any = Gradient(model)
        update.update_policy(model, looking, answers, advantage_B, config, 1, None)
        gaps = [
            float((looking.seen[name] - own).norm() / own.norm()) for name, own in expected.items() if own.norm() > 0
        ]
        off[cap] = max(gaps)
    corrected, uncorrected = off[1e6], off[None]
    assert corrected < 1e-3 and uncorrected > 20 * corrected


@pytest.mark.parametrize("loss", ["dapo", "gspo", "cispo"])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_bad_answer_that_another_policy_sampled_is_masked_also_where_weights_correct(
    guesser: Transformer, cap: float | None, loss: str
) -> None:
    prompt, tokens = [40, 41, 42], [50, 51]
    with torch.no_grad():
        own = guesser(torch.tensor([prompt + tokens]))[0, 2:4].log_softmax(-1)[[0, 1], tokens]
    keys = {"importance_cap": cap, "loss": loss, "max_mismatch": 99.0, "off_policy_limit": 1.0}
    for gap, advantage, is_masked in ((3.0, -1.0, True), (0.1, -1.0, False), (3.0, 1.0, False)):
        answer = Rollout(
            "t", prompt, tokens, (own + gap).tolist(), Response("", "", True), 0.0, 0.0, 0, versions=[0, 0]
        )
        looking: Any = Gradient(model := copy.deepcopy(guesser))
        config = RLRunConfig.model_validate(SETTINGS | keys)
        update.update_policy(model, looking, [answer], torch.tensor([advantage]), config, 1, None)
        assert is_masked == (max(float(each.abs().max()) for each in looking.seen.values()) == 0.0)


@pytest.mark.parametrize("precision", ROUNDED)
def test_a_run_samples_with_the_copy_and_corrects(
    guesser: Transformer,
    tokenizer: Tokenizer,
    task: Any,
    open_stage: Callable[[str, Config], Run],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    config, model = config_of(precision), copy.deepcopy(guesser)
    weights: list[float] = []
    plain = update.forward_responses

    def looking(policy: Transformer, rollouts: list[Rollout], *others: Any, **more: Any) -> Any:
        weights.extend(w for one in rollouts for w in one.importance or ())
        return plain(policy, rollouts, *others, **more)

    monkeypatch.setattr(update, "forward_responses", looking)

    def train(name: str, own: RLRunConfig) -> Run:
        rollouts = RolloutEngine(model, tokenizer, own, 64)
        problems, payer = StationProblems([task], [1.0], own), Payer(tokenizer, own)
        source = InProcess(rollouts.engine, problems, own, payer, lambda model: rollouts.take_over())
        run = open_stage(name, own)
        grpo.train(model, source, own, run)
        return run

    for row in read_metrics(train("rl", config).folder):
        assert 1e-4 < row["logprob_gap_mean"] < config.max_mismatch and row["mismatch"] < 5
        assert row.get("routes_replayed") == 1.0
    assert len(weights) > 100 and max(weights) <= 2.0 and len({round(w, 6) for w in weights}) > 10
    with pytest.raises(TrainingError, match=r"nats from the sampler's.*rl\.max_mismatch is 1e-05"):
        train("strict", config.replace(max_mismatch=1e-5))


def test_a_recipe_is_refused_by_a_sentence() -> None:
    from sprat.config.rl import load_rl_config

    with pytest.raises(ConfigError, match="importance_cap=2"):
        load_rl_config(overrides=["rollout.precision=int4"])
    assert load_rl_config(overrides=["rollout.precision=int4", "importance_cap=2"]).max_mismatch == 0.5

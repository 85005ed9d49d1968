"""A real model calls a real tool: the call is read out of its tokens, and the result is what it goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sprat.config import OptimConfig
from sprat.config.rl import RLRunConfig
from sprat.config.sizes import size
from sprat.engine import Engine, Sampling
from sprat.model import Transformer
from sprat.post.rl.batch import forward_responses
from sprat.post.rl.environment import EpisodePayer
from sprat.post.rl.environment_pool import EnvironmentPool
from sprat.post.rl.environment_turns import TurnFormat
from sprat.post.rl.judge_pool import JudgePool
from sprat.post.rl.rewards import Response
from sprat.post.rl.rollout import Rollout
from sprat.tasks import Problem
from sprat.tasks.environment_forms import Episode
from sprat.tasks.environments import Calculator
from sprat.tokens import Tokenizer
from sprat.train import optim
from tests.lucky import Lucky

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "%s"}}\n</tool_call>'
PROBLEMS = [Problem("sums", n, f"What is {n} times 7?", str(7 * n)) for n in (6, 8)]


@pytest.fixture(scope="module")
def calling() -> tuple[Transformer, Tokenizer]:
    """A model that has learned by heart to call the calculator with the two products, and to repeat what it says."""
    torch.set_num_threads(1)
    schemas = Episode(Calculator, "here").schemas
    reply = {"content": None, "messages": None, "tools": schemas}
    bare = TurnFormat(Tokenizer.train(["a b"] * 2, 400, numbers=100))
    text = bare.tokenizer.decode(bare.prompt_ids(PROBLEMS[0], reply, None))
    tokenizer = Tokenizer.train([text, CALL % "6*7"] * 4, 700, numbers=100)
    turns, shown = TurnFormat(tokenizer), list[Rollout]()
    for problem in PROBLEMS:
        prompt, ids, spans = turns.prompt_ids(problem, reply, None), list[int](), list[tuple[int, int]]()
        for said in (CALL % f"{problem.index}*7", problem.answer):
            if ids:
                told = [{"role": "tool", "content": problem.answer, "tool_call_id": "call_0"}]
                ids += turns.next_ids(turns.read(ids, schemas, None, finished=True), told, None)
            own = [*tokenizer.encode_parts([("<think></think>", True), (said, False)]), tokenizer.special_ids.eos]
            spans.append((len(ids), len(own)))
            ids += own
        response = Response("", problem.answer, True)
        shown.append(Rollout("sums", prompt, ids, [0.0] * len(ids), response, 1.0, 1.0, 0, trained=spans))
    shape = size("pico", vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                 first_k_dense_replace=0, n_routed_experts=4, moe_intermediate_size=32, intermediate_size=64,
                 max_position_embeddings=512, num_nextn_predict_layers=0)  # fmt: skip
    model = Transformer.create(shape, 0)
    optimizer = optim.build(model, OptimConfig(muon_lr=0.02, adam_lr=0.01, warmup_steps=5))
    for _ in range(80):
        tokens = forward_responses(model, shown, torch.ones(len(shown)))
        loss = F.cross_entropy(tokens.x_ND @ model.head.dense_weight().T, tokens.targets_N)
        loss.backward()
        optimizer.step(lr_factor=1.0)
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.1
    return model, tokenizer


@pytest.fixture
def payer(calling: tuple[Transformer, Tokenizer], tmp_path: Path) -> Iterator[EpisodePayer]:
    """Episodes with the calculator, paid by a judge of the last answer."""
    (tmp_path / "judge.py").write_text("def reward(problem, answer):\n    return answer.content == problem.answer\n")
    config = RLRunConfig(max_tokens=60)
    pool, judge = EnvironmentPool("calculator", config.environment), JudgePool(f"{tmp_path}/judge.py:reward", workers=1)
    yield EpisodePayer(calling[1], config, pool, judge)
    pool.close()
    judge.close()


def test_the_model_calls_the_calculator_and_answers_with_its_result(
    calling: tuple[Transformer, Tokenizer], payer: EpisodePayer
) -> None:
    model, tokenizer = calling
    asked = [(Lucky(), problem) for problem in PROBLEMS]
    sampling = Sampling(temperature=0.0, max_tokens=60, logprobs=True)
    rollouts = payer.sample(Engine(model, tokenizer, max_batch=4), asked, [sampling] * 2)
    for rollout, problem in zip(rollouts, PROBLEMS, strict=True):
        assert (rollout.reward, rollout.tool_calls, rollout.tool_errors, rollout.finish) == (1.0, 1, 0, "stop")
        (_, call), (start, answer) = rollout.trained or []
        texts = [tokenizer.decode(part) for part in (
            rollout.token_ids[:call], rollout.token_ids[call:start], rollout.token_ids[start : start + answer]
        )]  # fmt: skip
        assert texts[0] == f"<think></think>{CALL % f'{problem.index}*7'}<|eos|>"
        assert texts[1] == f"<|user|><tool_response>\n{problem.answer}\n</tool_response><|assistant|>"
        assert texts[2] == f"<think></think>{problem.answer}<|eos|>"
        assert rollout.response.content == problem.answer and all(value < 0 for value in rollout.logprobs[:call])
    assert "# Tools" in tokenizer.decode(rollouts[0].prompt_ids)


class Routed(Engine):
    """An engine that tells the experts of each token: here the token itself."""

    def generate(self, prompts: Any, sampling: Any = None, **options: Any) -> Any:
        outputs = super().generate(prompts, sampling, **options)
        ids = [np.array(each.prompt_ids + each.token_ids, np.int16) for each in outputs]
        told = zip(outputs, ids, strict=True)
        return [SimpleNamespace(**vars(each) | {"routes": own[:, None, None]}) for each, own in told]


def test_experts_of_all_turns_are_kept(calling: tuple[Transformer, Tokenizer], payer: EpisodePayer) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=60, logprobs=True)
    [rollout] = payer.sample(Routed(*calling, max_batch=4), [(Lucky(), PROBLEMS[0])], [sampling])
    assert rollout.routes is not None and len(rollout.trained or []) == 2
    assert rollout.routes.flatten().tolist() == rollout.prompt_ids + rollout.token_ids


@pytest.mark.parametrize("max_turns", [1, 8])
def test_get_reward_pays_an_episode_that_is_cut_and_says_the_same_again(
    max_turns: int, calling: tuple[Transformer, Tokenizer], tmp_path: Path
) -> None:
    model, tokenizer = calling
    (tmp_path / "counts.py").write_text(
        "from sprat.tasks.environments import Calculator\n\n\nclass Counts(Calculator):\n    calls = 0\n\n"
        "    def calculator(self, expression: str) -> str:\n        self.calls += 1\n"
        "        return super().calculator(expression)\n\n    calculator.__doc__ = Calculator.calculator.__doc__\n\n"
        "    def get_reward(self):\n        return self.calls / 2\n"
    )
    config = RLRunConfig(max_tokens=60, environment={"max_turns": max_turns})
    pool = EnvironmentPool(f"{tmp_path}/counts.py:Counts", config.environment)
    own = EpisodePayer(tokenizer, config, pool)
    asked = [(Lucky(), problem) for problem in PROBLEMS]
    sampling = Sampling(temperature=0.0, max_tokens=60, logprobs=True)
    rollouts = own.sample(Engine(model, tokenizer, max_batch=4), asked, [sampling] * 2)
    assert [(each.reward, each.finish) for each in rollouts] == [(0.5, "length" if max_turns == 1 else "stop")] * 2
    found = own.again(asked, rollouts)
    assert found is not None and [[verdict.reward for verdict in side] for side in found] == [[0.5, 0.5]] * 2
    pool.close()


def test_a_call_that_is_never_answered_within_the_limit_is_cut(
    calling: tuple[Transformer, Tokenizer], payer: EpisodePayer
) -> None:
    model, tokenizer = calling
    payer._settings = RLRunConfig(max_tokens=60, environment={"max_turns": 1})
    sampling = Sampling(temperature=0.0, max_tokens=60, logprobs=True)
    [rollout] = payer.sample(Engine(model, tokenizer, max_batch=4), [(Lucky(), PROBLEMS[0])], [sampling])
    assert (rollout.reward, rollout.tool_calls, rollout.finish) == (0.0, 1, "length")
    assert len(rollout.trained or []) == 1 and rollout.response.content == ""

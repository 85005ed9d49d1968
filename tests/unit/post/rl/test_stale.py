"""Answers of older weights are learned from, and are no fault of the sampler's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sprat.config import Config
from sprat.config.rl import RLRunConfig
from sprat.engine import Engine
from sprat.errors import TrainingError
from sprat.model import Transformer
from sprat.post.rl import grpo
from sprat.post.rl.problem_mix import StationProblems
from sprat.post.rl.rollout import InProcess, Payer, Rollout
from sprat.tokens import Tokenizer
from sprat.trust.run import Run
from sprat.trust.run_record import read_metrics

CONFIG = RLRunConfig.model_validate(
    {"steps": 4, "prompts_per_step": 8, "group_size": 8, "max_tokens": 10, "lr": 3e-3, "gate": False}
)


class Behind:
    """Samples with the weights of the start for ever, and says so, or not."""

    def __init__(self, source: InProcess, honest: bool) -> None:
        self._source, self._honest = source, honest

    def groups(self, step: int) -> list[Rollout]:
        rollouts = self._source.groups(step)
        version = 0 if self._honest else step - 1
        return [replace(one, versions=[version] * len(one.token_ids)) for one in rollouts]

    def publish(self, version: int, model: Transformer, rollbacks: int = 0) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("honest", [True, False])
def test_only_answers_of_the_trainers_own_weights_are_compared(
    guesser: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Callable[[str, Config], Run], honest: bool
) -> None:
    frozen, model = copy.deepcopy(guesser), copy.deepcopy(guesser)
    problems, payer = StationProblems([task], [1.0], CONFIG), Payer(tokenizer, CONFIG)
    source = Behind(InProcess(Engine(frozen, tokenizer, max_batch=64), problems, CONFIG, payer), honest)
    run = open_stage("rl", CONFIG)
    if not honest:
        with pytest.raises(TrainingError, match=r"in step 2 .* nats from the sampler's"):
            grpo.train(model, source, CONFIG, run)
        return
    grpo.train(model, source, CONFIG, run)
    rows = read_metrics(run.folder)
    assert rows[0]["logprob_gap_max"] < 1e-4 and not any("logprob_gap_max" in row for row in rows[1:])
    assert rows[0]["mismatch"] < 1e-4 and [row["mismatch"] for row in rows[1:]] == [0.0] * 3
    assert all(row["kl"] > 1e-6 for row in rows[1:])  # the policy has moved from what sampled

"""One episode of an environment, from its question to the rollout that it becomes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from sprat.engine import Sampling
from sprat.post.rl.environment_pool import EpisodeProcess, FaultError
from sprat.post.rl.environment_turns import Turn
from sprat.post.rl.environment_worker import Row
from sprat.post.rl.rewards import Response, Verdict
from sprat.post.rl.rollout import Rollout, problem_id
from sprat.tasks import Problem, Task
from sprat.tokens import Tokenizer

SEED = "environment_seed"  # in the meta of a problem that an environment draws itself


@dataclass
class Episode:
    """One episode while it goes on; ``token_ids`` are all behind the prompt, the model's and the environment's.

    Attributes:
        sampling: of its group.
        turns: where in ``token_ids`` each turn of the model lies.
        total: of rewards; None where the end was "cannot say".
        routes: experts of all tokens up to the last turn's end, where the engine tells them: each turn computes all
            that stands before it.
    """

    task: Task
    problem: Problem
    sampling: Sampling
    sample: int
    process: EpisodeProcess | None = None
    tools: list[Row] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)
    last: Turn | None = None
    reply: Row = field(default_factory=dict)
    is_over: bool = False
    finish: str = "stop"
    total: float | None = 0.0
    fault: FaultError | None = None
    tool_calls: int = 0
    tool_errors: int = 0
    routes: NDArray[Any] | None = None

    @property
    def seed(self) -> int:
        """With which the environment begins."""
        return int(self.problem.meta.get(SEED, self.sampling.seed))

    @property
    def given(self) -> Problem | None:
        """The problem that the environment is given; None where it draws its own."""
        return None if SEED in self.problem.meta else self.problem

    def fail(self, fault: FaultError) -> None:
        """It cannot go on."""
        self.fault, self.is_over = fault, True

    def cut(self) -> None:
        """It is over because of a limit."""
        self.finish, self.is_over = "length", True

    def turn_sampling(self, max_tokens: int) -> Sampling:
        """How its next turn is drawn: by noise of its own."""
        key = f"episode/{self.sampling.seed}/{self.sample}/{len(self.turns)}"
        seed = random.Random(key).randrange(1 << 31)
        return replace(self.sampling, n=1, seed=seed, max_tokens=max_tokens, fit=True)

    def _whole_routes(self) -> Tensor | None:
        """The experts of prompt and turns; None where they are not known of all of them."""
        count = len(self.prompt_ids) + len(self.token_ids)
        return None if self.routes is None or len(self.routes) != count else torch.from_numpy(self.routes)

    def fault_verdict(self) -> Verdict:
        """What became of it where it could not go on."""
        assert self.fault is not None
        return Verdict(None, self.fault.outcome, self.fault.detail)

    @property
    def response(self) -> Response:
        """What a reward sees: the last turn alone, so that nothing is paid for what the environment said."""
        return Response("", "", True) if self.last is None else self.last.response

    def rollout(
        self, tokenizer: Tokenizer, response: Response, verdict: Verdict, reward: float | None, second: float | None
    ) -> Rollout:
        """What the trainer gets, paid ``reward``."""
        is_empty = not self.token_ids  # an episode that never began has one token, of nobody
        computed = sum(
            len(self.prompt_ids) + first for first, _ in self.turns[1:]
        )  # the engine keeps nothing in between
        return Rollout(
            task=self.task.name,
            prompt_ids=self.prompt_ids,
            token_ids=[tokenizer.special_ids.eos] if is_empty else self.token_ids,
            logprobs=[0.0] if is_empty else self.logprobs,
            response=response,
            reward=reward,
            score=verdict.reward or 0.0,
            prefill_tokens=computed + (len(self.prompt_ids) if self.sample == 0 else 0),
            sample=self.sample,
            problem_id=problem_id(self.problem),
            finish=self.finish,
            outcome=verdict.outcome,
            detail=verdict.detail,
            second=second,
            trained=self.turns,
            tool_calls=self.tool_calls,
            tool_errors=self.tool_errors,
            environment_seed=self.seed,
            routes=self._whole_routes(),
        )

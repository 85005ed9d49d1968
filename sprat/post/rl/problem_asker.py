"""What the groups of a run are asked, and what their answers are paid, for workers that know tokens alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import torch

from sprat.config.rl import RLRunConfig
from sprat.engine import Output, Sampling
from sprat.engine.sequence import Usage
from sprat.eval.tasks import problem_messages
from sprat.post.rl.ledger_tables import Question
from sprat.post.rl.problem_mix import ProblemSource
from sprat.post.rl.rollout import Payer, Rollout, group_sampling, problem_id
from sprat.post.rl.sampled import SampledAnswer
from sprat.tasks import Problem, Task
from sprat.tokens import render


class ProblemAsker:
    """An ``Asker`` of the user's problems; any thread may ask, one pays."""

    def __init__(self, problems: ProblemSource, payer: Payer, config: RLRunConfig) -> None:
        self._problems, self._payer, self._config, self._lock = problems, payer, config, threading.Lock()

    def _problem(self, group: int) -> tuple[Task, Problem]:
        with self._lock:
            return self._problems.problem(group)

    def question(self, group: int) -> Question:
        """See ``Asker``."""
        task, problem = self._problem(group)
        ids = render(self._payer.tokenizer, problem_messages(problem), thinking=self.sampling(group).thinking)
        return Question(group, task.name, problem_id(problem), ids)

    def sampling(self, group: int) -> Sampling:
        """See ``Asker``."""
        return group_sampling(self._config, group)

    def pay(self, question: Question, answers: Sequence[SampledAnswer]) -> list[Rollout]:
        """See ``Asker``."""
        asked, prompt = self._problem(question.group), question.prompt_ids
        outputs = [_as_output(prompt, answer) for answer in answers]
        paid = self._payer.pay([asked] * len(answers), outputs)
        return [
            replace(
                rollout,
                group=question.group,
                sample=sample,
                versions=answer.versions,
                routes=None if answer.routes is None else torch.from_numpy(answer.routes.copy()),
            )
            for sample, (rollout, answer) in enumerate(zip(paid, answers, strict=True))
        ]


def _as_output(prompt_ids: list[int], answer: SampledAnswer) -> Output:
    """What the engine of another process said; its text is read from the tokens by whoever pays."""
    cached = len(prompt_ids) - answer.prefill_tokens
    usage = Usage(len(prompt_ids), len(answer.token_ids), 0, cached, answer.prefill_tokens)
    ids, logprobs = answer.token_ids, answer.logprobs
    return Output("", "", ids, logprobs, usage, "stop" if answer.finish == "stop" else "length", prompt_ids)

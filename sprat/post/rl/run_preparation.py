"""All that a run of RL needs, checked before anything is touched: questions, judges, model, and if it can learn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from sprat.config.rl import RLRunConfig
from sprat.engine import Engine
from sprat.errors import ConfigError
from sprat.eval.tasks import problem_messages
from sprat.model import Transformer
from sprat.model.lora import add_lora
from sprat.post.rl import grpo
from sprat.post.rl.environment import EpisodePayer
from sprat.post.rl.environment_task import EnvironmentTask, check_paid, open_environment
from sprat.post.rl.judge_pool import JudgePool
from sprat.post.rl.merged_copy import plain_copy, without_adapters, write_merged
from sprat.post.rl.monitor import OnNews, ReferenceModel
from sprat.post.rl.problem_file import ProblemFile
from sprat.post.rl.problem_mix import Part, ProblemMix, split_tasks
from sprat.post.rl.questions import Questions, load_tasks
from sprat.post.rl.rewards import BatchReward, TaskJudge
from sprat.post.rl.rollout import InProcess, Payer
from sprat.post.rl.rollout_engine import RolloutEngine
from sprat.post.rl.run_drill import drill_verifier
from sprat.post.rl.run_gate import evaluate_run_gate
from sprat.tasks import Problem
from sprat.tokens import Tokenizer, render
from sprat.train import checkpoint

log = logging.getLogger(__name__)


class Closable(Protocol):
    """What has processes that end with the run."""

    def close(self) -> None:
        """End them."""
        ...


@dataclass
class Prepared:
    """All that a run needs, checked. ``sampler`` computes the answers: the model, or a copy with adapters merged."""

    model: Transformer
    sampler: Transformer
    tokenizer: Tokenizer
    config: RLRunConfig
    mix: ProblemMix
    payer: Payer
    engine: Engine
    reference: ReferenceModel | None
    facts: dict[str, Any]
    pools: list[Closable]

    def source(self) -> InProcess:
        """Who samples."""
        max_batch = self.config.prompts_per_step * self.config.group_size
        rollouts = RolloutEngine(self.sampler, self.tokenizer, self.config, max_batch, self.engine)

        def take_over(model: Transformer) -> Engine:
            if self.sampler is not self.model:
                write_merged(model, self.sampler)
            return rollouts.take_over()

        return InProcess(rollouts.engine, self.mix, self.config, self.payer, take_over)


def prepare(
    load_model: Callable[[], tuple[Transformer, Tokenizer]],
    questions: Questions,
    config: RLRunConfig,
    start: checkpoint.Checkpoint | None,
    *,
    asks_gate: bool,
    on_news: OnNews,
) -> Prepared:
    """The questions, the judges and the model, checked; with ``asks_gate`` the policy too.

    Raises:
        SpratError: see ``reinforce``.
    """
    environment = open_environment(questions.environment, config) if questions.environment else None
    pools: list[Closable] = [] if environment is None else [environment]
    try:
        tasks = load_tasks(questions)
        if environment is not None:
            tasks = tasks or [EnvironmentTask(environment)]
            check_paid(environment, tasks, bool(questions.reward))
        parts = split_tasks(tasks, config.held_out)
        judges = [_pool(name, config) for name in (questions.reward, questions.second_reward) if name]
        pools += judges
        model, tokenizer = load_model()
        parts = [fit_part(part, tokenizer, model, config.max_tokens) for part in parts]
        facts: dict[str, Any] = {"problems": [_counts(part) for part in parts]}
        skipped = [row for part in parts if isinstance(part.task, ProblemFile) for row in part.task.skipped]
        facts |= {"skipped": skipped} if skipped else {}
        mix = ProblemMix(parts, config.seed)
        reward, second = judges[0] if questions.reward else None, _second(questions, judges, parts)
        if asks_gate and (environment is None or reward is not None):  # an environment is no judge of single answers
            own = [part.task for part in parts]
            facts |= drill_verifier(mix, own, reward, tokenizer, config, questions.judge, on_news)
        sampler = model
        if config.lora is not None:
            sampler = plain_copy(model)
            add_lora(model, config.lora, config.seed)
        if start is not None and config.init_state == "continue":
            grpo.check_start(start, model, config)
        elif start is not None:
            checkpoint.restore_weights(start, model)
            config = config.replace(init_from="")
        if sampler is not model:
            write_merged(model, sampler)
        payer = Payer(tokenizer, config, reward, second=second, by_reward=True)
        if environment is not None:
            payer = EpisodePayer(tokenizer, config, environment, reward, second=second)
        engine = Engine(sampler, tokenizer, max_batch=config.prompts_per_step * config.group_size)
        reference = _reference(model, config, start)
        prepared = Prepared(model, sampler, tokenizer, config, mix, payer, engine, reference, facts, pools)
        if asks_gate and config.gate and not config.init_from:
            found = evaluate_run_gate(engine, mix, config, payer, questions.judge)
            prepared.facts["gate"] = found.to_dict()
            on_news(f"the gate: {found}")
        return prepared
    except BaseException:
        for pool in pools:
            pool.close()
        raise


def _pool(name: str, config: RLRunConfig) -> JudgePool:
    verifier = config.verifier
    return JudgePool(
        name, workers=verifier.workers, timeout_seconds=config.reward_timeout, keep_alive=verifier.keep_alive
    )


def _second(questions: Questions, judges: Sequence[JudgePool], parts: Sequence[Part]) -> BatchReward | None:
    """Who looks on: the second reward, or the tasks' own judges where a reward stands before them."""
    if questions.second_reward:
        return judges[-1]
    own = [part.task for part in parts if not isinstance(part.task, ProblemFile | EnvironmentTask)]
    return TaskJudge(own) if questions.reward and own else None


def _counts(part: Part) -> dict[str, Any]:
    trained = None if part.problems is None else len(part.problems)
    return {"task": part.task.name, "trained": trained, "held_out": len(part.held_out)}


def fit_part(part: Part, tokenizer: Tokenizer, model: Transformer, max_tokens: int) -> Part:
    """``part`` without problems that leave no room for an answer of ``max_tokens``; an environment says so itself.

    Raises:
        ConfigError: none is left.
    """
    room = model.config.context - max_tokens

    def fits(problem: Problem) -> bool:
        return len(render(tokenizer, problem_messages(problem))) <= room

    if isinstance(part.task, EnvironmentTask):
        return part
    held_out = tuple(filter(fits, part.held_out))
    problems = None if part.problems is None else tuple(filter(fits, part.problems))
    lost = len(part.problems or ()) + len(part.held_out) - len(problems or ()) - len(held_out)
    if lost:
        log.warning("%d problems of %s are longer than %d tokens and are left out", lost, part.task.name, room)
    if problems == ():
        what = f"no problem leaves room for {max_tokens} tokens in a context of {model.config.context}"
        raise ConfigError(what, where=part.task.name, todo="lower max_tokens")
    return replace(part, problems=problems, held_out=held_out, fits=fits)


def _reference(model: Transformer, config: RLRunConfig, start: checkpoint.Checkpoint | None) -> ReferenceModel | None:
    """The weights of the start: the base under fresh adapters, else a copy; None where no wire asks for them."""
    if not config.trip_wires.max_kl or config.trip_wires.action == "off":
        return None
    if config.lora is not None and not config.lora.dora and start is None:
        return partial(without_adapters, model)
    kept = plain_copy(model)

    @contextmanager
    def reference() -> Iterator[Transformer]:
        yield kept

    return reference

"""A model, a user's questions and the judge of its answers, ready to be asked outside of RL; and its held-out score.

The questions are split as ``sprat rl`` splits them, so that what is held out there is held out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sprat.config.rl import HeldOutConfig, RLRunConfig
from sprat.config.sample import AskConfig, HeldOutOfConfig, SplitConfig
from sprat.engine import Engine
from sprat.errors import DataError, TrainingError
from sprat.eval.score import wilson_interval
from sprat.eval.tasks import problem_messages
from sprat.formats.load import load
from sprat.post.rl.held_out import HeldOut
from sprat.post.rl.judge_pool import JudgePool
from sprat.post.rl.problem_file import ProblemFile, read_problems
from sprat.post.rl.problem_mix import Part, split_task, split_tasks
from sprat.post.rl.questions import Questions, load_tasks
from sprat.post.rl.reward_sources import is_command, split_command
from sprat.post.rl.rollout import Payer
from sprat.post.rl.run_preparation import fit_part
from sprat.tasks import Problem
from sprat.tokens import Tokenizer


@dataclass(frozen=True)
class Asked:
    """Who is asked what, and who judges.

    Attributes:
        parts: the questions of each task, those to train on and those held out.
        skipped: records of a file that are none.
    """

    engine: Engine
    parts: list[Part]
    payer: Payer
    skipped: list[dict[str, Any]]

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.engine.tokenizer


def split_questions(questions: Questions, split: SplitConfig) -> list[Part]:
    """The questions of each task, those to train on and those held out.

    Raises:
        SpratError: there is no question or nobody judges; see ``questions.load_tasks``.
    """
    questions.check()
    held_out = HeldOutConfig(share=split.share, problems=split.problems)
    return split_tasks(load_tasks(questions), held_out)


def held_out_questions(of: HeldOutOfConfig) -> list[Problem]:
    """All questions of a file that are held out, those beyond ``of.problems`` too: what must not be learned.

    Of a conversation ``meta["asked"]`` is its last turn, by which ``tasks.overlap`` looks for it.

    Raises:
        DataError: see ``problem_file.read_problems``.
    """
    file = read_problems(of.data)
    part = split_task(file, HeldOutConfig(share=of.share, problems=of.problems))
    trained = {problem.canonical for problem in part.problems or ()}
    kept = [problem for problem in (*file.problems, *file.held_out) if problem.canonical not in trained]
    last_turns = [problem_messages(problem)[-1].content for problem in kept]
    return [replace(each, meta={**each.meta, "asked": text}) for each, text in zip(kept, last_turns, strict=True)]


def check_judge(questions: Questions) -> None:
    """See that there are such rewards: a function of a form that is known, or a program; none of them is started twice.

    Raises:
        ConfigError: there is none.
    """
    for name in filter(None, (questions.reward, questions.second_reward)):
        if is_command(name):
            split_command(name)
        else:
            JudgePool(name, workers=1).close()


@contextmanager
def asked(model: Path, questions: Questions, config: AskConfig) -> Iterator[Asked]:
    """The model at ``model`` with the questions and their judge, whose processes end with the ``with`` block.

    Raises:
        SpratError: one of them cannot be used.
    """
    parts = split_questions(questions, config.held_out)
    verifier = config.verifier
    pool = None
    if questions.reward:
        workers, keep_alive = verifier.workers, verifier.keep_alive
        timeout = config.reward_timeout
        pool = JudgePool(questions.reward, workers=workers, timeout_seconds=timeout, keep_alive=keep_alive)
    try:
        network, tokenizer = load(model)
        skipped = [row for part in parts if isinstance(part.task, ProblemFile) for row in part.task.skipped]
        parts = [fit_part(part, tokenizer, network, config.max_tokens) for part in parts]
        payer = Payer(tokenizer, run_config(config), pool, by_reward=True)
        yield Asked(Engine(network, tokenizer, frozen=True, consume=True), parts, payer, skipped)
    finally:
        if pool is not None:
            pool.close()


def run_config(config: AskConfig) -> RLRunConfig:
    """``config`` as RL says it, for those parts of RL that read it."""
    split = config.held_out
    held_out = HeldOutConfig(share=split.share, problems=split.problems, samples=config.samples)
    return RLRunConfig(
        temperature=config.temperature or 1.0, max_tokens=config.max_tokens, seed=config.seed, held_out=held_out
    )


def score_held_out(model: Path, questions: Questions, config: AskConfig, folder: Path) -> dict[str, Any]:
    """The score of the model at ``model`` on the held-out questions, as RL measures it before and after.

    Args:
        folder: of ``held_out.jsonl``, with what each problem was paid, and ``samples.jsonl``.

    Returns:
        ``count`` problems that were judged, mean ``reward``, ``accuracy`` (full marks are 1) with its 95 % interval
        ``low`` to ``high`` (Wilson), ``response_length`` in tokens, ``cut_share``.

    Raises:
        SpratError: see ``asked``. DataError: no question is held out. TrainingError: nothing was judged.
    """
    with asked(model, questions, config) as ready:
        problems = [(part.task, problem) for part in ready.parts for problem in part.held_out]
        if not problems:
            todo = "raise held_out.share, or give rows with a split of test"
            raise DataError("no question is held out", where="held_out", todo=todo)
        held_out = HeldOut(ready.engine, problems, run_config(config), ready.payer, folder)
        held_out.evaluate(0)
        count = sum(bool(each.samples) for each in held_out.results[0])
        if not count:
            todo = "check it on a few answers by hand"
            raise TrainingError("the verifier judged not one answer", where=f"reward {questions.reward}", todo=todo)
        scores = held_out.summary(0)
        low, high = wilson_interval(min(scores["accuracy"] * count, count), count)
        return {"count": count, **scores, "low": low, "high": high}

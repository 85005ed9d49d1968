"""Evaluation of a stage: the same held-out problems for every stage, answered greedily.

Four ways of asking: ``greedy`` leaves it to the model whether to think, ``sampled`` does so too and draws at
temperature 1, ``thinking`` opens the think tag for it, ``direct`` closes it at once. The last three explain the first:
what is likeliest may be far from what is said on average. They may be asked of fewer problems.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

from sprat.engine import Engine, Sampling
from sprat.engine.speculation import SpeculationMode
from sprat.errors import ConfigError
from sprat.eval.score import Score, StageScore, two_proportion_p_value
from sprat.eval.tasks import evaluate_many, problem_messages
from sprat.model import Transformer
from sprat.pipeline.pipeline import Pipeline
from sprat.tasks import is_correct
from sprat.tokens import Message, Tokenizer
from sprat.tokens.chat import render

MODES: dict[str, tuple[bool | None, float]] = {  # thinking, temperature
    "greedy": (None, 0.0),
    "sampled": (None, 1.0),
    "thinking": (True, 0.0),
    "direct": (False, 0.0),
}
SPEED_BATCH = 16  # requests at once when tokens a second are measured
DRAFT_ROUNDS = 7  # with and without drafts


def check_context(
    pipeline: Pipeline,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    rows: int = 0,
    answer: int = 0,
    unseen: bool = False,
) -> None:
    """Refuse, before any work, what the context of ``model`` cannot hold.

    Args:
        rows: tokens of a row of its training.
        answer: tokens of an answer of its training.
        unseen: whether it will be asked the tasks that are never trained, too.

    Raises:
        ConfigError: rows, or the longest held-out question with the longest answer, are longer than the context.
        DataError: the data stage kept no problems of a task.
    """
    recipe, context = pipeline.recipe, model.config.context
    if rows > context:
        what, todo = f"rows of {rows} tokens exceed the model's context of {context}", "train on shorter rows"
        raise ConfigError(what, where="seq_len", todo=todo)
    task_configs = (*recipe.data.tasks, *(recipe.data.unseen if unseen else ()))
    problems = [pipeline.data_artifact.task(config, recipe.eval.split).problems for config in task_configs]
    questions = [problem_messages(problem) for problem in itertools.chain.from_iterable(problems)]
    longest = max(len(render(tokenizer, question, thinking=False)) for question in questions)
    limit, key = max((recipe.eval.max_tokens, "eval.max_tokens"), (answer, "rl.max_tokens"))
    if longest + limit > context:
        what = f"a question of {longest} tokens and an answer of {limit} exceed the model's context of {context}"
        raise ConfigError(what, where=key, todo="lower it, or make a model of a longer context")


def score_tasks(
    pipeline: Pipeline,
    model: Transformer,
    tokenizer: Tokenizer,
    modes: Sequence[str] = ("greedy",),
    *,
    unseen: bool = False,
) -> list[dict[str, Any]]:
    """Score ``model`` on every task of the mix (and the never-trained ones) in each of ``modes``.

    Returns:
        One row for each task and mode, as the report reads it.
    """
    recipe = pipeline.recipe
    engine = Engine(model, tokenizer, max_batch=recipe.eval.batch)
    configs = [(c, c.weight > 0) for c in recipe.data.tasks] + [(c, False) for c in recipe.data.unseen if unseen]
    tasks = [pipeline.data_artifact.task(config, recipe.eval.split) for config, _ in configs]
    max_problems, rows = max(len(task.problems) for task in tasks), []
    for mode in modes:
        thinking, temperature = MODES[mode]
        scores = evaluate_many(
            engine,
            tasks,
            count=max_problems if mode == "greedy" else min(max_problems, recipe.eval.side_problems),
            thinking=thinking,
            temperature=temperature,
            max_tokens=recipe.eval.max_tokens,
            samples=recipe.eval.samples,
            split=recipe.eval.split,
        )
        for score, (_, trained) in zip(scores, configs, strict=True):
            rows.append(_score_row(score, mode, trained))
    return rows


def _score_row(score: Score, mode: str, trained: bool) -> dict[str, Any]:
    """A score as the report reads it."""
    samples = [
        {
            "question": sample["question"],
            "answer": sample["expected"],
            "reasoning": sample["reasoning"] or "",
            "content": sample["answer"],
            "correct": is_correct(sample["score"]),
        }
        for sample in score.samples
    ]
    return StageScore(**{**vars(score), "samples": samples}, mode=mode, trained=trained).to_dict()


def accuracy_changes(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each task asked greedily the change of accuracy between two stages and its p-value (two proportions)."""
    rows_before = {row["task"]: row for row in before if row["label"] == "greedy"}
    return [
        {
            "task": row["task"],
            "before": rows_before[row["task"]]["accuracy"],
            "after": row["accuracy"],
            "p": two_proportion_p_value(StageScore.from_dict(rows_before[row["task"]]), StageScore.from_dict(row)),
        }
        for row in after
        if row["label"] == "greedy" and row["task"] in rows_before
    ]


def tokens_per_second(pipeline: Pipeline, model: Transformer, tokenizer: Tokenizer) -> float:
    """Tokens a second of greedy generation, ``SPEED_BATCH`` requests at once, on this thread."""
    return _generation_speed(Engine(model, tokenizer, max_batch=SPEED_BATCH), _prompts(pipeline, 4 * SPEED_BATCH))


def draft_speedup(pipeline: Pipeline, model: Transformer, tokenizer: Tokenizer) -> dict[str, float]:
    """What the drafts of an MTP module bring where one request runs at a time; nothing for a model that has none.

    Returns:
        ``accepted``: share of the drafts; ``with_drafts`` and ``without``: tokens a second on this thread, medians of
        ``DRAFT_ROUNDS`` rounds, one after the other in each.
    """
    if not model.mtp:
        return {}
    speculation: tuple[SpeculationMode, SpeculationMode] = ("off", "mtp")
    engines = [Engine(model, tokenizer, max_batch=1, speculate=draft_mode) for draft_mode in speculation]
    prompts = _prompts(pipeline, SPEED_BATCH)
    rounds = [[_generation_speed(engine, prompts) for engine in engines] for _ in range(DRAFT_ROUNDS)]
    without, drafted = (statistics.median(speeds) for speeds in zip(*rounds, strict=True))
    stats = engines[1].core.speculation
    return {"accepted": stats.accepted / max(1, stats.drafted), "with_drafts": drafted, "without": without}


def _prompts(pipeline: Pipeline, count: int) -> list[list[Message]]:
    """Held-out questions, of one task after another."""
    data, split = pipeline.data_artifact, pipeline.recipe.eval.split
    problems = [data.task(config, split).problems for config in pipeline.recipe.data.tasks]
    interleaved = filter(None, itertools.chain.from_iterable(itertools.zip_longest(*problems)))
    return [problem_messages(problem) for problem in itertools.islice(interleaved, count)]


def _generation_speed(engine: Engine, prompts: list[list[Message]]) -> float:
    """Tokens a second of greedy answers with thinking."""
    started = time.perf_counter()
    outputs = engine.generate(prompts, Sampling(temperature=0.0, max_tokens=64, thinking=True))
    return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - started)

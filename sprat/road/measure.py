"""What a stage is worth: the same held-out problems for every stage, answered greedily.

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
from sprat.model import Transformer
from sprat.post.evaluate import Score, evaluate_many, problem_messages, two_proportion_p_value
from sprat.road.places import Road
from sprat.tasks import is_right
from sprat.tokens import Message, Tokenizer
from sprat.tokens.chat import render

WAYS: dict[str, tuple[bool | None, float]] = {  # thinking, temperature
    "greedy": (None, 0.0),
    "sampled": (None, 1.0),
    "thinking": (True, 0.0),
    "direct": (False, 0.0),
}
SPEED_BATCH = 16  # requests at once when tokens a second are measured
ROUNDS = 7  # with and without drafts


def check(
    road: Road, model: Transformer, tokenizer: Tokenizer, *, rows: int = 0, answer: int = 0, unseen: bool = False
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
    recipe, context = road.recipe, model.config.context
    if rows > context:
        what, todo = f"rows of {rows} tokens exceed the model's context of {context}", "train on shorter rows"
        raise ConfigError(what, where="seq_len", todo=todo)
    asks = (*recipe.data.tasks, *(recipe.data.unseen if unseen else ()))
    problems = [road.artefacts.task(config, recipe.eval.split).kept for config in asks]
    asked = max(
        len(render(tokenizer, problem_messages(problem), thinking=False)) for kept in problems for problem in kept
    )
    limit, key = max((recipe.eval.max_tokens, "eval.max_tokens"), (answer, "rl.rl.max_tokens"))
    if asked + limit > context:
        what = f"a question of {asked} tokens and an answer of {limit} exceed the model's context of {context}"
        raise ConfigError(what, where=key, todo="lower it, or make a model of a longer context")


def scores(
    road: Road, model: Transformer, tokenizer: Tokenizer, ways: Sequence[str] = ("greedy",), *, unseen: bool = False
) -> list[dict[str, Any]]:
    """Score ``model`` on every task of the mix (and the never-trained ones) in each of ``ways``.

    Returns:
        One row for each task and way, as the report reads it.
    """
    recipe = road.recipe
    engine = Engine(model, tokenizer, max_batch=recipe.eval.batch)
    configs = [(c, c.weight > 0) for c in recipe.data.tasks] + [(c, False) for c in recipe.data.unseen if unseen]
    tasks = [road.artefacts.task(config, recipe.eval.split) for config, _ in configs]
    most, rows = max(len(task.kept) for task in tasks), []
    for way in ways:
        thinking, temperature = WAYS[way]
        found = evaluate_many(
            engine,
            tasks,
            count=most if way == "greedy" else min(most, recipe.eval.side_problems),
            thinking=thinking,
            temperature=temperature,
            max_tokens=recipe.eval.max_tokens,
            samples=recipe.eval.samples,
            split=recipe.eval.split,
        )
        for score, (_, trained) in zip(found, configs, strict=True):
            rows.append({**_facts(score), "label": way, "trained": trained})
    return rows


def _facts(score: Score) -> dict[str, Any]:
    """A score as the report reads it."""
    samples = [
        {
            "question": sample["question"],
            "answer": sample["expected"],
            "reasoning": sample["reasoning"] or "",
            "content": sample["answer"],
            "correct": is_right(sample["score"]),
        }
        for sample in score.samples
    ]
    return {**score.to_dict(), "samples": samples}


def gains(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], label: str = "greedy"
) -> list[dict[str, Any]]:
    """For each task the change of accuracy between two stages and its p-value (two proportions)."""
    old = {row["task"]: row for row in before if row["label"] == label}
    return [
        {
            "task": row["task"],
            "before": old[row["task"]]["accuracy"],
            "after": row["accuracy"],
            "p": two_proportion_p_value(_score(old[row["task"]]), _score(row)),
        }
        for row in after
        if row["label"] == label and row["task"] in old
    ]


def _score(row: dict[str, Any]) -> Score:
    names = ("task", "count", "correct", "mean", "low", "high", "mean_tokens")
    return Score(**{name: row[name] for name in names})


def speed(road: Road, model: Transformer, tokenizer: Tokenizer) -> float:
    """Tokens a second of greedy generation, ``SPEED_BATCH`` requests at once, on this thread."""
    return _speed(Engine(model, tokenizer, max_batch=SPEED_BATCH), _prompts(road, 4 * SPEED_BATCH))


def drafts(road: Road, model: Transformer, tokenizer: Tokenizer) -> dict[str, float]:
    """What the drafts of an MTP module bring where one request runs at a time; nothing for a model that has none.

    Returns:
        ``accepted``: share of the drafts; ``with_drafts`` and ``without``: tokens a second on this thread, medians of
        ``ROUNDS`` rounds, one after the other in each.
    """
    if not model.mtp:
        return {}
    ways: tuple[SpeculationMode, SpeculationMode] = ("off", "mtp")
    engines = [Engine(model, tokenizer, max_batch=1, speculate=way) for way in ways]
    prompts = _prompts(road, SPEED_BATCH)
    rounds = [[_speed(engine, prompts) for engine in engines] for _ in range(ROUNDS)]
    without, drafted = (statistics.median(speeds) for speeds in zip(*rounds, strict=True))
    told = engines[1].core.speculation
    return {"accepted": told.accepted / max(1, told.drafted), "with_drafts": drafted, "without": without}


def _prompts(road: Road, count: int) -> list[list[Message]]:
    """Held-out questions, of one task after another."""
    kept = [road.artefacts.task(config, road.recipe.eval.split).kept for config in road.recipe.data.tasks]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*kept))
    return [problem_messages(problem) for problem in itertools.islice((one for one in turns if one is not None), count)]


def _speed(engine: Engine, prompts: list[list[Message]]) -> float:
    """Tokens a second of greedy answers with thinking."""
    began = time.perf_counter()
    outputs = engine.generate(prompts, Sampling(temperature=0.0, max_tokens=64, thinking=True))
    return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - began)

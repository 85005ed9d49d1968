"""Supervised fine-tuning: demonstrations become packed, masked batches; the training loop does the rest.

Only the assistant's tokens carry loss (``tokens.chat.demonstration`` sets the mask), because the model shall
learn to answer questions, not to write them. ``cold_start`` makes the mostly terse demonstrations from which
RL starts (DeepSeek-R1, arXiv 2501.12948): they teach the format and leave the habit of thinking rare, so that what RL
adds can be seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sprat.config import SFTConfig, TrainConfig
from sprat.data import loader, pack
from sprat.errors import DataError
from sprat.model import Transformer
from sprat.tasks import Problem, Task
from sprat.tokens import Tokenizer, chat
from sprat.train import loop
from sprat.trust.run import Run

_INDICES = 1 << 31


class Demonstration(NamedTuple):
    """One worked answer; an empty ``reasoning`` is a terse one."""

    question: str
    reasoning: str
    answer: str


def draw(tasks: Sequence[Task], weights: Sequence[float], count: int, key: str) -> list[tuple[Task, Problem]]:
    """``count`` training problems, tasks chosen by weight; a pure function of ``key``.

    Raises:
        DataError: no task, or weights that do not fit the tasks.
    """
    if not tasks or len(tasks) != len(weights) or min(weights) < 0 or sum(weights) <= 0:
        what = f"{len(tasks)} tasks with weights {list(weights)}"
        raise DataError(what, where="tasks", todo="give each task one weight, at least one above 0")
    rng = random.Random(key)
    chosen = rng.choices(list(tasks), weights=list(weights), k=count)
    return [(task, task.problem("train", rng.randrange(_INDICES))) for task in chosen]


def cold_start(
    tasks: Sequence[Task], weights: Sequence[float], *, count: int, terse_fraction: float, seed: int
) -> list[Demonstration]:
    """Demonstrations by the tasks' own explanations; each is terse with chance ``terse_fraction``."""
    rng = random.Random(f"terse/{seed}")
    return [
        Demonstration(problem.question, "" if rng.random() < terse_fraction else task.explain(problem), problem.answer)
        for task, problem in draw(tasks, weights, count, f"cold-start/{seed}")
    ]


def pack_demonstrations(
    tokenizer: Tokenizer, demonstrations: Sequence[tuple[str, str, str]], seq_len: int
) -> pack.Packed:
    """The demonstrations as packed rows of ``seq_len`` tokens.

    Raises:
        DataError: there are none, or one is longer than a row (cutting it would teach half an answer).
    """
    if not demonstrations:
        raise DataError("no demonstrations", where="sft", todo="give at least one (question, reasoning, answer)")
    return pack.pack(_sequences(tokenizer, demonstrations, seq_len), seq_len)


def batches(
    tokenizer: Tokenizer, demonstrations: Sequence[tuple[str, str, str]], config: TrainConfig
) -> loader.MixedSource:
    """The demonstrations as a resumable source of packed batches, rows of ``config.seq_len`` tokens.

    Raises:
        DataError: see ``pack_demonstrations``.
    """
    packed = pack_demonstrations(tokenizer, demonstrations, config.seq_len)
    return loader.MixedSource([(packed, 1.0)], rows=config.batch_rows, seed=config.seed)


def sft(
    model: Transformer,
    tokenizer: Tokenizer,
    demonstrations: Sequence[tuple[str, str, str]],
    config: SFTConfig | TrainConfig,
    run: Run,
) -> loop.TrainResult:
    """Train ``model`` in place on (question, reasoning, answer) triples; resumes from the run's checkpoints.

    Raises:
        DataError: see ``batches``.
        TrainingError: the loss is not finite.
    """
    return loop.train(model, batches(tokenizer, demonstrations, config), config, run)


def _sequences(
    tokenizer: Tokenizer, demonstrations: Sequence[tuple[str, str, str]], seq_len: int
) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, mask) of each demonstration."""
    for number, (question, reasoning, answer) in enumerate(demonstrations):
        ids, mask = chat.demonstration(tokenizer, question, reasoning, answer)
        if len(ids) > seq_len + 1:
            what = f"a demonstration has {len(ids)} tokens, a row holds {seq_len + 1}"
            raise DataError(what, where=f"demonstration {number}", todo="raise seq_len or leave it out")
        yield list(ids), list(mask)

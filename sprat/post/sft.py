"""Supervised fine-tuning: demonstrations become packed, masked batches; the training loop does the rest.

Only the assistant's tokens carry loss (``tokens.chat.encode_demonstration`` sets the mask), because the model shall
learn to answer questions, not to write them. ``sample_demonstrations`` gives the tasks' own worked examples, as R1's
cold start teaches a model to think before it answers (DeepSeek-R1, arXiv 2501.12948, section 2.3.1).

A demonstration that is longer than a row is left out and counted: cut at its end it would teach half an answer, cut at
its beginning an answer to half a question. The router's bias stays where pre-training left it, as in RL: a narrow mix
of questions would spread over all experts what was balanced on all text.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import NamedTuple

from sprat.config import SFTConfig, TrainConfig
from sprat.data import loader, pack
from sprat.errors import DataError
from sprat.model import Transformer
from sprat.tasks import Problem, Task
from sprat.tokens import Tokenizer, chat
from sprat.train import loop
from sprat.trust.run import Run

log = logging.getLogger(__name__)
_NUM_TRAIN_INDICES = 1 << 31


class Demonstration(NamedTuple):
    """One worked answer; an empty ``reasoning`` is a terse one."""

    question: str
    reasoning: str
    answer: str


def sample_problems(
    tasks: Sequence[Task], weights: Sequence[float], count: int, key: str
) -> list[tuple[Task, Problem]]:
    """``count`` training problems, tasks chosen by weight; a pure function of ``key``.

    Raises:
        DataError: no task, or weights that do not fit the tasks.
    """
    if not tasks or len(tasks) != len(weights) or min(weights) < 0 or sum(weights) <= 0:
        what = f"{len(tasks)} tasks with weights {list(weights)}"
        raise DataError(what, where="tasks", todo="give each task one weight, at least one above 0")
    rng = random.Random(key)
    chosen = rng.choices(list(tasks), weights=list(weights), k=count)
    return [(task, task.problem("train", rng.randrange(_NUM_TRAIN_INDICES))) for task in chosen]


def sample_demonstrations(
    tasks: Sequence[Task], weights: Sequence[float], *, count: int, terse_fraction: float, seed: int
) -> list[Demonstration]:
    """Demonstrations by the tasks' own explanations; each is terse with chance ``terse_fraction``."""
    rng = random.Random(f"terse/{seed}")
    demonstrations = []
    for task, problem in sample_problems(tasks, weights, count, f"demonstrations/{seed}"):
        reasoning = "" if rng.random() < terse_fraction else task.chain_of_thought(problem)
        demonstrations.append(Demonstration(problem.question, reasoning, problem.answer))
    return demonstrations


def pack_demonstrations(
    tokenizer: Tokenizer, demonstrations: Sequence[tuple[str, str, str]], seq_len: int
) -> tuple[pack.PackedDataset, dict[str, int]]:
    """The demonstrations as packed rows of ``seq_len`` tokens, and the numbers of ``shown`` and ``too_long`` ones.

    Raises:
        DataError: there are none, or none is as short as a row.
    """
    if not demonstrations:
        raise DataError("no demonstrations", where="sft", todo="give at least one (question, reasoning, answer)")
    sequences = [chat.encode_demonstration(tokenizer, *demonstration) for demonstration in demonstrations]
    fitting = [(ids, mask) for ids, mask in sequences if len(ids) <= seq_len + 1]
    if not fitting:
        shortest = min(len(ids) for ids, _ in sequences)
        what = f"the shortest of {len(sequences)} demonstrations has {shortest} tokens, a row holds {seq_len + 1}"
        raise DataError(what, where="sft", todo="raise seq_len")
    if num_too_long := len(sequences) - len(fitting):
        message = "%s of %s demonstrations are longer than a row of %s tokens and are left out"
        log.warning(message, f"{num_too_long:,}", f"{len(sequences):,}", seq_len + 1)
    return pack.pack(fitting, seq_len), {"shown": len(fitting), "too_long": num_too_long}


def build_source(
    tokenizer: Tokenizer, demonstrations: Sequence[tuple[str, str, str]], config: TrainConfig, run: Run | None = None
) -> loader.MixedBatchSource:
    """The demonstrations as a resumable source of packed batches, rows of ``config.seq_len`` tokens.

    ``run`` notes as its fact ``demonstrations`` what was shown and what was left out.

    Raises:
        DataError: see ``pack_demonstrations``.
    """
    packed, counts = pack_demonstrations(tokenizer, demonstrations, config.seq_len)
    if run is not None:
        run.add_facts(demonstrations=counts)
    return loader.MixedBatchSource([(packed, 1.0)], rows=config.batch_rows, seed=config.seed)


def sft(
    model: Transformer,
    tokenizer: Tokenizer,
    demonstrations: Sequence[tuple[str, str, str]],
    config: SFTConfig | TrainConfig,
    run: Run,
) -> loop.TrainResult:
    """Train ``model`` in place on (question, reasoning, answer) triples; resumes from the run's checkpoints.

    The router's bias is not moved, whatever ``config.bias_update_speed`` says.

    Raises:
        DataError: see ``pack_demonstrations``.
        TrainingError: the loss is not finite.
    """
    source = build_source(tokenizer, demonstrations, config, run)
    return loop.train(model, source, config.replace(bias_update_speed=0.0), run)

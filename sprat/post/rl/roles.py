"""A run of ``sprat rl MODEL`` with roles: what the orchestrator hands to trainer and workers, and what it keeps.

The parent has prepared everything, so that whatever is wrong was said before anything was touched. It keeps questions
and verifier, hands the rest on as names of files, and forgets the model: the trainer prepares its own.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sprat.config.rl import RLRunConfig
from sprat.formats.load import load_dense
from sprat.post.rl.ledger import LEDGER_FILE
from sprat.post.rl.orchestrator import Commands, Orchestrator
from sprat.post.rl.problem_asker import ProblemAsker
from sprat.post.rl.questions import Questions
from sprat.post.rl.run_preparation import Prepared, prepare
from sprat.train import checkpoint
from sprat.trust.run import Run


def keep_questions(run: Run, ready: Prepared, config: RLRunConfig) -> ProblemAsker:
    """What the parent needs of ``ready``; whoever holds no more of it lets the memory of the model go."""
    run.add_facts(**ready.facts)
    return ProblemAsker(ready.mix, ready.payer, config)


def train_with_roles(
    run: Run,
    asker: ProblemAsker,
    questions: Questions,
    config: RLRunConfig,
    model: Mapping[str, Any],
    start: int,
    first_group: int,
    *,
    commands: Commands | None = None,
) -> None:
    """Train in processes of their own, until the run is finished.

    Args:
        config: the run's, as it was asked for.
        model: its ``name``, ``path`` and whether to ``dequantize`` it.
        start: the step after which training starts.
        first_group: of the step after that.
        commands: how the roles are started.

    Raises:
        SpratError, KeyboardInterrupt: see ``Orchestrator.work``.
    """
    gc.collect()  # the model that the parent was prepared with
    job = {"model": str(model["path"]), "name": model["name"], "dequantize": model["dequantize"]}
    job |= {"questions": _pack(questions), "reward_name": questions.judge}
    roles = Orchestrator(run, config, asker, job, start=start, first_group=first_group, commands=commands)
    done = roles.work()
    run.ledger.add_file(run.folder / LEDGER_FILE)
    run.finish(**done)


def _pack(questions: Questions) -> dict[str, Any]:
    table = asdict(questions)
    return table | {"data": None if questions.data is None else str(questions.data), "tasks": list(questions.tasks)}


@contextmanager
def preparation(job: Mapping[str, Any], config: RLRunConfig, run: Run) -> Iterator[Prepared]:
    """What the trainer needs, prepared anew in its process.

    Raises:
        SpratError: see ``prepare``.
    """
    table = job["questions"]
    data, tasks = table["data"], tuple(table["tasks"])
    questions = Questions(**table | {"data": None if data is None else Path(data), "tasks": tasks})
    start = None
    if config.init_from:
        expected_digest = run.identity["inputs"]["init_from"]["digest"]
        start = checkpoint.find_start(config.init_from, run.folder, expected_digest)
    load_model = partial(load_dense, job["model"], dequantize=job["dequantize"])
    ready = prepare(load_model, questions, config, start, asks_gate=False, on_news=tell)
    try:
        yield ready
    finally:
        for pool in ready.pools:
            pool.close()


def tell(text: str) -> None:
    """Say something to a person at the terminal of the run."""
    print(f"sprat: {text}", file=sys.stderr, flush=True)

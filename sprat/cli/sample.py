"""``sprat sample``: a model's own right answers to the user's questions, as examples for ``sprat sft``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sprat.cli.progress import progress_bar
from sprat.cli.rl import Data, Map, Reward, Task
from sprat.cli.verb import ModelFolder, Overrides, Result
from sprat.errors import ConfigError

Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run to write.")]
_MIX_HELP = "Conversations of other kinds, of which some are added: a file as `sprat sft` reads it."
Mix = Annotated[Path | None, typer.Option("--mix", metavar="FILE", help=_MIX_HELP)]


def sample(
    model: ModelFolder,
    task: Task = None,
    data: Data = None,
    reward: Reward = None,
    out: Out = None,
    map_columns: Map = None,
    mix: Mix = None,
    overrides: Overrides = None,
) -> Result:
    """Rejection sampling: ask MODEL your training questions, and keep what your verifier pays as examples for SFT.

    Example: sprat sample smol --data problems.jsonl --reward judge.py:reward --out runs/answers
    """
    if out is None:
        raise ConfigError("--out is missing", where="sample", todo="give it: --out PATH")

    from sprat.config import parse
    from sprat.config.sample import SampleConfig
    from sprat.data.conversations import parse_column_map
    from sprat.post.rl.questions import Questions
    from sprat.post.rl.rejection import sample_examples

    config = parse(SampleConfig, {}, where="sample", overrides=overrides or ())
    column_map = parse_column_map(",".join(map_columns)) if map_columns else None
    questions = Questions(data, tuple(task or ()), reward or "", "", column_map)
    with progress_bar("questions") as on_progress:
        run = sample_examples(model, questions, out, config, mix=mix, on_progress=on_progress)
    facts: dict[str, Any] = run.facts
    lines = [
        f"{run.folder}: {facts['kept']} of {facts['answers']} answers kept, to {facts['answered']} of "
        f"{facts['questions']} questions",
        *(f"  {count} {reason}" for reason, count in facts["rejected"].items()),
        *([f"  and {facts['mixed']} general examples"] if facts["mixed"] else []),
        f"learn them: sprat sft {model} --data {run.folder} --out …",
    ]
    return Result({"run": str(run.folder), "model": str(model), **run.record}, "\n".join(lines))

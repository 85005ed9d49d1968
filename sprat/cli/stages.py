"""One verb for each stage of the pipeline. Each works on the pipeline's folder and goes on where it was.

The verbs run the very functions that ``sprat quickstart`` runs, one at a time: ``sprat data``, ``sprat train``,
``sprat sft``, ``sprat rl``, ``sprat distill`` and ``sprat quantize`` on one ``--out`` are the pipeline by hand.
``sft`` and ``quantize`` of any MODEL have files of their own.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sprat.cli.progress import stage_progress
from sprat.cli.verb import Overrides, PipelineFolder, Recipe, Result

if TYPE_CHECKING:
    from sprat.pipeline.pipeline import Pipeline

_TEXT_HELP = "Your own text: a folder, .jsonl or .parquet."
Text = Annotated[Path | None, typer.Option("--text", metavar="DIR", help=_TEXT_HELP)]
_INIT_FROM_HELP = "Go on from the checkpoint that this run kept, or has."
InitFrom = Annotated[str | None, typer.Option("--init-from", metavar="RUN[@STEP]", help=_INIT_FROM_HELP)]
_TASK_HELP = "A task of the recipe; repeat for more; else all."
DEFAULT_OUT = Path("runs/quickstart")


def data(
    out: PipelineFolder = DEFAULT_OUT, text: Text = None, recipe: Recipe = "quickstart", overrides: Overrides = None
) -> Result:
    """Text and tasks become a tokenizer, packed rows and held-out sets."""
    return _run_stage("data", out, recipe, overrides, text)


def train(
    out: PipelineFolder = DEFAULT_OUT,
    init_from: InitFrom = None,
    recipe: Recipe = "quickstart",
    overrides: Overrides = None,
) -> Result:
    """Pre-train the model on what `sprat data` made."""
    return _run_stage("pretrain", out, recipe, overrides, init_from=init_from)


def sft(
    out: PipelineFolder = DEFAULT_OUT,
    init_from: InitFrom = None,
    recipe: Recipe = "quickstart",
    overrides: Overrides = None,
) -> Result:
    """Fine-tune the pre-trained model on demonstrations that show their thinking."""
    return _run_stage("sft", out, recipe, overrides, init_from=init_from)


def rl(
    out: PipelineFolder = DEFAULT_OUT,
    init_from: InitFrom = None,
    recipe: Recipe = "quickstart",
    overrides: Overrides = None,
) -> Result:
    """Reinforcement learning with rule rewards (GRPO), with the first of the recipe's rl.seeds."""
    return _run_stage("rl", out, recipe, overrides, init_from=init_from)


def distill(
    out: PipelineFolder = DEFAULT_OUT,
    init_from: InitFrom = None,
    recipe: Recipe = "quickstart",
    overrides: Overrides = None,
) -> Result:
    """Teach a small student from the RL teacher's verified answers and its distributions."""
    return _run_stage("distill", out, recipe, overrides, init_from=init_from)


def quantize(out: Path, recipe: str, overrides: Overrides) -> Result:
    """The station of a road behind ``sprat quantize``: the student in INT4, and what that costs."""
    return _run_stage("quantize", out, recipe, overrides)


def _run_stage(
    stage_name: str, out: Path, recipe: str, overrides: Overrides, text: Text = None, init_from: InitFrom = None
) -> Result:
    """Run one stage as the quickstart would: in a process of its own, with one thread, so that digests agree."""
    from sprat.files.lock import lock_folder
    from sprat.pipeline.executor import LocalExecutor
    from sprat.pipeline.graph import run_stages
    from sprat.pipeline.pipeline import Pipeline
    from sprat.pipeline.quickstart import build_stages, check_folder
    from sprat.pipeline.recipe import load_recipe

    check_folder(out)
    start = () if init_from is None else (f"{stage_name}.init_from={json.dumps(init_from)}",)
    pipeline = Pipeline(out, load_recipe(recipe, (*(overrides or ()), *start)))
    first = next(stage for stage in build_stages(pipeline, text) if stage.name.startswith(stage_name))
    with lock_folder(out), stage_progress(out) as on_progress, LocalExecutor(1) as executor:
        run_stages([replace(first, depends_on=())], executor, 1, on_progress)
    return _run_summary(pipeline, first.name)


def _run_summary(pipeline: Pipeline, name: str) -> Result:
    """What ``run.json`` of the finished run ``name`` says, in short."""
    folder = pipeline.run_folder(name)
    record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    facts = ("stage", "artefact_digest", "tokens", "flops", "device_seconds", "nano_yuan", "facts")
    human = (
        f"{folder}: {record['stage']} done, {record['tokens']:,} tokens, {record['device_seconds']:.0f} CPU-s, "
        f"digest {record['artefact_digest'][:12]}"
    )
    return Result({"run": str(folder), **{fact: record[fact] for fact in facts}}, human)

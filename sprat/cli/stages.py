"""One verb for each stage of the pipeline. Each works on the pipeline's folder and goes on where it was.

The verbs run the very functions that ``sprat quickstart`` runs, one at a time: ``sprat data``, ``sprat train``,
``sprat sft``, ``sprat rl``, ``sprat distill`` and ``sprat quantize`` on one ``--out`` are the pipeline by hand.
``sprat quantize MODEL`` squeezes any model.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sprat.cli.progress import progress_bar, stage_progress
from sprat.cli.verb import Overrides, PipelineFolder, Recipe, Result
from sprat.errors import ConfigError

if TYPE_CHECKING:
    from sprat.pipeline.pipeline import Pipeline

_TEXT_HELP = "Your own text: a folder, .jsonl or .parquet."
Text = Annotated[Path | None, typer.Option("--text", metavar="DIR", help=_TEXT_HELP)]
_INIT_FROM_HELP = "Go on from the checkpoint that this run kept, or has."
InitFrom = Annotated[str | None, typer.Option("--init-from", metavar="RUN[@STEP]", help=_INIT_FROM_HELP)]
_CALIBRATE_HELP = "Fit MODEL's codes to this folder or file of text (GPTQ)."
_QUANTIZE_RECIPE_HELP = "A TOML file, or a built-in recipe's name; else quickstart."
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


def quantize(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="Any model that `sprat run` takes; left out: the road's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The road; with MODEL, the folder to write.")
    ] = None,
    calibrate: Annotated[Path | None, typer.Option("--calibrate", metavar="TEXT", help=_CALIBRATE_HELP)] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="FILE", help=_QUANTIZE_RECIPE_HELP)] = None,
    overrides: Overrides = None,
) -> Result:
    """Squeeze weights to INT4: the student's of a road, measuring what that costs, or those of any MODEL."""
    if model is None:
        if calibrate is not None:
            todo = "leave it out and --set quant.rounding=gptq: a road has its own text"
            raise ConfigError("a road takes no text here", where="--calibrate", todo=todo)
        return _run_stage("quantize", out or DEFAULT_OUT, recipe or "quickstart", overrides)
    if out is None:
        raise ConfigError("no folder to write to", where="--out", todo="give one")
    from sprat.config.base import override
    from sprat.pipeline.quantize import quantize_model
    from sprat.pipeline.recipe import load_recipe

    quant_recipe = load_recipe(recipe or "quickstart", tuple(overrides or ())).quant
    requested_rounding = override({}, overrides or ()).get("quant", {}).get("rounding")
    if requested_rounding == "nearest" and calibrate is not None:
        todo = "leave out one of the two: --calibrate is for gptq"
        raise ConfigError("quant.rounding=nearest takes no text", where="--set", todo=todo)
    if calibrate is None and quant_recipe.rounding == "gptq" and (requested_rounding or recipe):
        todo = "give --calibrate TEXT, or --set quant.rounding=nearest"
        where = "--set" if requested_rounding else f"{recipe}"
        raise ConfigError("quant.rounding=gptq needs text", where=where, todo=todo)
    quant_recipe = quant_recipe.replace(rounding="nearest" if calibrate is None else "gptq")
    with progress_bar("quantise") as on_progress:
        facts = quantize_model(model, out, quant_recipe, calibrate, on_progress=on_progress)
    human = f"{out}: {facts['size_bytes'] / 1e6:.1f} MB, {facts['dense_bytes'] / facts['size_bytes']:.1f} times smaller"
    return Result({"model": str(out), **quant_recipe.model_dump(), **facts}, human)


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

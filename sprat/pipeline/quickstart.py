"""The pipeline in one command, top to bottom.

    data ──┬─ pretrain ──┬─ rl (seed 0) ── distill ── quantize
           │             ├─ rl (seeds 1, 2)                      (is RL luck?)
           │             └─ sft, rft, pretrain-more              (controls of RL)
           ├─ pretrain-dense                                     (control of the experts)
           └─ student-scratch                                    (control of distillation)

RL starts from the pre-trained model itself, as R1-Zero did; with ``rl.start = "sft"`` it starts after SFT.
Every stage is a run with its folder; a stage that is finished is not run again, so starting the same
pipeline again goes on where it was.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from sprat.config.recipe import PipelineRecipe
from sprat.errors import ConfigError, MachineError
from sprat.files import atomic
from sprat.files.lock import lock_folder
from sprat.pipeline import controls, data, quantize, training
from sprat.pipeline.executor import LocalExecutor
from sprat.pipeline.graph import OnProgress, Stage, run_stages
from sprat.pipeline.pipeline import Pipeline, load_task
from sprat.post.rl.rewards import load_reward
from sprat.report import write_report

NESTED_TABLE = re.compile(r"^\[(train|distill)\]$", re.MULTILINE)  # of runs before tables were flat
MIN_FREE_BYTES = 300_000_000  # free disk that a pipeline wants
SERVED_RUN = "quantize"  # the run whose model is served at the end


def build_stages(pipeline: Pipeline, text: Path | None = None) -> list[Stage]:
    """The stages of ``pipeline``, the critical path first."""
    recipe = pipeline.recipe
    start, teacher = recipe.rl.start, f"rl-seed{recipe.rl.seeds[0]}"
    sft_stage = [Stage("sft", training.sft, (pipeline,), ("pretrain",))]
    graph = [
        Stage("data", data.data, (pipeline, text)),
        Stage("pretrain", training.pretrain, (pipeline,), ("data",)),
        *(sft_stage if start == "sft" else ()),
        Stage(teacher, training.rl, (pipeline, recipe.rl.seeds[0]), (start,)),
        Stage("distill", training.distill, (pipeline,), (teacher,)),
        Stage("quantize", quantize.quantize, (pipeline,), ("distill",)),
    ]
    graph += [Stage(dense.run, training.pretrain, (pipeline, dense), ("data",)) for dense in recipe.dense]
    graph.append(Stage("student-scratch", controls.student_scratch, (pipeline,), ("data",)))
    graph += [Stage(f"rl-seed{seed}", training.rl, (pipeline, seed), (start,)) for seed in recipe.rl.seeds[1:]]
    if recipe.controls is not None:
        graph += sft_stage if start == "pretrain" else ()
        graph.append(Stage("rft", controls.rft, (pipeline,), (start,)))
        graph.append(Stage("pretrain-more", controls.pretrain_more, (pipeline,), (start,)))
        if recipe.controls.student_examples is not None:
            graph.append(Stage("student-examples", controls.student_examples, (pipeline,), ("data",)))
    return graph


def quickstart(
    out: Path, recipe: PipelineRecipe, *, text: Path | None = None, on_progress: OnProgress = lambda *_: None
) -> Path:
    """Go the whole pipeline in the folder ``out``; returns its ``report.html``.

    Args:
        out: made when missing; a pipeline that was interrupted goes on.
        recipe: see ``sprat.pipeline.recipe.load_recipe``.
        text: the user's own folder of text instead of the default corpus.
        on_progress: hears ``(stage, "starts", "runs" or "done", seconds)``.

    Raises:
        SpratError: bad input, a full disk, a second quickstart in the same folder, a stage that failed.
    """
    check_folder(out)
    check_recipe(recipe)
    with lock_folder(out):
        pipeline = Pipeline(out, recipe)
        atomic.write_text(out / "recipe.toml", recipe.to_toml())
        pipeline.add_file("recipe.toml")
        stages = build_stages(pipeline, text)
        jobs = min(recipe.jobs, len(stages))
        with LocalExecutor(jobs) as executor:
            run_stages(stages, executor, jobs, on_progress)
        return write_report(out)


def check_recipe(recipe: PipelineRecipe) -> None:
    """Find what a stage would stumble over hours later: a task or a reward that cannot be made.

    Raises:
        ConfigError, DataError: one of them.
    """
    for config in (*recipe.data.tasks, *recipe.data.unseen):
        load_task(config)
    if recipe.rl.reward:
        load_reward(recipe.rl.reward)


def check_folder(out: Path) -> None:
    """Refuse a folder in which no stage can run or go on, before anything is written.

    Raises:
        MachineError: the disk is too full, or ``out`` is a file.
        ConfigError: a run in it has its recipe in nested tables, as they were: it would be set aside and made anew.
    """
    existing = out
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise MachineError("the output folder is a file", where=str(out), todo="give another folder")
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        todo = f"free {MIN_FREE_BYTES // 1_000_000} MB or give another folder"
        raise MachineError(f"only {free // 1_000_000} MB of disk are free", where=str(out), todo=todo)
    for path in sorted(out.glob("*/recipe.toml")):
        is_run = path.is_file() and any((path.parent / name).is_file() for name in ("run.json", "open.json"))
        nested = NESTED_TABLE.search(path.read_text(encoding="utf-8", errors="replace")) if is_run else None
        if nested and ".old-" not in path.parent.name:
            what = f"the recipe of this run has the table {nested[0]}, as before tables were flat"
            todo = "give another --out (verify, report, run, serve and --init-from still read this one)"
            raise ConfigError(what, where=str(path), todo=todo)

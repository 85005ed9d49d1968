"""The road in one command, top to bottom.

    data ──┬─ pretrain ──┬─ rl (seed 0) ── distill ── quantize
           │             ├─ rl (seeds 1, 2)                      (is RL luck?)
           │             └─ sft, rft, pretrain-more              (controls of RL)
           ├─ pretrain-dense                                     (control of the experts)
           └─ student-scratch                                    (control of distillation)

RL starts from the pre-trained model itself, as R1-Zero did; with ``rl.start = "sft"`` it starts after SFT.
Every stage is a run with its folder; a stage that is finished is not run again, so starting the same
road again goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from sprat.errors import MachineError
from sprat.post.rewards import load_reward
from sprat.report import write
from sprat.road import controls, data, squeeze, training
from sprat.road.graph import Stage, run_all
from sprat.road.places import Road, load_task
from sprat.road.recipe import RoadRecipe
from sprat.trust import atomic
from sprat.trust.lock import hold

Told = Callable[[str, str, float], None]
NEEDED_BYTES = 300_000_000  # free disk that a road wants
SERVED = "quantize"  # the run whose model is served at the end


def stages(road: Road, text: Path | None = None) -> list[Stage]:
    """The stages of ``road``, the critical path first."""
    recipe = road.recipe
    start, first = recipe.rl.start, f"rl-seed{recipe.rl.seeds[0]}"
    tune = [Stage("sft", training.fine_tune, (road,), ("pretrain",))]
    found = [
        Stage("data", data.data, (road, text)),
        Stage("pretrain", training.pretrain, (road,), ("data",)),
        *(tune if start == "sft" else ()),
        Stage(first, training.reinforce, (road, recipe.rl.seeds[0]), (start,)),
        Stage("distill", training.student, (road,), (first,)),
        Stage("quantize", squeeze.squeeze, (road,), ("distill",)),
    ]
    found += [Stage(twin.run, training.pretrain, (road, twin), ("data",)) for twin in recipe.dense]
    found.append(Stage("student-scratch", controls.scratch, (road,), ("data",)))
    found += [Stage(f"rl-seed{seed}", training.reinforce, (road, seed), (start,)) for seed in recipe.rl.seeds[1:]]
    if recipe.controls is not None:
        found += tune if start == "pretrain" else ()
        found.append(Stage("rft", controls.rejection_sampling, (road,), (start,)))
        found.append(Stage("pretrain-more", controls.more_pretraining, (road,), (start,)))
        if recipe.controls.student_examples is not None:
            found.append(Stage("student-examples", controls.scratch_on_examples, (road,), ("data",)))
    return found


def quickstart(out: Path, recipe: RoadRecipe, *, text: Path | None = None, told: Told = lambda *_: None) -> Path:
    """Go the whole road in the folder ``out``; returns its ``report.html``.

    Args:
        out: made when missing; a road that was interrupted goes on.
        recipe: see ``sprat.road.recipe.named``.
        text: the user's own folder of text instead of the default corpus.
        told: hears ``(stage, "starts", "runs" or "done", seconds)``.

    Raises:
        SpratError: bad input, a full disk, a second quickstart in the same folder, a stage that failed.
    """
    check_machine(out)
    check_recipe(recipe)
    with hold(out):
        road = Road(out, recipe)
        atomic.write_text(out / "recipe.toml", recipe.to_toml())
        road.enter("recipe.toml")
        run_all(stages(road, text), recipe.jobs, told)
        return write(out)


def check_recipe(recipe: RoadRecipe) -> None:
    """Find what a stage would stumble over hours later: a task or a reward that cannot be made.

    Raises:
        ConfigError, DataError: one of them.
    """
    for config in (*recipe.data.tasks, *recipe.data.unseen):
        load_task(config)
    if recipe.rl.rl.reward:
        load_reward(recipe.rl.rl.reward)


def check_machine(out: Path) -> None:
    """Raise MachineError where the disk is too full or ``out`` is a file, before anything is written."""
    place = out
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise MachineError("the output folder is a file", where=str(out), todo="give another folder")
    free = shutil.disk_usage(place).free
    if free < NEEDED_BYTES:
        todo = f"free {NEEDED_BYTES // 1_000_000} MB or give another folder"
        raise MachineError(f"only {free // 1_000_000} MB of disk are free", where=str(out), todo=todo)


__all__ = ["SERVED", "check_machine", "quickstart", "stages"]

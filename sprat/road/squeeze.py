"""The last stage: the student in INT4, and what size and speed each model of the road has."""

from __future__ import annotations

from typing import Any

from sprat.engine import load, save
from sprat.quant import quantize
from sprat.road import measure
from sprat.road.places import Road
from sprat.road.training import finished


def squeeze(road: Road) -> None:
    """Quantise the distilled student and measure size, speed and loss of accuracy."""
    recipe = road.recipe.quant
    run = road.open("quantize", "quantize", recipe, {"model": road.path("distill"), "data": road.path("data")}, 0)
    if run.done:
        return
    student, tokenizer = load(road.path("distill"))
    small = quantize(student, recipe)
    save(small, tokenizer, run.artefact)
    rows = measure.scores(road, small, tokenizer, ("greedy", "thinking", "direct"))
    before = finished(road, "distill")["facts"]["scores"]
    teacher = f"rl-seed{road.recipe.rl.seeds[0]}"
    models = {}
    for name, folder in (("teacher", road.path(teacher)), ("student", road.path("distill")), ("int4", run.folder)):
        model, _ = load(folder)
        models[name] = {
            "size_bytes": sum(path.stat().st_size for path in (folder / "artefact").glob("*.safetensors")),
            "tokens_per_second": measure.speed(road, model, tokenizer),
        }
    run.note(
        title="Student in INT4",
        scores=rows,
        significance=measure.gains(before, rows),
        relative_loss=relative_loss(before, rows),
        models=models,
        parameters=finished(road, "distill")["facts"]["parameters"],
        **models["int4"],
    )
    run.finish()


def relative_loss(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, float]:
    """For each task asked greedily, the share of the student's accuracy that INT4 lost (negative: gained)."""
    old = {row["task"]: row["mean"] for row in before if row["label"] == "greedy"}
    new = {row["task"]: row["mean"] for row in after if row["label"] == "greedy"}
    return {task: (old[task] - new[task]) / old[task] for task in new if old.get(task)}

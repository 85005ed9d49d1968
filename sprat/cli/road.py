"""``sprat road``: stages of one's own, from one file, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sprat.cli.progress import stage_progress
from sprat.cli.verb import Result
from sprat.errors import ConfigError
from sprat.files.json import read_json

if TYPE_CHECKING:
    from sprat.pipeline.road import RoadStage

_FILE_HELP = "A TOML file of [[stages]] (docs/recipes.md), or a built-in road: zero, r1 (docs/rl.md)."
RoadFile = Annotated[Path, typer.Argument(metavar="FILE", help=_FILE_HELP)]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="The road: a folder with a run for each stage.")]
Only = Annotated[str, typer.Option("--only", metavar="NAME", help="Run this stage alone.")]
From = Annotated[str, typer.Option("--from", metavar="NAME", help="Run this stage, and what takes something from it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the file and say what would be done.")]
_JOBS_HELP = "Stages side by side, which share the cores; left out: as many as ever could."
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, max=1024, help=_JOBS_HELP)]
_MODEL_HELP = "The road's model: any that `sprat run` takes."
Model = Annotated[str | None, typer.Option("--model", metavar="MODEL", help=_MODEL_HELP)]
_DATA_HELP = "The road's questions: .jsonl, .json, .csv, .tsv or .parquet, or a folder of them."
Data = Annotated[str | None, typer.Option("--data", metavar="FILE", help=_DATA_HELP)]
_REWARD_HELP = "Its verifier: file.py:function, or a command."
Reward = Annotated[str | None, typer.Option("--reward", metavar="NAME", help=_REWARD_HELP)]
_LORA_HELP = "Train adapters of this rank in every stage."
Lora = Annotated[int | None, typer.Option("--lora", metavar="RANK", min=1, help=_LORA_HELP)]
_EXAMPLES_HELP = "r1's cold start: conversations that show long thoughts."
Examples = Annotated[str | None, typer.Option("--examples", metavar="FILE", help=_EXAMPLES_HELP)]
_TEACHER_HELP = "Whose thoughts are r1's cold start where there are no --examples; left out: the model itself."
Teacher = Annotated[str | None, typer.Option("--teacher", metavar="MODEL", help=_TEACHER_HELP)]
_GENERAL_HELP = "Conversations of other kinds that r1 mixes with right answers."
General = Annotated[str | None, typer.Option("--general", metavar="FILE", help=_GENERAL_HELP)]
_SET_HELP = "Change one key: STAGE.KEY=VALUE, or KEY=VALUE in every stage that has it; may be repeated."
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=_SET_HELP)]


def road(
    file: RoadFile,
    out: Out,
    model: Model = None,
    data: Data = None,
    reward: Reward = None,
    lora: Lora = None,
    examples: Examples = None,
    teacher: Teacher = None,
    general: General = None,
    only: Only = "",
    start: From = "",
    dry_run: DryRun = False,
    jobs: Jobs = None,
    overrides: Changes = None,
) -> Result:
    """Go a road: each stage of FILE is a run in DIR; the same line again goes on where it was.

    Example: sprat road mine.toml --out runs/mine

    Example: sprat road zero --model smol --data problems.jsonl --reward judge.py:reward --out runs/zero
    """
    from sprat.pipeline.road import open_road, read_road, select, states
    from sprat.pipeline.road import road as run_road
    from sprat.pipeline.road_checks import check_inputs
    from sprat.report.held_out_scores import held_out_scores

    if only and start:
        raise ConfigError("--only and --from are two choices", where="road", todo="give one of them")
    inputs = {"model": model, "data": data, "reward": reward, "lora": lora}
    inputs |= {"examples": examples, "teacher": teacher, "general": general}
    road_file = open_road(file, inputs, overrides or ())
    stages = select(read_road(road_file, out), only=only, start=start)
    if dry_run:
        check_inputs(stages, models=False)
        rows = [_row(stage) | {"state": state} for stage, state in zip(stages, states(stages), strict=True)]
        settings = [{"settings": stage.settings.model_dump(mode="json")} for stage in stages]
        lines = [f"{row['name']}: {row['state']} ({row['uses']}{_after(row)}) in {row['run']}" for row in rows]
        lines = [line + _changed(stage) for line, stage in zip(lines, stages, strict=True)]
        rows = [row | each for row, each in zip(rows, settings, strict=True)]
        return Result({"road": str(out), "stages": rows}, "\n".join(lines))
    with stage_progress(out) as on_progress:
        run_road(stages, road_file, out, jobs=jobs, on_progress=on_progress)
    records = [read_json(stage.folder / "run.json") or {} for stage in stages]
    keys = ("artefact_digest", "device_seconds", "nano_yuan", "facts")
    rows = [_row(stage) | {key: record.get(key) for key in keys} for stage, record in zip(stages, records, strict=True)]
    seconds = sum(record["device_seconds"] for record in records)
    yuan = sum(record["nano_yuan"] for record in records) / 1e9
    lines = [f"{row['name']}: {row['run']}{_measured(row['facts'])}" for row in rows]
    scores = held_out_scores(out)
    lines += [f"held out, {score}" for score in scores]
    lines += [f"{seconds:.0f} CPU-s, ¥{yuan:.4f}", f"prove it: sprat verify {out}"]
    data_rows = {"held_out": [score.to_dict() for score in scores]} if scores else {}
    return Result({"road": str(out), "stages": rows, **data_rows}, "\n".join(lines))


def _row(stage: RoadStage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "uses": stage.config.uses,
        "run": str(stage.folder),
        "depends_on": list(stage.depends_on),
    }


def _after(row: dict[str, Any]) -> str:
    return f" of {', '.join(row['depends_on'])}" if row["depends_on"] else ""


def _changed(stage: RoadStage) -> str:
    """The settings that the road itself makes, each stage's on a line below it."""

    def flat(table: dict[str, Any], prefix: str = "") -> list[str]:
        parts = list[str]()
        for key, value in table.items():
            inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}={value}"]
            parts += inner
        return parts

    lora = getattr(stage.config, "lora", None)
    parts = ([f"lora={lora}"] if lora else []) + flat(stage.config.set)
    return f"\n    {', '.join(parts)}" if parts else ""


def _measured(facts: dict[str, Any]) -> str:
    """What a run measured, in short."""
    before, after = facts.get("validation_before", {}), facts.get("validation_after", {})
    parts = [f"{name} {before[name]:.3f} → {value:.3f}" for name, value in after.items() if name in before]
    scores = facts.get("eval", {})
    if "text" in scores:
        parts.append(f"{scores['text']['bits_per_byte']:.3f} bits per byte")
    if score := facts.get("held_out_score"):
        parts.append(f"held-out reward {score['reward']:.3f}, {score['accuracy']:.1%} right")
    if "kept" in facts and "answers" in facts:
        parts.append(f"{facts['kept']} of {facts['answers']} answers kept")
    if "size_bytes" in facts:
        parts.append(f"{facts['size_bytes'] / 1e6:.1f} MB")
    return f" ({', '.join(parts)})" if parts else ""

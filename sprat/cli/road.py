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

RoadFile = Annotated[Path, typer.Argument(metavar="FILE", help="A TOML file of [[stages]]; see docs/recipes.md.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="The road: a folder with a run for each stage.")]
Only = Annotated[str, typer.Option("--only", metavar="NAME", help="Run this stage alone.")]
From = Annotated[str, typer.Option("--from", metavar="NAME", help="Run this stage, and what takes something from it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the file and say what would be done.")]
_JOBS_HELP = "Stages side by side, which share the cores; left out: as many as ever could."
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, max=1024, help=_JOBS_HELP)]


def road(
    file: RoadFile, out: Out, only: Only = "", start: From = "", dry_run: DryRun = False, jobs: Jobs = None
) -> Result:
    """Go a road of your own: each stage of FILE is a run in DIR; the same line again goes on where it was.

    Example: sprat road mine.toml --out runs/mine
    """
    from sprat.pipeline.road import read_road, select, states
    from sprat.pipeline.road import road as run_road

    if only and start:
        raise ConfigError("--only and --from are two choices", where="road", todo="give one of them")
    stages = select(read_road(file, out), only=only, start=start)
    if dry_run:
        rows = [_row(stage) | {"state": state} for stage, state in zip(stages, states(stages), strict=True)]
        lines = [f"{row['name']}: {row['state']} ({row['uses']}{_after(row)}) in {row['run']}" for row in rows]
        return Result({"road": str(out), "stages": rows}, "\n".join(lines))
    with stage_progress(out) as on_progress:
        run_road(stages, file, out, jobs=jobs, on_progress=on_progress)
    records = [read_json(stage.folder / "run.json") or {} for stage in stages]
    keys = ("artefact_digest", "device_seconds", "nano_yuan", "facts")
    rows = [_row(stage) | {key: record.get(key) for key in keys} for stage, record in zip(stages, records, strict=True)]
    seconds = sum(record["device_seconds"] for record in records)
    yuan = sum(record["nano_yuan"] for record in records) / 1e9
    lines = [f"{row['name']}: {row['run']}{_measured(row['facts'])}" for row in rows]
    lines += [f"{seconds:.0f} CPU-s, ¥{yuan:.4f}", f"prove it: sprat verify {out}"]
    return Result({"road": str(out), "stages": rows}, "\n".join(lines))


def _row(stage: RoadStage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "uses": stage.config.uses,
        "run": str(stage.folder),
        "depends_on": list(stage.depends_on),
    }


def _after(row: dict[str, Any]) -> str:
    return f" of {', '.join(row['depends_on'])}" if row["depends_on"] else ""


def _measured(facts: dict[str, Any]) -> str:
    """What a run measured, in short."""
    after = facts.get("validation_after", {})
    parts = [f"{name} {facts['validation_before'][name]:.3f} → {value:.3f}" for name, value in after.items()]
    scores = facts.get("eval", {})
    if "text" in scores:
        parts.append(f"{scores['text']['bits_per_byte']:.3f} bits per byte")
    if "size_bytes" in facts:
        parts.append(f"{facts['size_bytes'] / 1e6:.1f} MB")
    return f" ({', '.join(parts)})" if parts else ""

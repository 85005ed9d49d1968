"""``sprat report`` and ``sprat verify``: what happened, and can it be proved? Both read run folders only."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sprat.cli.verb import Result, print_err
from sprat.errors import SpratError, TrustError

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the folder of a whole road.")]


def report(
    folder: RunFolder = Path("runs/quickstart"),
    watch: Annotated[
        float | None,
        typer.Option("--watch", metavar="SECONDS", min=0.1, help="Write it again so often, until the run is finished."),
    ] = None,
) -> Result:
    """Write report.html of a run, also while it goes on, or of a road: curves, answers, data, cost in one file.

    Example: sprat report runs/mine
    """
    from sprat.report import write_report

    path = write_report(folder)
    if watch is not None:
        print_err(f"sprat: {path} is written every {watch:g} s; a browser that shows it reads it again")
        try:
            while (folder / "open.json").is_file():
                time.sleep(watch)
                with suppress(SpratError):  # the run is just being finished
                    if not (folder / "run.json").is_file():
                        write_report(folder)
        finally:
            path = write_report(folder)
    return Result({"report": str(path), "bytes": path.stat().st_size}, str(path))


def verify(
    folder: RunFolder = Path("runs/quickstart"),
    expect_head: Annotated[
        str, typer.Option("--expect-head", metavar="HEX", help="The ledger's head, as you kept it elsewhere.")
    ] = "",
) -> Result:
    """Recompute every digest of a run and its ledger; exit code 8 if one differs."""
    from sprat.trust.verify import verify as verify_run

    findings = verify_run(folder, expect_head=expect_head)
    faults = [finding for finding in findings if not finding.ok]
    lines = [f"{'ok ' if finding.ok else 'BAD'}  {finding.subject}: {finding.text}" for finding in findings]
    verdict = "proved" if not faults else f"{len(faults)} faults"
    data = {"run": str(folder), "ok": not faults, "findings": [asdict(finding) for finding in findings]}
    return Result(data, "\n".join([*lines, f"{folder}: {verdict}"]), TrustError.exit_code if faults else 0)

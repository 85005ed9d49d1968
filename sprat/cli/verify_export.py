"""``sprat verify-export``: is what was taken away what it was, and is it that model?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sprat.cli.verb import Result
from sprat.errors import TrustError

_EXPORT_HELP = "A folder or GGUF file that sprat export wrote, or an adapter in PEFT's layout."
Export = Annotated[Path, typer.Argument(metavar="EXPORT", help=_EXPORT_HELP)]
_AGAINST_HELP = "The model that it was made from; of an adapter, the run that trained it. Without it: the manifest."
Against = Annotated[Path | None, typer.Option("--against", metavar="MODEL", help=_AGAINST_HELP)]


def verify_export(export: Export, against: Against = None) -> Result:
    """Hold every file and tensor of EXPORT against its manifest, and MODEL; exit code 8 if one differs.

    Example: sprat verify-export mine.gguf --against runs/mine
    """
    from sprat.formats.verify import verify_export as verify

    findings = verify(export, against=against)
    faults = [finding for finding in findings if not finding.ok]
    lines = [f"{'ok ' if finding.ok else 'BAD'}  {finding}" for finding in findings]
    verdict = "proved" if not faults else f"{len(faults)} faults"
    data = {"export": str(export), "ok": not faults, "findings": [asdict(finding) for finding in findings]}
    return Result(data, "\n".join([*lines, f"{export}: {verdict}"]), TrustError.exit_code if faults else 0)

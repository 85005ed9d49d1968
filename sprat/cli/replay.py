"""``sprat replay``: recompute steps of a run of RL from its ledger, and compare the weights bit for bit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sprat.cli.verb import Result, print_err
from sprat.errors import TrustError

if TYPE_CHECKING:
    from sprat.post.rl.replay import StepReplay

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run of `sprat rl MODEL`, finished or not.")]
Step = Annotated[int | None, typer.Option("--step", min=1, metavar="N", help="One step; left out: all of them.")]
_MODEL_HELP = "Where the model is that the run started from, if it is not beside the run."
Model = Annotated[Path | None, typer.Option("--model", metavar="MODEL", help=_MODEL_HELP)]


def replay(run: Run, step: Step = None, model: Model = None) -> Result:
    """Recompute a step of RL from the answers in its ledger: the weights must come out the same, bit for bit.

    Example: sprat replay runs/mine --step 12
    """
    from sprat.post.rl.replay import replay as recompute

    found = recompute(run, step, model=model, on_step=lambda done: print_err(f"sprat: {_line(done)}"))
    last = found.steps[-1].step if found.steps else found.start
    steps = f"step {last}" if step else f"steps {found.start + 1} to {last}"
    lines = [*found.faults, *(fault for each in found.steps for fault in each.differences)]
    verdict = f"{steps}: " + ("the same bits" if found.is_same else "not the same bits")
    human = "\n".join([*lines, f"{verdict}, recomputed from step {found.start}"])
    data = {"run": str(run), "same": found.is_same, **asdict(found)}
    return Result(data, human, exit_code=0 if found.is_same else TrustError.exit_code)


def _line(done: StepReplay) -> str:
    """What came of a step, for a person."""
    low, high = done.versions
    sampled = f"version {low}" if low == high else f"versions {low} to {high}"
    verdict = "differs" if done.differences else f"the same bits, {done.actual[:12]}"
    return f"step {done.step}: {done.answers} answers, sampled by {sampled}: {verdict}"

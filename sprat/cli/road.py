"""``sprat quickstart``: the whole road in one command."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sprat.cli.ask import manners
from sprat.cli.board import board
from sprat.cli.stations import Text
from sprat.cli.verb import Overrides, Recipe, Result, RoadFolder, say

HOST = "127.0.0.1"


def quickstart(
    out: RoadFolder = Path("runs/quickstart"),
    text: Text = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, max=2**63 - 1, help="The recipe's if left out. Same seed: same digests."),
    ] = None,
    recipe: Recipe = "quickstart",
    overrides: Overrides = None,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="End with the chat page on loopback.")] = True,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of the chat page; 0 takes a free one.")] = 8000,
) -> Result:
    """Text and tasks to a served model that reasons: data, pre-train, SFT, RL, distil, INT4, report, chat page."""
    from sprat.pipeline.pipeline import Pipeline
    from sprat.pipeline.quickstart import SERVED_RUN, build_stages
    from sprat.pipeline.quickstart import quickstart as walk
    from sprat.pipeline.recipe import load_recipe
    from sprat.serve import server
    from sprat.trust.ledger import Ledger

    chosen = load_recipe(recipe, (*(overrides or ()), *(() if seed is None else (f"seed={seed}",))))
    if serve:
        server.take_port(HOST, port).close()  # a port in use is told now, not after the road
    began, names = time.monotonic(), [stage.name for stage in build_stages(Pipeline(out, chosen), text)]
    with board(out) as told:
        report = walk(out, chosen, text=text, on_progress=told)
    runs = {name: _cost(out / name) for name in names}
    model, seconds, head = out / SERVED_RUN, time.monotonic() - began, Ledger(out / "ledger.jsonl").head_hash()
    yuan = sum(cost["nano_yuan"] for cost in runs.values()) / 1e9
    examples, turns = manners(model)
    lines = [
        f"done in {seconds / 60:.1f} minutes, {sum(c['device_seconds'] for c in runs.values()):.0f} CPU-s, ¥{yuan:.4f}",
        f"report: {report}",
        f"prove it: sprat verify {out}",
        f"head of the ledger, to keep elsewhere (verify --expect-head): {head}",
        f"ask it: sprat run {model} {json.dumps(examples[0]) if examples else 'QUESTION'}",
    ]
    data = {"road": str(out), "report": str(report), "model": str(model), "seconds": round(seconds, 1), "runs": runs}
    data["ledger_head"] = head

    def page() -> None:
        say("the chat page, until Ctrl-C:")
        server.run(model, HOST, port, name="sprat", examples=examples, turns=turns, announce=say)

    return Result(data, "\n".join(lines), then=page if serve else None)


def _cost(run: Path) -> dict[str, Any]:
    """The digest and cost of a finished run."""
    written = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return {
        key: written[key]
        for key in ("artefact_digest", "device_seconds", "wall_seconds", "nano_yuan", "flops", "tokens")
    }

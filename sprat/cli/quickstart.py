"""``sprat quickstart``: the whole pipeline in one command."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sprat.cli.inference import chat_defaults
from sprat.cli.progress import stage_progress
from sprat.cli.stages import Text
from sprat.cli.verb import Overrides, PipelineFolder, Recipe, Result, print_err


def quickstart(
    out: PipelineFolder = Path("runs/quickstart"),
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
    from sprat.pipeline.quickstart import quickstart as run_pipeline
    from sprat.pipeline.recipe import load_recipe
    from sprat.serve import ServeConfig, bind_socket, run
    from sprat.trust.ledger import Ledger

    pipeline_recipe = load_recipe(recipe, (*(overrides or ()), *(() if seed is None else (f"seed={seed}",))))
    serve_config = ServeConfig(port=port, served_model_name="sprat")
    if serve:
        bind_socket(serve_config).close()  # a port in use is reported now, not after the pipeline
    start_time, stages = time.monotonic(), build_stages(Pipeline(out, pipeline_recipe), text)
    with stage_progress(out) as on_progress:
        report = run_pipeline(out, pipeline_recipe, text=text, on_progress=on_progress)
    run_costs = {stage.name: _run_cost(out / stage.name) for stage in stages}
    model, seconds, head = out / SERVED_RUN, time.monotonic() - start_time, Ledger(out / "ledger.jsonl").head_hash()
    cost_yuan = sum(cost["nano_yuan"] for cost in run_costs.values()) / 1e9
    examples, turns = chat_defaults(model)
    cpu_seconds = sum(cost["device_seconds"] for cost in run_costs.values())
    lines = [
        f"done in {seconds / 60:.1f} minutes, {cpu_seconds:.0f} CPU-s, ¥{cost_yuan:.4f}",
        f"report: {report}",
        f"prove it: sprat verify {out}",
        f"head of the ledger, to keep elsewhere (verify --expect-head): {head}",
        f"ask it: sprat run {model} {json.dumps(examples[0]) if examples else 'QUESTION'}",
    ]
    data = {"road": str(out), "report": str(report), "model": str(model), "seconds": round(seconds, 1)}
    data |= {"runs": run_costs, "ledger_head": head}

    def serve_chat_page() -> None:
        print_err("the chat page, until Ctrl-C:")
        run(model, serve_config.replace(examples=examples, max_history_turns=turns), on_ready=print_err)

    return Result(data, "\n".join(lines), after_output=serve_chat_page if serve else None)


def _run_cost(run: Path) -> dict[str, Any]:
    """The digest and cost of a finished run."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    keys = ("artefact_digest", "device_seconds", "wall_seconds", "nano_yuan", "flops", "tokens")
    return {key: record[key] for key in keys}

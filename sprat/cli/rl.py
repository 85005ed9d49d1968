"""``sprat rl`` of any model on the user's questions and verifier; without a model, the station of a road."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sprat.cli import stages
from sprat.cli.verb import Overrides, Result, print_err
from sprat.errors import ConfigError

if TYPE_CHECKING:
    from sprat.trust.run import Run

_MODEL_HELP = "Any model that `sprat run` takes; left out: the road's."
Model = Annotated[Path | None, typer.Argument(metavar="[MODEL]", help=_MODEL_HELP)]
_TASK_HELP = "Questions with a judge: a JSONL file, file.py:Class, or reasoning-gym/NAME; repeat for more."
Task = Annotated[list[str] | None, typer.Option("--task", metavar="FILE", help=_TASK_HELP)]
_DATA_HELP = "Questions for --reward: .jsonl, .json, .csv, .tsv or .parquet (also .gz, .zst), or a folder of them."
Data = Annotated[Path | None, typer.Option("--data", metavar="FILE", help=_DATA_HELP)]
_REWARD_HELP = "Your verifier: file.py:function, or a command that reads a JSON line and writes a number."
Reward = Annotated[str | None, typer.Option("--reward", metavar="NAME", help=_REWARD_HELP)]
_SECOND_HELP = "A second judge that never pays: where it falls while the reward rises, the run is stopped."
SecondReward = Annotated[str | None, typer.Option("--second-reward", metavar="NAME", help=_SECOND_HELP)]
_ENVIRONMENT_HELP = "What answers the model turn by turn: file.py:Class, calculator, python or reasoning-gym/NAME."
Environment = Annotated[str | None, typer.Option("--environment", metavar="NAME", help=_ENVIRONMENT_HELP)]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run to write; without MODEL, the road.")]
_LORA_HELP = "Train adapters of this rank instead of all weights."
Lora = Annotated[int | None, typer.Option("--lora", metavar="RANK", min=1, help=_LORA_HELP)]
_MAP_HELP = "What a column of yours is called here: question, answer, id; repeat it."
Map = Annotated[list[str] | None, typer.Option("--map", metavar="NAME=COLUMN", help=_MAP_HELP)]
_DEQUANTIZE_HELP = "Train what a quantised model stands for, in float32."
Dequantize = Annotated[bool, typer.Option("--dequantize", help=_DEQUANTIZE_HELP)]
_RECIPE_HELP = "A TOML file; left out: the defaults of docs/rl.md, or a road's recipe."
Recipe = Annotated[str | None, typer.Option("--recipe", metavar="FILE", help=_RECIPE_HELP)]


def rl(
    model: Model = None,
    task: Task = None,
    data: Data = None,
    reward: Reward = None,
    second_reward: SecondReward = None,
    environment: Environment = None,
    out: Out = None,
    lora: Lora = None,
    map_columns: Map = None,
    dequantize: Dequantize = False,
    init_from: stages.InitFrom = None,
    recipe: Recipe = None,
    overrides: Overrides = None,
) -> Result:
    """Reinforce what a verifier of yours pays, on questions of yours (GRPO); without MODEL, on a road's tasks.

    Example: sprat rl smol --data problems.jsonl --reward judge.py:reward --lora 16 --out runs/mine
    """
    if model is None:
        given: dict[str, Any] = {"--task": task, "--data": data, "--reward": reward, "--second-reward": second_reward}
        given |= {"--environment": environment, "--lora": lora, "--map": map_columns, "--dequantize": dequantize}
        if alone := [name for name, value in given.items() if value]:
            todo = "name the model first: sprat rl smol --data FILE --reward file.py:function --out RUN"
            raise ConfigError(f"{alone[0]} is of a model of yours, and none was named", where="rl", todo=todo)
        return stages.rl(out or stages.DEFAULT_OUT, init_from, recipe or "quickstart", overrides)
    if out is None:
        raise ConfigError("--out is missing", where="rl", todo="give it: --out PATH")

    from sprat.config.rl import load_rl_config
    from sprat.data.conversations import parse_column_map
    from sprat.post.rl.questions import Questions
    from sprat.post.rl.reinforce import reinforce

    start = [] if init_from is None else [f"init_from={json.dumps(init_from)}"]
    config = load_rl_config(lora=lora, recipe=recipe, overrides=[*start, *(overrides or ())])
    column_map = parse_column_map(",".join(map_columns)) if map_columns else None
    asked = tuple(task or ())
    questions = Questions(data, asked, reward or "", second_reward or "", column_map, environment or "")
    run = reinforce(
        model, questions, out, config, dequantize=dequantize, on_news=lambda text: print_err(f"sprat: {text}")
    )
    return Result({"run": str(run.folder), "model": str(model), **run.record}, summary(run))


def summary(run: Run) -> str:
    """What came of it, for a person."""
    facts: dict[str, Any] = run.facts
    lines = [f"{run.folder}: {facts['last_step']} of {facts['steps']} steps, {run.record['device_seconds']:.0f} CPU-s"]
    if held_out := facts.get("held_out"):
        before, after = (facts[f"validation_{when}"]["reward"] for when in ("before", "after"))
        change = held_out["change"]
        interval = f"{change['low']:+.3f} to {change['high']:+.3f}, p = {change['p_value']:.2g}"
        lines.append(f"held-out reward: {before:.3f} before, {after:.3f} after ({interval})")
    if comparison := (held_out or {}).get("comparison"):
        interval = f"{comparison['low']:+.1%} to {comparison['high']:+.1%}, p = {comparison['p_value']:.2g}"
        shares = f"{comparison['first']:.1%} before, {comparison['second']:.1%} after"
        lines.append(f"held-out problems right: {shares} ({interval})")
    lines += [f"step {trip['step']}: {trip['sentence']}" for trip in facts.get("trips", ())]
    lines += [f"hack monitor: {alarm['sentence']}" for alarm in facts.get("alarms", ())]
    return "\n".join([*lines, f'ask it: sprat run {run.folder} "…"'])

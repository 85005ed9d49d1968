"""``sprat sft`` and ``sprat dpo`` of any model on any file; without a model, ``sft`` is the station of a road."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sprat.cli import stages
from sprat.cli.verb import Overrides, Result, print_err
from sprat.errors import ConfigError

if TYPE_CHECKING:
    from sprat.post.examples import EncodedExamples
    from sprat.tokens import Tokenizer
    from sprat.trust.run import Run

_MODEL_HELP = "Any model that `sprat run` takes; left out: the road's."
Model = Annotated[Path | None, typer.Argument(metavar="[MODEL]", help=_MODEL_HELP)]
_DATA_HELP = "Examples: .jsonl, .json, .csv, .tsv or .parquet (also .gz, .zst), or a folder of them."
Data = Annotated[Path | None, typer.Option("--data", metavar="FILE", help=_DATA_HELP)]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run to write; without MODEL, the road.")]
_LORA_HELP = "Train adapters of this rank instead of all weights."
Lora = Annotated[int | None, typer.Option("--lora", metavar="RANK", min=1, help=_LORA_HELP)]
_MAP_HELP = "What a column of yours is called here; repeat it."
Map = Annotated[list[str] | None, typer.Option("--map", metavar="NAME=COLUMN", help=_MAP_HELP)]
_DEQUANTIZE_HELP = "Train what a quantised model stands for, in float32."
Dequantize = Annotated[bool, typer.Option("--dequantize", help=_DEQUANTIZE_HELP)]
_EVAL_TASK_HELP = "Questions asked while it trains: a JSONL file, or file.py:Class; repeat for more."
EvalTask = Annotated[list[str] | None, typer.Option("--eval-task", metavar="FILE", help=_EVAL_TASK_HELP)]
_HELD_OUT_HELP = "Questions for RL: examples that ask one of their held-out part are left out."
HeldOut = Annotated[Path | None, typer.Option("--held-out", metavar="FILE", help=_HELD_OUT_HELP)]
_DEVICE_HELP = "Where to train: cpu, or cuda, on which no test of ours has run."
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help=_DEVICE_HELP)]
_DTYPE_HELP = "Of matrix products: auto (bfloat16 where the device has it), float32, bfloat16; weights stay float32."
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="TYPE", help=_DTYPE_HELP)]
_TENSORBOARD_HELP = "Write RUN/tensorboard as well, for `tensorboard --logdir`."
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help=_TENSORBOARD_HELP)]
_RECIPE_HELP = "A TOML file; left out: the defaults of docs/finetune.md, or a road's recipe."
Recipe = Annotated[str | None, typer.Option("--recipe", metavar="FILE", help=_RECIPE_HELP)]
_REPLAY_HELP = "Text mixed in, so that less is forgotten: a folder, .txt, .jsonl or .parquet."
Replay = Annotated[Path | None, typer.Option("--replay", metavar="TEXT", help=_REPLAY_HELP)]
_NUM_SHOWN = 3  # examples


def sft(
    model: Model = None,
    data: Data = None,
    out: Out = None,
    lora: Lora = None,
    map_columns: Map = None,
    replay: Replay = None,
    dequantize: Dequantize = False,
    eval_task: EvalTask = None,
    held_out: HeldOut = None,
    init_from: stages.InitFrom = None,
    device: Device = None,
    dtype: Dtype = None,
    tensorboard: TensorBoard = False,
    recipe: Recipe = None,
    overrides: Overrides = None,
) -> Result:
    """Fine-tune MODEL on conversations, all weights or adapters; without MODEL, the pre-trained model of a road.

    Example: sprat sft smol --data chat.jsonl --lora 16 --out runs/mine
    """
    if model is None:
        given: dict[str, Any] = {"--data": data, "--lora": lora, "--map": map_columns, "--replay": replay}
        given |= {"--dequantize": dequantize, "--eval-task": eval_task, "--device": device, "--dtype": dtype}
        given |= {"--held-out": held_out}
        if alone := [name for name, value in (given | {"--tensorboard": tensorboard}).items() if value]:
            todo = "name the model first: sprat sft smol --data FILE --out RUN"
            raise ConfigError(f"{alone[0]} is of a model of yours, and none was named", where="sft", todo=todo)
        return stages.sft(out or stages.DEFAULT_OUT, init_from, recipe or "quickstart", overrides)
    changes = _changes(overrides, {"init_from": init_from, "device": device, "dtype": dtype})
    return _finetune(
        "sft",
        model,
        data,
        out,
        lora,
        map_columns,
        replay,
        dequantize,
        eval_task,
        tensorboard,
        recipe,
        changes,
        held_out,
    )


def dpo(
    model: Model = None,
    data: Data = None,
    out: Out = None,
    lora: Lora = None,
    map_columns: Map = None,
    dequantize: Dequantize = False,
    eval_task: EvalTask = None,
    init_from: stages.InitFrom = None,
    device: Device = None,
    dtype: Dtype = None,
    tensorboard: TensorBoard = False,
    recipe: Recipe = None,
    overrides: Overrides = None,
) -> Result:
    """Let MODEL prefer the chosen of two answers (DPO, IPO), all weights or adapters.

    Example: sprat dpo runs/mine --data pairs.jsonl --lora 16 --out runs/preferred
    """
    if model is None:
        raise ConfigError("no model was named", where="dpo", todo="write sprat dpo MODEL --data FILE --out RUN")
    changes = _changes(overrides, {"init_from": init_from, "device": device, "dtype": dtype})
    return _finetune(
        "dpo", model, data, out, lora, map_columns, None, dequantize, eval_task, tensorboard, recipe, changes
    )


def _changes(overrides: list[str] | None, options: dict[str, str | None]) -> list[str]:
    """What the options say of the recipe's keys, as ``--set`` would; ``--set`` itself comes last."""
    named = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    return [*named, *(overrides or ())]


def _finetune(
    stage: str,
    model: Path,
    data: Path | None,
    out: Path | None,
    lora: int | None,
    map_columns: list[str] | None,
    replay: Path | None,
    dequantize: bool,
    eval_tasks: list[str] | None,
    tensorboard: bool,
    recipe: str | None,
    changes: list[str],
    held_out: Path | None = None,
) -> Result:
    """The run of ``stage``, finished."""
    from sprat.config.finetune import load_finetune_config
    from sprat.config.sample import HeldOutOfConfig
    from sprat.data.conversations import parse_column_map
    from sprat.post.finetune import finetune

    for name, value in (("--data", data), ("--out", out)):
        if value is None:
            raise ConfigError(f"{name} is missing", where=stage, todo=f"give it: {name} PATH")
    assert data is not None and out is not None
    config = load_finetune_config(stage, lora=lora, recipe=recipe, overrides=changes)
    column_map = parse_column_map(",".join(map_columns)) if map_columns else None
    run = finetune(
        model,
        data,
        out,
        config,
        column_map=column_map,
        replay=replay,
        dequantize=dequantize,
        eval_tasks=eval_tasks or (),
        held_out=None if held_out is None else HeldOutOfConfig(data=str(held_out)),
        tensorboard=tensorboard,
        on_prepared=show_examples,
    )
    return Result({"run": str(run.folder), "model": str(model), **run.record}, summary(run))


def show_examples(tokenizer: Tokenizer, encoded: EncodedExamples) -> None:
    """A few examples as the model sees them, on stderr; what it learns is marked."""
    from rich.console import Console
    from rich.text import Text

    from sprat.post.examples import preview

    console = Console(stderr=True, soft_wrap=True)
    for number, sequence in enumerate(encoded.sequences[:_NUM_SHOWN], 1):
        text = Text(f"example {number}, in green what is learned: ", style="dim")
        for part, learned in preview(tokenizer, sequence):
            shown = part if console.is_terminal or not learned else f"[[{part}]]"
            text.append(shown, style="bold green" if learned else "default")
        console.print(text)
    print_err(f"sprat: {json.dumps(encoded.counts)}")


def summary(run: Run) -> str:
    """What came of it, for a person."""
    facts: dict[str, Any] = run.facts
    lines = [f"{run.folder}: {facts['last_step']} of {facts['steps']} steps, {run.record['device_seconds']:.0f} CPU-s"]
    if best := facts.get("best"):
        lines.append(f"kept: the model of step {best['step']}, the best by {best['metric']}")
    for name, before in facts.get("validation_before", {}).items():
        lines.append(f"validation {name}: {before:.3f} before, {facts['validation_after'][name]:.3f} after")
    return "\n".join([*lines, f'ask it: sprat run {run.folder} "…"'])

"""``sprat train`` of any model or size on any text; without text of one's own, the station of a road."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sprat.cli import stages
from sprat.cli.verb import Overrides, Result
from sprat.errors import ConfigError

_MODEL_HELP = "A size of the dial (pico, nano, …) for a new model, or any model that `sprat run` takes."
Model = Annotated[Path | None, typer.Argument(metavar="[MODEL]", help=_MODEL_HELP)]
_DATA_HELP = "Plain text: a folder of .txt, .md, .jsonl (text), .parquet …, or one such file."
Data = Annotated[Path | None, typer.Option("--data", metavar="FILE", help=_DATA_HELP)]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run to write; without --data, the road.")]
_TOKENIZER_HELP = "Of a new model: whose tokenizer it has; left out, one is trained on the text."
TokenizerOf = Annotated[Path | None, typer.Option("--tokenizer", metavar="MODEL", help=_TOKENIZER_HELP)]
_DEQUANTIZE_HELP = "Train what a quantised model stands for, in float32."
Dequantize = Annotated[bool, typer.Option("--dequantize", help=_DEQUANTIZE_HELP)]
_RECIPE_HELP = "A TOML file; left out: the defaults of docs/recipes.md, or a road's recipe."
Recipe = Annotated[str | None, typer.Option("--recipe", metavar="FILE", help=_RECIPE_HELP)]


def train(
    model: Model = None,
    data: Data = None,
    out: Out = None,
    tokenizer: TokenizerOf = None,
    dequantize: Dequantize = False,
    init_from: stages.InitFrom = None,
    recipe: Recipe = None,
    overrides: Overrides = None,
) -> Result:
    """Pre-train a new model, or any model further, on text of yours; without --data, the model of a road on its own.

    Example: sprat train pico --data texts --out runs/base
    """
    if data is None:
        given = {"MODEL": model, "--tokenizer": tokenizer, "--dequantize": dequantize or None}
        if alone := [name for name, value in given.items() if value is not None]:
            todo = "give it: sprat train pico --data FILE --out RUN"
            raise ConfigError(f"{alone[0]} is for text of yours, and --data is missing", where="train", todo=todo)
        return stages.train(out or stages.DEFAULT_OUT, init_from, recipe or "quickstart", overrides)
    if out is None:
        raise ConfigError("--out is missing", where="train", todo="give it: --out PATH")
    from sprat.config.pretrain import load_pretrain_config
    from sprat.train.pretrain import find_beginning, pretrain

    size, path = find_beginning(model, init_from or "")
    config = load_pretrain_config(size=size, init_from=init_from or "", recipe=recipe, overrides=overrides or ())
    run = pretrain(path, data, out, config, tokenizer=tokenizer, dequantize=dequantize)
    facts = run.facts
    before, after = (facts[f"validation_{when}"]["bits_per_byte"] for when in ("before", "after"))
    human = (
        f"{run.folder}: {facts['steps']} steps, {run.record['device_seconds']:.0f} CPU-s\n"
        f"held-out text: {before:.3f} bits per byte before, {after:.3f} after\n"
        f'let it go on: sprat run {run.folder} "…"'
    )
    return Result({"run": str(run.folder), "model": str(model), **run.record}, human)

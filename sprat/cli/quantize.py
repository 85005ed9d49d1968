"""``sprat quantize`` of any model; without a model, it is the station of a road."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sprat.cli import stages
from sprat.cli.progress import progress_bar
from sprat.cli.verb import Overrides, Result, begins_anew, print_err
from sprat.errors import ConfigError

_MODEL_HELP = "Any model that `sprat run` takes; left out: the road's."
_METHOD_HELP = "How to round; left out: gptq with --calibrate, else nearest."
_CALIBRATE_HELP = "A folder or file of text or conversations like what the model will see."
_DEQUANTIZE_HELP = "Start from what a quantised model stands for."
_RECIPE_HELP = "A TOML file of the keys of docs/quant.md; without MODEL, a road's recipe."


def quantize(
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL]", help=_MODEL_HELP)] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The folder to write; without MODEL, the road.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", metavar="NAME", help=_METHOD_HELP)] = None,
    calibrate: Annotated[Path | None, typer.Option("--calibrate", metavar="TEXT", help=_CALIBRATE_HELP)] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help=_DEQUANTIZE_HELP)] = False,
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="FILE", help=_RECIPE_HELP)] = None,
    overrides: Overrides = None,
) -> Result:
    """Squeeze weights to INT4 or INT8: those of any MODEL, or the student's of a road, measuring what that costs.

    Example: sprat quantize runs/mine --out small --method awq --calibrate texts
    """
    if model is None:
        if calibrate is not None:
            todo = "leave it out and --set quant.rounding=gptq: a road has its own text"
            raise ConfigError("a road takes no text here", where="--calibrate", todo=todo)
        if method is not None or dequantize:
            name = "--dequantize" if method is None else "--method"
            todo = "name the model first: sprat quantize MODEL --out DIR"
            raise ConfigError(f"{name} is of a model of yours, and none was named", where="quantize", todo=todo)
        return stages.quantize(out or stages.DEFAULT_OUT, recipe or "quickstart", overrides)
    begins_anew()
    if out is None:
        raise ConfigError("no folder to write to", where="--out", todo="give one")
    from sprat.config.quant import load_quantize_config
    from sprat.post.quantize import quantize_model

    config = load_quantize_config(method, has_text=calibrate is not None, recipe=recipe, overrides=overrides or ())
    with progress_bar("quantise") as on_progress, progress_bar("tune") as on_tuned:
        options: dict[str, Any] = {"dequantize": dequantize, "on_progress": on_progress, "on_tuned": on_tuned}
        facts = quantize_model(model, out, config, calibrate, **options)
    return Result({"model": str(out), **config.model_dump(), **facts}, _summary(out, facts))


def _summary(out: Path, facts: dict[str, Any]) -> str:
    """What came of it, for a person; what fell short of text goes to stderr."""
    few = facts.get("few_tokens", {"count": 0})
    if few["count"]:
        shown = ", ".join(few["names"][:3]) + (", …" if few["count"] > 3 else "")
        done = {"nearest": "rounded to the nearest", "all": "judged by all tokens"}.get(few["handled"], "")
        print_err(f"sprat: {few['count']} matrices or experts saw too few tokens and were {done}: {shown}")
    size = f"{out}: {facts['size_bytes'] / 1e6:.1f} MB, {facts['dense_bytes'] / facts['size_bytes']:.1f} times smaller"
    if (tuned := facts.get("tuned")) is None:
        return size
    before, after = tuned["kl_before"], tuned["kl_after"]
    if tuned["kept"]:
        return f"{size}; KL to the original {before:.4f} before tuning, {after:.4f} after"
    todo = "give more text, or lower tune_lr" if after > before else "raise tune_steps or tune_lr"
    print_err(f"sprat: the scales were no better for having learned ({after:.4f}), and stay as they were: {todo}")
    return f"{size}; KL to the original {before:.4f}"

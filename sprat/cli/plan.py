"""``sprat plan``: what a training run will take, in memory, time and money, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sprat.cli.verb import Overrides, Result
from sprat.errors import ConfigError

if TYPE_CHECKING:
    from sprat.plan.quote import Figure, Quote

_MODEL_HELP = "A size (v3), a published model (LLAMA3_8B), a config.json or its folder; or `price`: a bill alone."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
_PLAN_HELP = "A TOML file with the layout; left out: V3's published one for v3, else one chip."
Plan = Annotated[Path | None, typer.Option("--plan", metavar="FILE", help=_PLAN_HELP)]
Chip = Annotated[str, typer.Option("--chip", metavar="NAME", help="The accelerator, from the hardware catalogue.")]
_TOKENS_HELP = "Tokens of the run; left out: 14.8e12, as V3 had."
Tokens = Annotated[float, typer.Option("--tokens", metavar="N", help=_TOKENS_HELP)]
_PRICES_HELP = "A price book of yours in place of the built-in one."
Prices = Annotated[Path | None, typer.Option("--prices", metavar="FILE", help=_PRICES_HELP)]
_IMBALANCE_HELP = "Tokens of the busiest rank's experts over the mean."
Imbalance = Annotated[float, typer.Option("--imbalance", metavar="X", help=_IMBALANCE_HELP)]
_FLEET_HELP = "Search the best layouts on these chips instead: 2048xH800, or 512xH100,512xA100."
Fleet = Annotated[str | None, typer.Option("--fleet", metavar="NxCHIP,…", help=_FLEET_HELP)]
Deadline = Annotated[float | None, typer.Option("--deadline", metavar="DAYS", help="With --fleet: at most so long.")]
Budget = Annotated[float | None, typer.Option("--budget", metavar="USD", help="With --fleet: at most so much.")]
_USAGE_HELP = "With `price`: tokens found in the cache, computed, and written."
UsageOption = Annotated[str | None, typer.Option("--usage", metavar="HIT,MISS,OUT", help=_USAGE_HELP)]
Hours = Annotated[str | None, typer.Option("--hours", metavar="N", help="With `price`: GPU-hours of --chip.")]
Api = Annotated[str, typer.Option("--api", metavar="NAME", help="With `price`: whose prices.")]
_AT_HELP = "With `price`: a day, or a moment with its timezone; left out: two bills."
At = Annotated[str | None, typer.Option("--at", metavar="WHEN", help=_AT_HELP)]
CurrencyOption = Annotated[str, typer.Option("--currency", metavar="usd|cny", help="With `price`.")]
Explain = Annotated[bool, typer.Option("--explain", help="Formula and source of each number.")]


def plan(
    model: Model,
    plan_file: Plan = None,
    chip: Chip = "H800",
    tokens: Tokens = 14.8e12,
    prices: Prices = None,
    imbalance: Imbalance = 1.0,
    fleet: Fleet = None,
    deadline: Deadline = None,
    budget: Budget = None,
    usage: UsageOption = None,
    hours: Hours = None,
    api: Api = "deepseek-r1",
    at: At = None,
    currency: CurrencyOption = "usd",
    explain: Explain = False,
    overrides: Overrides = None,
) -> Result:
    """Say what training MODEL will take: memory of the fullest rank, seconds of a step, days, GPU-hours and the bill.

    Example: sprat plan v3 --explain
    """
    from sprat.cli.plan_price import price
    from sprat.cli.plan_search import find_layouts
    from sprat.config import ParallelPlan, parse
    from sprat.config.base import load
    from sprat.config.parallel import v3_plan
    from sprat.plan.families import load_shape
    from sprat.plan.prices import load_prices
    from sprat.plan.quote import make_quote

    book = load_prices() if prices is None else load_prices(prices)
    if model == "price":
        of_plans = {
            "--plan": plan_file,
            "--fleet": fleet,
            "--deadline": deadline,
            "--budget": budget,
            "--set": overrides or None,
        }
        _refuse(of_plans, "for a plan", "sprat plan price", "name a model")
        return price(book, usage=usage, hours=hours, api=api, chip=chip, at=at, currency=currency)
    of_bills = {"--usage": usage, "--hours": hours, "--at": at, "--currency": None if currency == "usd" else currency}
    _refuse(of_bills, "for a bill alone", f"sprat plan {model}", "write: sprat plan price")
    shape, changes = load_shape(model), list(overrides or ())
    if plan_file is not None:
        layout = load(ParallelPlan, plan_file, changes)
    else:
        is_v3 = model == "v3" or model.lower() == "deepseekv3"  # the names, and no folder that is called so
        table = v3_plan().model_dump() if is_v3 else {"sequence_length": 4096}
        layout = parse(ParallelPlan, table, where="--set", overrides=changes)
    if fleet is not None:
        limits = {"deadline": deadline, "budget": budget}
        return find_layouts(shape, layout, fleet, changes, tokens=tokens, book=book, imbalance=imbalance, **limits)
    if deadline is not None or budget is not None:
        todo = "add --fleet, or leave it away"
        raise ConfigError("--deadline and --budget bound a search", where="--deadline, --budget", todo=todo)
    quote = make_quote(shape, layout, chip, tokens=tokens, book=book, imbalance=imbalance)
    return Result(quote.to_dict(), _table(quote, explain), 0 if quote.fits else ConfigError.exit_code)


def _refuse(options: dict[str, Any], what_for: str, where: str, todo: str) -> None:
    """Refuse those of ``options`` that are given: nothing is left unheard."""
    if given := [name for name, value in options.items() if value is not None]:
        raise ConfigError(f"{', '.join(given)}: {what_for}", where=where, todo=todo)


def _number(value: float, unit: str) -> str:
    """A number as a person reads it."""
    if unit.startswith("bytes") or (not unit and value >= 1e6):
        return f"{value:,.0f}" if value < 1e9 else f"{value / 1e9:,.2f} B"
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.3f} M" if abs(value) < 1e9 else f"{value / 1e9:,.1f} G"
    return f"{value:,.4g}" if abs(value) < 9999.5 else f"{value:,.0f}"  # four digits, and never an exponent


def _interval(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"{_number(figure.low, figure.unit)} … {_number(figure.high, figure.unit)}"


def _table(quote: Quote, explain: bool) -> Any:
    """The screen; what comes from files is ``Text``, since rich reads brackets and colons of a string as markup."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    layout = quote.plan
    title = f"{quote.model} on {layout.world_size:,} x {quote.chip}: data {layout.data_ranks}, tensor {layout.tensor}, "
    title += f"pipeline {layout.pipeline} ({layout.schedule}), expert {layout.expert}, {layout.precision}"
    figures = Table(box=None, pad_edge=False)
    for column in ("", "value", "90 % interval", *(("formula", "source") if explain else ())):
        figures.add_column(column, justify="right" if column in ("value", "90 % interval") else "left")
    for each in quote.figures:
        row = [each.name, f"{_number(each.value, each.unit)} {each.unit}".rstrip(), _interval(each)]
        figures.add_row(*row, *((each.formula, Text(each.source)) if explain else ()))
    ranks = f"rank {quote.memory.rank} of the pipeline, the fullest: {quote.memory.layers} layers"
    memory = Table(box=None, pad_edge=False)
    for column in ("", "GiB", *(("formula", "source") if explain else ())):
        memory.add_column(column, justify="right" if column == "GiB" else "left")
    for term in quote.memory.terms:
        row = [term.name, f"{term.bytes / 2**30:,.2f}"]
        memory.add_row(*row, *((term.formula, term.source) if explain else ()))
    memory.add_row("in all", f"{quote.memory.bytes / 2**30:,.2f}", *(("", "") if explain else ()))
    steps = Table(box=None, pad_edge=False)
    for column in ("", "seconds", "90 % interval", "formula", "source"):
        steps.add_column(column, justify="right" if column in ("seconds", "90 % interval") else "left")
    for each in quote.step_terms:
        steps.add_row(each.name, _number(each.value, "s"), _interval(each), each.formula, each.source)
    parts: list[Any] = ["", "A step on the mean rank", steps] if explain else []
    notes = map(Text, [*quote.notes, "the bill leaves out: " + "; ".join(quote.leaves_out)])
    return Group(Text(title), "", figures, *parts, "", f"Memory of {ranks}", memory, "", *notes)

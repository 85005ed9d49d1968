"""``sprat plan --fleet``: the best layouts of a model on a fleet, what nearly fitted, and why the rest fell."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from sprat.cli.verb import Result
from sprat.errors import ConfigError

if TYPE_CHECKING:
    from sprat.config import ParallelPlan
    from sprat.plan.hardware import Chip
    from sprat.plan.prices import PriceBook
    from sprat.plan.search import Candidate, Found, Goal
    from sprat.plan.shapes import ModelShape

SHOWN = 10  # proposals on the screen
SEARCHED = (
    "data_replicate", "data_shard", "tensor", "pipeline", "expert", "expert_tensor", "context", "schedule",
    "virtual_stages", "stage_layers", "micro_batch", "zero",
)  # fmt: skip


def parse_fleet(text: str) -> tuple[tuple[Chip, int], ...]:
    """``2048xH800`` or ``512xH800,512xA100``: chips, and how many of each.

    Raises:
        ConfigError: it is not written so, or a chip is unknown.
    """
    from sprat.plan.hardware import chip

    fleet: dict[str, int] = {}  # by the catalogue's name: a kind that is written twice is one kind
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*[xX*]\s*(.+?)\s*", part)
        if match is None or int(match[1]) < 1:
            raise ConfigError(f"cannot read {part[:40]!r}", where="--fleet", todo="write it as 2048xH800,512xA100")
        name = chip(match[2]).name
        fleet[name] = fleet.get(name, 0) + int(match[1])
    return tuple((chip(name), count) for name, count in fleet.items())


def _unheard(changes: list[str]) -> list[str]:
    """A note of those ``--set`` that do not count, since the search chooses by itself."""
    names = [change[:40] for change in changes if change.partition("=")[0].strip() in SEARCHED]
    return [f"not counted, since the search chooses by itself: {', '.join(names)}"] if names else []


def find_layouts(
    shape: ModelShape,
    base: ParallelPlan,
    fleet: str,
    changes: list[str],
    *,
    tokens: float,
    deadline: float | None,
    budget: float | None,
    book: PriceBook,
    imbalance: float,
) -> Result:
    """What ``sprat plan --fleet`` prints; exit code 2 where no layout fits."""
    from sprat.plan.search import Goal, search
    from sprat.plan.step import StepOptions

    chips = parse_fleet(fleet)
    price, notes = _price(chips, book)
    limits = {
        "deadline_days": math.inf if deadline is None else deadline,
        "budget": math.inf if budget is None else budget,
    }
    if budget is not None and not price:
        raise ConfigError("a budget, and no price of an hour", where="--budget", todo="add the chip to a --prices book")
    goal = Goal(shape, chips, base, tokens, price=price, options=StepOptions(imbalance=imbalance), **limits)
    found = search(goal)
    notes += [_interval(goal), *_unheard(changes)]
    return Result(_facts(found, notes), _screen(goal, found, notes), 0 if found.proposals else ConfigError.exit_code)


def _price(chips: tuple[tuple[Chip, int], ...], book: PriceBook) -> tuple[float, list[str]]:
    """Money of a chip's hour, mean over the fleet, and what it is; 0 where the book has none."""
    from sprat.plan.prices import gpu_price

    try:
        prices = [(gpu_price(chip.name, book=book), count) for chip, count in chips]
    except ConfigError as error:
        return 0.0, [f"no cost: {error}"]
    mean = sum(float(price.usd or 0) * count for price, count in prices) / sum(count for _, count in prices)
    each = ", ".join(f"{price.chip} ${price.usd} (since {price.since}, {price.source})" for price, _ in prices)
    return mean, [f"an hour: {each}"]


def _interval(goal: Goal) -> str:
    """What the calibration says of seconds, days and cost."""
    from sprat.plan.calibration import fit
    from sprat.plan.published import read_rows

    calibration = fit(read_rows())
    recipe = {"fp8": "fp8-cs"}.get(goal.base.precision, goal.base.precision)
    ends = [calibration.factor(chip.name, recipe, goal.shape.name).around(1.0) for chip, _ in goal.fleet]
    middles = [calibration.factor(chip.name, recipe, goal.shape.name).median for chip, _ in goal.fleet]
    low = min(1.0, *(middle * end[0] for middle, end in zip(middles, ends, strict=True)))
    high = max(1.0, *(middle * end[1] for middle, end in zip(middles, ends, strict=True)))
    span = f"{100 * (low - 1):+.0f} % to {100 * (high - 1):+.0f} %"
    return f"seconds, days and USD as the catalogue has it; 90 % interval from published rows, for all alike: {span}"


def _facts(found: Found, notes: list[str]) -> dict[str, Any]:
    """As JSON has it."""

    def one(candidate: Candidate) -> dict[str, Any]:
        facts = {name: getattr(candidate, name) for name in ("seconds", "memory_gib", "days", "cost", "reason")}
        return facts | {"plan": candidate.plan.model_dump(mode="json")}

    return {
        "proposals": [one(each) for each in found.proposals],
        "near": [one(each) for each in found.near],
        "reasons": found.reasons,
        "listed": found.listed,
        "left": found.left,
        "notes": notes,
    }


def _screen(goal: Goal, found: Found, notes: list[str]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    fleet = " + ".join(f"{count:,} x {chip.name}" for chip, count in goal.fleet)
    title = f"{goal.shape.name} on {fleet}: {found.listed:,} layouts, {len(found.proposals)} fit, best first"
    table = Table(box=None, pad_edge=False)
    for column in ("step s", "GiB", "days", "USD", "layout"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for each in found.proposals[:SHOWN]:
        cost = f"{each.cost:,.0f}" if each.cost else ""
        table.add_row(f"{each.seconds:.2f}", f"{each.memory_gib:.1f}", f"{each.days:.1f}", cost, _words(each.plan))
    near = [f"nearly: {each.seconds:.2f} s, {_words(each.plan)}: {each.reason}" for each in found.near[:5]]
    fell = [f"fell: {count:,} layouts, {reason}" for reason, count in found.reasons.items()]
    if found.left:
        fell.append(
            f"not looked at, since time was up: {found.left:,} layouts, by the estimate no faster than the rest"
        )
    return Group(Text(title), "", table, "", *map(Text, near), "", *map(Text, (*fell, *notes)))


def _words(plan: ParallelPlan) -> str:
    """A layout in one line; what is 1 or off is left out."""
    pipeline = f"pipeline {plan.pipeline} {plan.schedule}" if plan.pipeline > 1 else f"ZeRO-{plan.zero}"
    degrees = {"data": plan.data_ranks, "tensor": plan.tensor, "context": plan.context, "expert": plan.expert}
    words = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1] + [pipeline]
    if plan.virtual_stages > 2:
        words.append(f"{plan.virtual_stages} stages a rank")
    if plan.micro_batch > 1:
        words.append(f"micro-batch {plan.micro_batch}")
    if plan.recompute != "none":
        words.append("recompute " + (plan.recompute if isinstance(plan.recompute, str) else "+".join(plan.recompute)))
    if plan.stage_layers:
        words.append(f"layers {'+'.join(map(str, plan.stage_layers))}")
    return ", ".join(words)

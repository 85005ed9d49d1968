"""What a run will take, before it starts: counts, memory, step, time and money, each with formula, source and interval.

Counts and money are arithmetic. A step is an estimate, so its interval is the calibration's, and all that follows from
it (days, GPU-hours, the bill) carries the same. A chip and precision in published rows gets their factor; one in no row
keeps the catalogue's figure, and an interval that reaches as far as the factor of its relatives would take it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import cache
from typing import Any

from sprat.config.parallel import ParallelPlan
from sprat.errors import ConfigError
from sprat.plan.bills import LEFT_OUT, bill_training
from sprat.plan.calibration import Calibration, fit
from sprat.plan.counts import count_parameters, forward_flops, kv_bytes_per_token, training_flops
from sprat.plan.families import load_shape
from sprat.plan.goodput import goodput
from sprat.plan.hardware import chip as find_chip
from sprat.plan.memory import RankMemory, fullest_rank
from sprat.plan.prices import Currency, GpuPrice, PriceBook, gpu_price
from sprat.plan.published import ROWS_FILE, read_rows
from sprat.plan.shapes import ModelShape
from sprat.plan.step import StepEstimate, StepOptions, step_time

GIB = 2**30
SAVE_SECONDS, RESTART_SECONDS = 60.0, 600.0  # assumed, for ``progress under failures``
_DAY = 86400.0


@dataclass(frozen=True)
class Figure:
    """One number of a quote; ``low`` and ``high`` are its 90 % interval, None where it is exact arithmetic."""

    name: str
    value: float
    unit: str
    formula: str
    source: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Quote:
    """What one run will take; ``notes`` say what does not fit and what is not known."""

    model: str
    chip: str
    plan: ParallelPlan
    figures: tuple[Figure, ...]
    memory: RankMemory
    fits: bool
    notes: tuple[str, ...]
    step_terms: tuple[Figure, ...] = ()  # seconds of each kind of work in a step, mean over ranks; they add up to it
    leaves_out: tuple[str, ...] = LEFT_OUT

    def figure(self, name: str) -> Figure:
        """The figure that is called ``name``."""
        return next(each for each in self.figures if each.name == name)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "model": self.model,
            "chip": self.chip,
            "plan": self.plan.model_dump(mode="json"),
            "world_size": self.plan.world_size,
            "figures": {each.name: {k: v for k, v in asdict(each).items() if k != "name"} for each in self.figures},
            "memory": {
                "rank": self.memory.rank,
                "bytes": self.memory.bytes,
                "fits": self.fits,
                "terms": [asdict(term) for term in self.memory.terms],
            },
            "step_terms": {
                each.name: {k: v for k, v in asdict(each).items() if k != "name"} for each in self.step_terms
            },
            "notes": list(self.notes),
            "leaves_out": list(self.leaves_out),
        }


def make_quote(
    shape: ModelShape,
    plan: ParallelPlan,
    chip_name: str,
    *,
    tokens: float,
    price: GpuPrice | None = None,
    book: PriceBook | None = None,
    currency: Currency = "usd",
    imbalance: float = 1.0,
) -> Quote:
    """The quote for training ``shape`` on ``tokens`` tokens under ``plan``.

    Args:
        price: of a GPU-hour; None: the book's newest of the chip, and no bill where it has none.
        imbalance: tokens of the busiest rank's experts over the mean.

    Raises:
        ConfigError: the plan does not fit the model, the chip is not known, or ``tokens`` is absurd.
    """
    if not 1 <= tokens < 1e20:
        raise ConfigError(f"{tokens} tokens", where="tokens", todo="give a number from 1 to below 10^20")
    accelerator = find_chip(chip_name)
    memory = fullest_rank(shape, plan, imbalance=imbalance)
    step = step_time(shape, plan, accelerator, StepOptions(imbalance=imbalance))
    step, low, high, notes = _calibrated(shape, step, accelerator.name, imbalance)
    figures = [*_counts(shape, plan), *_time(step, low, high, tokens)]
    fits = memory.bytes <= accelerator.memory_gib * GIB
    if not fits:
        over = memory.bytes / GIB - accelerator.memory_gib
        notes.append(
            f"rank {memory.rank} needs {over:.1f} GiB more than the {accelerator.memory_gib:g} GiB of the chip"
        )
    if price is None:
        try:
            price = gpu_price(accelerator.name, book=book, currency=currency)
        except ConfigError as error:
            notes.append(f"no bill: {error.what}")
    if price is not None:
        figures.append(_bill(figures, price, currency))
    ends = (low / step.seconds, high / step.seconds)
    terms = [
        Figure(each.name, each.value, "s", each.formula, each.source, *sorted(end * each.value for end in ends))
        for each in step.explain()
        if each.name in step.terms() and each.value
    ]
    return Quote(shape.name, accelerator.name, plan, tuple(figures), memory, fits, tuple(notes), tuple(terms))


def _counts(shape: ModelShape, plan: ParallelPlan) -> list[Figure]:
    """Arithmetic on the shape."""
    counts, length = count_parameters(shape), plan.sequence_length
    source = shape.source or shape.name
    causal, full = (training_flops(shape, length, causal=each) for each in (True, False))
    figures = [
        Figure("parameters", counts.total, "", "all matrices and vectors, without MTP", source),
        Figure("active parameters", counts.active, "", "those that a token uses, without the embedding", source),
        Figure("KV cache", kv_bytes_per_token(shape), "bytes/token", "2 bytes x numbers that attention caches", source),
        Figure("FLOPs, causal", causal, "FLOP/token", "3 x (2 x active + attention over the keys seen)", source),
        Figure("FLOPs, not causal", full, "FLOP/token", "3 x (2 x active + attention over all keys)", source),
        Figure("forward FLOPs, causal", forward_flops(shape, length), "FLOP/token", "2 x active + attention", source),
    ]
    if shape.mtp:
        formula = "MTP modules; published sizes leave eh_proj out"
        figures.insert(2, Figure("MTP parameters", counts.mtp_without_join, "", formula, source))
    return figures


@cache
def _calibration() -> Calibration:
    """The one on the published rows that lie beside this file."""
    return fit(read_rows(ROWS_FILE))


def _calibrated(
    shape: ModelShape, step: StepEstimate, chip_name: str, imbalance: float
) -> tuple[StepEstimate, float, float, list[str]]:
    """(the step with its factor, the ends of its interval in seconds, notes)."""
    calibration = _calibration()
    precision = step.plan.precision
    recipes = {row.precision for row in calibration.rows}
    named = (
        precision if precision in recipes else next((r for r in sorted(recipes) if r.startswith(precision)), precision)
    )
    models = {row.model for row in calibration.rows}
    model = next((each for each in sorted(models) if load_shape(each).layers == shape.layers), shape.name)
    factor = calibration.factor(chip_name, named, model)
    low, high = factor.around(step.seconds * factor.median)
    notes = []
    if model not in models:
        notes.append(f"{shape.name} is in no published row: its interval is wider")
    if (chip_name, named) not in {row.group for row in calibration.rows}:
        notes.append(f"{chip_name} in {precision} is in no published row: the catalogue's figure, a wider interval")
        return step, min(low, step.seconds), max(high, step.seconds), notes
    options = StepOptions(imbalance=imbalance, factor=factor.median)
    return step_time(shape, step.plan, step.chips, options), low, high, notes


def _time(step: StepEstimate, low: float, high: float, tokens: float) -> list[Figure]:
    """What follows from the seconds of a step, and its interval."""
    plan, seconds = step.plan, step.seconds
    steps = tokens / plan.step_tokens
    source = "simulated schedule (sprat/plan/step.py); interval from published rows (sprat/plan/calibration.py)"
    ranks = plan.world_size

    def figure(name: str, unit: str, formula: str, of_seconds: float, inverse: float = 0.0) -> Figure:
        """Proportional to the seconds of a step, or (``inverse``) to their reciprocal."""
        if inverse:
            return Figure(name, inverse / seconds, unit, formula, source, inverse / high, inverse / low)
        return Figure(name, of_seconds * seconds, unit, formula, source, of_seconds * low, of_seconds * high)

    return [
        figure("step", "s", "end of the simulated table + gradients + optimizer", 1.0),
        figure("bubble", "s", "waiting in the pipeline, mean over ranks", step.bubble / seconds),
        figure("tokens a second", "1/s/chip", "tokens of a step / seconds / chips", 0, plan.step_tokens / ranks),
        figure("MFU, causal", "", "tokens/s x causal FLOPs / bf16 peak", 0, step.mfu(causal=True) * seconds),
        figure("MFU, not causal", "", "tokens/s x full FLOPs / bf16 peak", 0, step.mfu(causal=False) * seconds),
        Figure(
            "progress under failures",
            goodput(ranks, save_seconds=SAVE_SECONDS, restart_seconds=RESTART_SECONDS).share,
            "of the time",
            f"Daly: saves of {SAVE_SECONDS:g} s, restarts of {RESTART_SECONDS:g} s; not in time and bill",
            "sprat/plan/goodput.py; failures as arXiv 2407.21783, section 3.3.4",
        ),
        figure("time", "days", "steps x seconds of a step", steps / _DAY),
        figure("GPU-hours", "h", "time x chips", steps * ranks / 3600),
        figure(
            "energy", "MWh", "GPU-hours x watts of the chip at full load", steps * ranks / 3600 * _watts(step) / 1e6
        ),
    ]


def _watts(step: StepEstimate) -> float:
    """Of the mean chip."""
    return sum(each.watts for each in step.chips) / len(step.chips)


def _bill(figures: list[Figure], price: GpuPrice, currency: Currency) -> Figure:
    """GPU-hours times the price."""
    hours = next(each for each in figures if each.name == "GPU-hours")
    low, value, high = (
        float(bill_training(Decimal(repr(each)), price, currency=currency).total)
        for each in (hours.low or 0.0, hours.value, hours.high or 0.0)
    )
    bill = bill_training(Decimal(repr(hours.value)), price, currency=currency)
    return Figure("bill", value, currency.upper(), f"GPU-hours x {bill.price}", bill.source, low, high)

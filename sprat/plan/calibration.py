"""How far the estimates were off, and the interval that follows: published rows against ``step_time``.

A row names a model, a chip, a layout and tokens a second. One factor for each chip and precision is fitted, and nothing
else: the mean log error of its rows, drawn towards the mean of all rows as far as few rows say little (an empirical
Bayes estimate). What is left is the spread that an interval has to cover: that of rows around their factor, and of
factors around their mean where a chip or a precision is in no row. Nothing is silent: an unknown pair has the mean
factor and the wider interval; a model in no row widens it once more.
"""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sprat.config.parallel import ParallelPlan
from sprat.errors import ConfigError
from sprat.plan.families import load_shape
from sprat.plan.hardware import catalogue, chip
from sprat.plan.layer_time import RECIPES
from sprat.plan.step import StepEstimate, StepOptions, step_time

# How the tables write precisions. A release that names none has the reader's inference in ``extra``.
PRECISIONS = {
    "bf16": "bf16", "fp8": "fp8-cs", "fp8-cs": "fp8-cs", "fp8-ds": "fp8-ds", "fp8-mx": "fp8-mx", "mxfp8": "fp8-mx",
    "fp8-sc": "fp8-sc", "nvfp4": "fp4", "fp4": "fp4", "unknown": "fp8-cs", "": "fp8-cs",
}  # fmt: skip

# What the column ``extra`` may say: what is not here is named in ``Row.remarks``, since it is not reckoned with.
UNDERSTOOD = {
    "", "tokendrop", "dropless", "routing", "granularity", "ga", "precision not in source", "precision_inferred", "check",
    "mtp",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One published measurement."""

    release: str
    model: str
    system: str
    precision: str  # of ``RECIPES``
    inferred: bool  # the source does not name the precision
    tokens_per_second: float  # of one GPU
    tflops: float
    plan: ParallelPlan
    options: StepOptions
    remarks: tuple[str, ...] = ()  # what had to be changed so that the layout holds together

    @property
    def group(self) -> tuple[str, str]:
        """What has a factor of its own."""
        return self.system, self.precision


def read_rows(path: Path, release: str = "") -> list[Row]:
    """The rows of ``path`` (of ``release`` alone) that say tokens a second; lines that begin with # are comments.

    Raises:
        ConfigError: a value is no number, or a model, chip or precision is not known.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    rows = []
    for number, table in enumerate(csv.DictReader(lines), 2):
        if table["tokens_per_s_per_gpu"] and release in ("", table["release"]):
            rows.append(read_row(table, f"{path.name}, row {number}"))
    return rows


def read_row(table: dict[str, str], where: str) -> Row:
    """One row; a layout that contradicts itself is made to hold together, and ``remarks`` say how.

    Raises:
        ConfigError: see ``read_rows``.
    """

    def number(name: str, default: int = 1) -> int:
        text = (table.get(name) or "").strip()
        if text and not re.fullmatch(r"\d+", text):
            raise ConfigError(f"{name} is {text[:40]!r}", where=where, todo="give a whole number")
        return int(text) if text else default

    extra = table.get("extra") or ""
    facts = dict(part.strip().partition("=")[::2] for part in extra.split(";"))
    named = (table.get("precision") or "").strip().lower().replace("_", "-")
    precision = named or facts.get("precision_inferred", "").partition(" ")[0].lower()
    if precision not in PRECISIONS:
        todo = f"use one of {', '.join(filter(None, PRECISIONS))}"
        raise ConfigError(f"unknown precision {precision!r}", where=where, todo=todo)
    plan, remarks = _plan(table, number, extra)
    remarks += [f"not understood: {word}" for word in facts if word.partition(":")[0] not in UNDERSTOOD]
    mtp = facts.get("mtp", "yes") != "no"
    adapters = "lora" in f"{table.get('task', '')} {extra}".lower()
    return Row(
        table["release"], table["model"], table["system"], PRECISIONS[precision], not named,
        float(table["tokens_per_s_per_gpu"]), float(table.get("model_tflops_per_gpu") or "nan"),
        plan, StepOptions(PRECISIONS[precision], mtp, not adapters, deduplicates="tokendrop" not in extra), tuple(remarks),
    )  # fmt: skip


def _plan(table: dict[str, str], number: Any, extra: str) -> tuple[ParallelPlan, list[str]]:
    """The layout of a row, and what was changed in it."""
    remarks: list[str] = []
    tensor, pipeline, context = max(1, number("tp")), max(1, number("pp")), max(1, number("cp"))
    data = max(1, number("gpus") // (tensor * pipeline * context))
    fsdp = number("fsdp", 0)
    shard = max(1, min(fsdp // context, data)) if fsdp > 1 else data
    if data % shard:
        shard = data
        remarks.append(f"fsdp {fsdp} does not divide {data} data ranks")
    expert_tensor = max(1, number("etp"))
    expert, ranks = max(1, number("ep")), shard * context * tensor
    while expert > 1 and ranks % (expert * expert_tensor):
        expert //= 2
    if expert != max(1, number("ep")):
        remarks.append(f"ep {number('ep')} does not divide the {ranks} ranks of a stage; {expert} taken")
    chunks = max(1, number("vp")) if pipeline > 1 else 1
    micro = max(1, number("micro_batch"))
    count = max(1, number("global_batch") // (data * micro))
    rounds = max(1, count // pipeline)
    if chunks > 1 and count % rounds:
        count = rounds * pipeline
        remarks.append("micro-batches taken as a multiple of the pipeline")
    return ParallelPlan(
        data_replicate=data // shard, data_shard=shard, tensor=tensor, pipeline=pipeline, context=context,
        expert=expert, expert_tensor=expert_tensor, schedule="interleaved" if chunks > 1 else "1f1b",
        virtual_stages=chunks, micro_batch=micro, global_batch=count * data * micro,
        sequence_length=number("sequence_length", 4096), zero=3 if fsdp > 1 else 1,
        recompute="full" if re.search(r"recompute=full", extra) else "none",
    ), remarks  # fmt: skip


def estimate(row: Row, factor: float = 1.0) -> StepEstimate:
    """The step of ``row`` with ``factor``."""
    return step_time(load_shape(row.model), row.plan, chip(row.system), replace(row.options, factor=factor))


# Standard deviations of log factors: between generations of chips, chips of one, precisions, and pairs of both; between
# models, which get no factor but widen the interval; and between releases of the software that was measured. Assumed: a
# few dozen rows cannot tell them. What is left of a row is estimated.
SPREAD = {"generation": 0.08, "chip": 0.06, "precision": 0.06, "pair": 0.05, "model": 0.06, "release": 0.08}
PRIOR = 0.5  # standard deviation of the mean over everything, so wide that the rows say it
UNKNOWN_MODEL = 1.3  # an interval is as much wider for a model in no row
QUANTILE = 1.645  # two-sided 90 %


@dataclass(frozen=True)
class Factor:
    """By how much longer than its catalogue says a chip takes in a precision: median and relative 90 % interval."""

    median: float
    deviation: float  # of the log of a single prediction

    def around(self, seconds: float) -> tuple[float, float]:
        """The 90 % interval of an estimate of ``seconds`` that has the median factor in it."""
        wide = math.exp(QUANTILE * self.deviation)
        return seconds / wide, seconds * wide


@dataclass(frozen=True)
class Calibration:
    """Log errors of rows, and what they say of any chip and precision."""

    rows: tuple[Row, ...]
    errors: tuple[float, ...]  # log(published / estimated tokens a second)
    residual: float  # standard deviation of a row around everything that SPREAD names

    def factor(self, system: str, precision: str, model: str, *, release: str = "") -> Factor:
        """Of a step of ``model`` on ``system`` in ``precision``; an unknown chip, precision or model widens the interval.

        Args:
            release: of the software; one that is in no row adds the spread between releases.
        """
        covariance = _covariance(self.rows, self.residual)
        across = np.array([_shared(row.group, (system, precision)) for row in self.rows])
        mean = float(across @ np.linalg.solve(covariance, np.array(self.errors)))
        variance = _shared((system, precision), (system, precision))
        variance -= float(across @ np.linalg.solve(covariance, across))
        own = self.residual**2 + SPREAD["model"] ** 2
        if release not in {row.release for row in self.rows}:
            own += SPREAD["release"] ** 2
        deviation = math.sqrt(variance + own)
        if model not in {row.model for row in self.rows}:
            deviation *= UNKNOWN_MODEL
        return Factor(math.exp(-mean), deviation)


def _shared(one: tuple[str, str], other: tuple[str, str]) -> float:
    """Covariance of the log factors of two chips and precisions."""
    kin = [_generation(one[0]) == _generation(other[0]), one[0] == other[0], one[1] == other[1], one == other]
    names = ("generation", "chip", "precision", "pair")
    return PRIOR**2 + sum(SPREAD[name] ** 2 for name, same in zip(names, kin, strict=True) if same)


def _generation(system: str) -> str:
    known = {each.name: each.generation for each in catalogue().values()}
    return known.get(system, system)


def _covariance(rows: Sequence[Row], residual: float) -> Any:
    """Of the log errors of ``rows``, an array [rows, rows]."""
    count = len(rows)
    matrix = np.zeros((count, count))
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            matrix[i, j] = _shared(one.group, other.group)
            matrix[i, j] += SPREAD["model"] ** 2 * (one.model == other.model) + residual**2 * (i == j)
            matrix[i, j] += SPREAD["release"] ** 2 * (one.release == other.release)
    return matrix


def fit(rows: Iterable[Row]) -> Calibration:
    """The calibration on ``rows``: their log errors, and the residual spread that makes them likeliest.

    Raises:
        ConfigError: there is no row.
    """
    known = tuple(rows)
    if not known:
        raise ConfigError("no row to fit on", where="calibration", todo="give a table with at least one row")
    errors = np.array([math.log(row.tokens_per_second / estimate(row).tokens_per_second) for row in known])

    def unlikely(residual: float) -> float:
        covariance = _covariance(known, residual)
        return float(np.linalg.slogdet(covariance)[1] + errors @ np.linalg.solve(covariance, errors))

    residual = min((0.01 * step for step in range(2, 31)), key=unlikely)
    return Calibration(known, tuple(float(error) for error in errors), residual)


@dataclass(frozen=True)
class Prediction:
    """Tokens a second of one GPU: published, predicted, and the 90 % interval."""

    row: Row
    predicted: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Predicted over published, less 1."""
        return self.predicted / self.row.tokens_per_second - 1

    @property
    def inside(self) -> bool:
        """Whether the interval holds the published figure."""
        return self.low <= self.row.tokens_per_second <= self.high


def predict(calibration: Calibration, row: Row) -> Prediction:
    """What ``calibration`` says of ``row``, whose own figure is not looked at."""
    factor = calibration.factor(*row.group, row.model, release=row.release)
    middle = estimate(row, factor.median).tokens_per_second
    low, high = factor.around(middle)
    return Prediction(row, middle, low, high)


@dataclass(frozen=True)
class Score:
    """How good predictions were: mean absolute error, Spearman's rank correlation, share inside the 90 % interval."""

    rows: int
    mape: float
    rank_correlation: float
    inside: float
    width: float  # median of upper over lower end


def score(predictions: Sequence[Prediction]) -> Score:
    """Of ``predictions``.

    Raises:
        ConfigError: there are fewer than two.
    """
    if len(predictions) < 2:
        raise ConfigError(f"{len(predictions)} predictions", where="score", todo="give at least two")
    ranks = [_ranks(values) for values in zip(*((p.predicted, p.row.tokens_per_second) for p in predictions), strict=True)]
    return Score(
        len(predictions),
        float(np.mean([abs(p.error) for p in predictions])),
        float(np.corrcoef(ranks)[0, 1]),
        float(np.mean([p.inside for p in predictions])),
        float(np.median([p.high / p.low for p in predictions])),
    )


def _ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value, ties shared."""
    places: defaultdict[float, list[int]] = defaultdict(list)
    for place, value in enumerate(sorted(values)):
        places[value].append(place)
    return [sum(places[value]) / len(places[value]) for value in values]

"""How far the estimates were off, and the interval that follows: published rows against ``step_time``.

A row names a model, a chip, a layout and tokens a second. One factor for each chip and precision is fitted, and nothing
else: the mean log error of its rows, drawn towards the mean of all rows as far as few rows say little (an empirical
Bayes estimate). What is left is the spread that an interval has to cover: that of rows around their factor, and of
factors around their mean where a chip or a precision is in no row. Nothing is silent: an unknown pair has the mean
factor and the wider interval; a model in no row widens it once more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sprat.errors import ConfigError
from sprat.plan.hardware import catalogue
from sprat.plan.published import Row, estimate

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
        """Of a step of ``model`` on ``system`` in ``precision``; what is in no row widens the interval.

        Args:
            release: of the software; one that is in no row adds the spread between releases.
        """
        covariance = _covariance(self.rows) + self.residual**2 * np.eye(len(self.rows))
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
    known = catalogue().get(system)
    return known.generation if known else system


def _covariance(rows: Sequence[Row]) -> Any:
    """Of what ``SPREAD`` names in the log errors of ``rows``, an array [rows, rows]."""
    count = len(rows)
    matrix = np.zeros((count, count))
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            matrix[i, j] = _shared(one.group, other.group)
            matrix[i, j] += SPREAD["model"] ** 2 * (one.model == other.model)
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

    shared = _covariance(known)

    def unlikely(residual: float) -> float:
        covariance = shared + residual**2 * np.eye(len(known))
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
    ranks = [
        _ranks(values) for values in zip(*((p.predicted, p.row.tokens_per_second) for p in predictions), strict=True)
    ]
    return Score(
        len(predictions),
        float(np.mean([abs(p.error) for p in predictions])),
        float(np.corrcoef(ranks[0], ranks[1]).flat[1]),
        float(np.mean([p.inside for p in predictions])),
        float(np.median([p.high / p.low for p in predictions])),
    )


def _ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value, ties shared."""
    places: defaultdict[float, list[int]] = defaultdict(list)
    for place, value in enumerate(sorted(values)):
        places[value].append(place)
    return [sum(places[value]) / len(places[value]) for value in values]

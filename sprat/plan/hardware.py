"""The chips that the planner knows, and how long each kind of work takes on one.

Every model has the same form: a kernel takes as long as its arithmetic at the rate that products of its size reach, or
as moving its bytes, whichever is longer, and a fixed time for being started. A message takes its bytes over the
slowest link that it crosses, and a latency for each hop. Numbers of chips are data (``hardware.toml``, each with its
source); the forms are here.

Left out: clocks that fall with temperature, and links that others use at the same time. Both are in the factor of a
chip and precision that ``calibration.py`` fits, and in the width of the interval where none was fitted.
"""

# M, N, K sizes of a product

from __future__ import annotations

import difflib
import functools
import math
import tomllib
from importlib.resources import files
from typing import Self, get_args

from pydantic import Field, model_validator

from sprat.config.base import Config, parse
from sprat.config.parallel import Precision
from sprat.errors import ConfigError

TILE = 128  # rows and columns of a product that a compute unit takes at once
HOP_SECONDS = (
    8e-6  # latency of a collective: NCCL's own for small messages inside a node, and about that for a hop between
)


class Efficiency(Config):
    """What share of a generation's peaks is reached; see ``hardware.toml``."""

    gemm: dict[str, float]
    k_half: int = Field(ge=0)
    attention_forward: float = Field(gt=0, le=1)
    attention_backward: float = Field(gt=0, le=1)
    attention_half: int = Field(ge=0)
    memory: float = Field(gt=0, le=1)
    link: float = Field(gt=0, le=1)
    network: float = Field(gt=0, le=1)
    kernel: float = Field(gt=0, lt=1)  # seconds that a kernel takes beside its work
    source: dict[str, str]  # of products, attention, memory and links


class Chip(Config):
    """One accelerator or CPU: peaks in TFLOP/s, memory in GiB, bandwidths in GB/s (links one way), power in watts."""

    name: str = ""
    peak: dict[str, float]
    memory_gib: float = Field(gt=0, le=2**20)
    bandwidth: float = Field(gt=0, le=1e6)
    link: float = Field(gt=0, le=1e6)
    domain: int = Field(ge=1, le=2**16)
    network: float = Field(gt=0, le=1e6)
    watts: float = Field(gt=0, le=1e6)
    sms: int = Field(ge=1, le=2**16)
    generation: str
    attention: float = Field(1.0, gt=0, le=10)  # how much faster attention is than the generation's share says
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _peaks_are_rates(self) -> Self:
        if not self.peak or not all(0 < rate <= 1e6 for rate in self.peak.values()):
            raise ValueError("peak names at least one precision, each in TFLOP/s above 0")
        return self

    @property
    def efficiency(self) -> Efficiency:
        """The shares of its generation."""
        return efficiencies()[self.generation]

    def flops(self, precision: str) -> float:
        """Peak FLOP/s of products in ``precision``.

        Raises:
            ConfigError: the chip does not multiply in it.
        """
        if precision not in self.peak or precision not in self.efficiency.gemm:
            known = [each for each in get_args(Precision) if each in self.peak and each in self.efficiency.gemm]
            todo = f"use one of {', '.join(known)}"
            raise ConfigError(f"{self.name} does not multiply in {precision!r}", where="precision", todo=todo)
        return self.peak[precision] * 1e12

    def gemm_seconds(
        self, m: float, n: float, k: float, precision: str, *, groups: float = 1, moved: float = 0
    ) -> float:
        """Seconds of ``groups`` equal products M x K by K x N, started at once.

        Args:
            moved: bytes to move; 0: both inputs in ``precision`` and the result in bfloat16.

        A product is cut into tiles of 128 x 128; rows that fill no tile are computed all the same, the last wave of
        tiles leaves units idle (half of a wave on average), and K must be long beside what filling the pipeline takes.
        """
        if min(m, n, k, groups) <= 0:
            return 0.0
        efficiency = self.efficiency
        peak = self.flops(precision)
        rows, columns = math.ceil(m / TILE), math.ceil(n / TILE)
        waves = groups * rows * columns / self.sms
        share = efficiency.gemm[precision] * waves / (waves + 0.5) if waves > 0 else 1.0
        faster = peak / (self.peak.get("bf16", self.peak[precision]) * 1e12)
        share *= k / (k + efficiency.k_half * max(1.0, faster))
        arithmetic = 2.0 * groups * rows * TILE * n * k / (peak * share)
        size = {"fp4": 0.5625, "fp8": 1.0, "int8": 1.0, "bf16": 2.0, "fp16": 2.0}.get(precision, 4.0)
        moved = moved or groups * ((m * k + k * n) * size + 2.0 * m * n)
        return max(arithmetic, self.memory_seconds(moved)) + efficiency.kernel

    def attention_seconds(self, flops: float, keys: float, *, backward: bool = False) -> float:
        """Seconds of an attention core of ``flops`` (a backward's own count), where a query sees ``keys`` keys."""
        efficiency = self.efficiency
        share = efficiency.attention_backward if backward else efficiency.attention_forward
        share *= self.attention * keys / (keys + efficiency.attention_half)
        precision = "bf16" if "bf16" in self.peak else next(iter(self.peak))
        return flops / (self.peak[precision] * 1e12 * min(1.0, share)) + efficiency.kernel

    def memory_seconds(self, moved: float) -> float:
        """Seconds to read or write ``moved`` bytes of the chip's own memory."""
        return moved / (self.bandwidth * 1e9 * self.efficiency.memory)

    def rate(self, ranks: int, stride: int = 1) -> float:
        """Bytes a second, one way, that a chip exchanges with ``ranks`` chips, each ``stride`` ranks from the next."""
        inside = ranks * stride <= self.domain
        share, speed = (self.efficiency.link, self.link) if inside else (self.efficiency.network, self.network)
        return share * speed * 1e9

    def ring_seconds(self, size: float, ranks: int, stride: int = 1) -> float:
        """Seconds of a reduce-scatter or an all-gather of ``size`` bytes in all among ``ranks``; an all-reduce is both.

        Across domains the part inside a domain runs over its links and each chip carries its share over the network.
        """
        if ranks <= 1 or size <= 0:
            return 0.0
        inside = max(1, min(ranks, self.domain // max(1, stride)))
        outside = ranks / inside
        seconds = size * (inside - 1) / inside / self.rate(inside, stride)
        if outside > 1:
            apart = self.efficiency.network * self.network * 1e9
            seconds = max(seconds, size / inside * (outside - 1) / outside / apart)
        return seconds + HOP_SECONDS * (1 + math.log2(ranks))

    def all_to_all_seconds(self, size: float, ranks: int, domains: float = 0.0) -> float:
        """Seconds in which each chip sends ``size`` bytes to ``ranks`` chips in equal parts, its own among them.

        Args:
            domains: what of ``size`` goes to other domains, where that is not the even share: a token that goes once to
                each of them and is handed on inside; 0: the even share.
        """
        if ranks <= 1 or size <= 0:
            return 0.0
        inside = min(ranks, self.domain)
        near = size * (inside - 1) / ranks / self.rate(inside)
        far = size * (ranks - inside) / ranks
        if far <= 0:
            return near + HOP_SECONDS
        apart = self.efficiency.network * self.network * 1e9
        if domains:
            far = min(far, size * domains)
            near = size * (inside - 1) / inside / self.rate(inside)  # and is handed on inside
        return max(near, far / apart) + 2 * HOP_SECONDS


@functools.cache
def _tables() -> dict[str, dict[str, dict[str, object]]]:
    return tomllib.loads(files("sprat.plan").joinpath("hardware.toml").read_text(encoding="utf-8"))


@functools.cache
def efficiencies() -> dict[str, Efficiency]:
    """By generation."""
    where = "sprat/plan/hardware.toml"
    return {name: parse(Efficiency, dict(table), where=where) for name, table in _tables()["efficiency"].items()}


@functools.cache
def catalogue() -> dict[str, Chip]:
    """All chips, by name."""
    where = "sprat/plan/hardware.toml"
    return {name: parse(Chip, {"name": name, **table}, where=where) for name, table in _tables()["chips"].items()}


def chip(name: str) -> Chip:
    """The chip called ``name``, however its letters are cased.

    >>> chip("h800").link
    200.0

    Raises:
        ConfigError: there is none; it names the nearest.
    """
    names = {each.lower(): each for each in catalogue()}
    if name.lower() in names:
        return catalogue()[names[name.lower()]]
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    todo = f"perhaps you mean {names[close[0]]}; " if close else ""
    raise ConfigError(f"unknown chip {name!r}", where="fleet", todo=f"{todo}there are {', '.join(catalogue())}")

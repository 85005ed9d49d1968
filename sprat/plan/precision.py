"""How products are computed: the multipliers' precision, what casts cost, and what goes to experts in which width."""

from __future__ import annotations

from dataclasses import dataclass

from sprat.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """How products are computed: the precision of the multipliers, and bytes that a cast moves for each number.

    ``rate`` is what of the precision's large-product rate is left where scales are applied inside the product.
    """

    peak: str
    cast_bytes: float = 0.0
    rate: float = 1.0
    dispatch_bytes: float = 2.0  # of a number that goes to its expert


RECIPES = {
    "fp32": Recipe("fp32", dispatch_bytes=4.0),
    "bf16": Recipe("bf16"),
    "fp16": Recipe("fp16"),
    "fp8": Recipe("fp8", 4.0, dispatch_bytes=1.0),  # as DeepSeek-V3 has it: 1 x 128 tiles, dispatched in FP8
    "fp8-ds": Recipe("fp8", 4.0),  # scales from the steps before
    "fp8-cs": Recipe("fp8", 6.0),  # one scale a tensor, which is read for it first
    "fp8-mx": Recipe("fp8", 4.2),  # a scale for 32 numbers, in hardware
    "fp8-sc": Recipe("fp8", 4.1, 0.9),  # tiles of 1 x 128 and 128 x 128: sums are promoted every 128
    "fp4": Recipe("fp4", 8.0),  # NVFP4: a maximum, a Hadamard rotation, stochastic rounding (arXiv 2509.25149)
}


def recipe_of(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        ConfigError: there is none.
    """
    if name not in RECIPES:
        raise ConfigError(f"unknown precision {name!r}", where="precision", todo=f"use one of {', '.join(RECIPES)}")
    return RECIPES[name]

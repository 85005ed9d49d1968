"""Squeezing any model: what ``sprat quantize MODEL`` knows beyond a road's ``quant`` table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sprat.config.base import load, merge_tables, override, parse
from sprat.config.recipe import QuantConfig
from sprat.errors import ConfigError

Clip = Literal["extreme", "mse", "minmax"]
ActivationOrder = Literal["static", "none"]
Part = Annotated[str, Field(min_length=1)]
FewTokens = Literal["nearest", "all", "refuse"]


class QuantizeConfig(QuantConfig):
    """How the weights of any model are rounded, and what is done to them before."""

    moved_keys: ClassVar[Mapping[str, str]] = {"quant": ""}

    symmetric: bool = True  # codes -8 ... 7; false: 0 ... 15 and a minimum for each group (4 bits only)
    zero_points: bool = False  # the minimum is a whole number of scales, as files of AWQ and compressed-tensors have it
    clip: Clip = (
        "extreme"  # the extreme lies at an end of the codes; mse: clip it where that errs less; minmax: max / 7.5
    )
    awq: bool = False  # move the size of loud channels from inputs to weights first (arXiv 2306.00978)
    rotation: Literal["none", "hadamard"] = "none"  # of the residual stream, first of all (arXiv 2404.00456)
    seed: int = Field(0, ge=0, lt=2**63)  # of the rotation
    drop_mtp: bool = False  # leave out the modules that draft tokens: their norms stand in a rotation's way
    activation_order: ActivationOrder = "static"  # GPTQ: columns of high energy first, or as they lie
    damping: float = Field(0.01, gt=0, le=1e3)  # GPTQ: share of the mean energy that is added to every channel's
    precision: Literal["float64", "float32"] = (
        "float64"  # GPTQ's factorisation; float32 as in llm-compressor, bit for bit
    )
    calibration_tokens: int = Field(16_384, ge=1, lt=2**31)
    expert_tokens: int = Field(
        0, ge=0, lt=2**31
    )  # an expert that fewer reach is not fitted; 0: one for each input channel
    few_tokens: FewTokens = (
        "nearest"  # such an expert, or matrix of more channels than tokens, is rounded so, sees all, or is an error
    )
    eight_bits: tuple[Part, ...] = ()  # parts of names: matrices that have one of them keep eight bits, as "down_proj"
    tune_steps: int = Field(0, ge=0, lt=2**31)  # in which scales learn what the dense model says (arXiv 2305.14152)
    tune_lr: float = Field(1e-4, gt=0, le=1)  # of the relative change of a scale

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if not self.symmetric and self.bits != 4:
            raise ValueError("symmetric=false is for bits=4")
        if not self.symmetric and self.clip == "minmax":
            raise ValueError("clip=minmax is for symmetric=true")
        if self.zero_points and self.symmetric:
            raise ValueError("zero_points is for symmetric=false")
        if self.precision == "float32" and not self.symmetric:
            raise ValueError("precision=float32 is for symmetric=true")
        if self.tune_steps and self.zero_points:
            raise ValueError("tune_steps is for zero_points=false: scales that move have no whole zero")
        return self

    @property
    def needs_text(self) -> bool:
        """Whether nothing can be done without calibration text."""
        return self.awq or self.rounding == "gptq" or self.tune_steps > 0


METHODS: Mapping[str, Sequence[str]] = {
    "nearest": ("rounding=nearest", "awq=false"),
    "gptq": ("rounding=gptq", "awq=false"),
    "awq": ("rounding=nearest", "awq=true", "clip=mse"),
}


def load_quantize_config(
    method: str | None = None,
    *,
    has_text: bool,
    recipe: str | None = None,
    table: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    where: str = "quantize",
) -> QuantizeConfig:
    """What a method's name, a file, a table and overrides say together; the more particular counts.

    Args:
        method: one of ``METHODS``; if not given, and nothing else decides, ``gptq`` where there is text.
        has_text: whether there is text to calibrate on.

    Raises:
        ConfigError: an unknown method or key, a value that does not fit, or text that nothing would read.
    """
    if method is not None and method not in METHODS:
        raise ConfigError(f"no method {method!r}", where="--method", todo=f"use one of {', '.join(METHODS)}")
    base = load(QuantizeConfig, recipe) if recipe else QuantizeConfig()
    chosen = override(dict(table or {}), overrides)
    fitted = base.rounding == "gptq" or base.awq or base.clip == "mse"
    decided = method is not None or fitted or "rounding" in chosen or chosen.get("awq") is True
    settled = METHODS[method] if method else ("rounding=gptq",) if has_text and not decided else ()
    merged = merge_tables(override(base.model_dump(mode="json"), settled), dict(table or {}))
    config = parse(QuantizeConfig, merged, where=recipe or where, overrides=overrides)
    if has_text and not config.needs_text and config.clip != "mse":
        todo = "leave out --calibrate, or use gptq, awq, clip=mse or tune_steps"
        raise ConfigError("rounding to the nearest takes no text", where="--calibrate", todo=todo)
    return config

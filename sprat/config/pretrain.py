"""Pre-training on text of the user's: a model of a size of the dial from nothing, or any model that goes on."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sprat.config.base import load, merge_tables, parse
from sprat.config.recipe import OptimConfig, TrainConfig


class PretrainConfig(TrainConfig):
    """Every token of a plain text carries loss."""

    steps: int = Field(0, ge=0, lt=2**31)  # 0: as many as ``epochs`` take
    epochs: float = Field(1.0, gt=0, le=1e6)
    batch_rows: int = Field(16, ge=1, lt=2**31)
    seq_len: int = Field(256, ge=8, lt=2**31)
    eval_every: int = Field(0, ge=0, lt=2**31)  # steps between two looks at the held-out text; 0: a tenth of them


class ScratchConfig(PretrainConfig):
    """A new model."""

    size: str = "pico"
    changes: dict[str, Any] = {}  # of single numbers of that size
    vocab_size: int = Field(2048, ge=300, lt=2**31)  # of the tokenizer, where one is trained
    epochs: float = Field(4.0, gt=0, le=1e6)


class ContinuedOptimConfig(OptimConfig):
    """AdamW, gently: Muon wants a schedule of its own for weights that another optimizer made."""

    name: Literal["muon", "adamw"] = "adamw"
    adam_lr: float = Field(1e-4, gt=0, le=1e9)
    betas: tuple[float, float] = (0.9, 0.95)


class ContinuedPretrainConfig(PretrainConfig):
    """A model that was trained before: what it is stands in its own file."""

    optim: OptimConfig = ContinuedOptimConfig()


def load_pretrain_config(
    *,
    size: str = "",
    init_from: str = "",
    recipe: str | Path | None = None,
    table: dict[str, Any] | None = None,
    overrides: Iterable[str] = (),
    where: str = "train",
) -> PretrainConfig:
    """The config of one run of ``sprat train MODEL``.

    Args:
        size: of a new model; empty where one that exists goes on.
        init_from: ``RUN`` or ``RUN@STEP``. Where no ``recipe`` is named, what that run's recipe says holds on.
        recipe: a TOML file.
        table: keys as a recipe has them, instead of one.
        overrides: ``a.b=value``.
        where: what a fault in ``table`` is said to be in.

    Raises:
        ConfigError: the file is missing, a key is unknown, or a value does not fit.
    """
    config_class = ScratchConfig if size else ContinuedPretrainConfig
    given = [f"{key}={json.dumps(value)}" for key, value in (("size", size), ("init_from", init_from)) if value]
    if recipe is not None:
        return load(config_class, recipe, (*overrides, *given))
    base: dict[str, Any] = {}
    if init_from:
        base = {key: value for key, value in _recipe_of(init_from).items() if key in config_class.model_fields}
    if not size:
        base["optim"] = ContinuedOptimConfig().model_dump() | base.get("optim", {})
    base = merge_tables(base, table or {})
    return parse(config_class, base, where=where, overrides=(*overrides, *given))


def _recipe_of(init_from: str) -> dict[str, Any]:
    """What the recipe of the run that ``init_from`` names says; empty where it has none."""
    run, sign, step = init_from.rpartition("@")
    folder = Path(run) if sign and step.isdecimal() else Path(init_from)
    try:
        return tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}

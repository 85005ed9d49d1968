"""Distillation of any teacher into any student: what is asked, and what is learned of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sprat.config.base import Config, merge_tables
from sprat.config.finetune import FinetuneConfig, load_with_rank
from sprat.config.sizes import size_names

_FRESH_LR = 3e-3  # fresh weights learn at many times the rate of trained ones
Price = Field(None, ge=0, lt=2**53)


class TracesConfig(Config):
    """How a teacher is asked. All of it belongs to the run of traces, none of it to the student's weights."""

    teacher_model: str = ""  # the name of a model behind a URL, as its server says it
    licence: str = ""  # on what terms its answers may be trained on, as the user states them
    input_price: int | None = Price  # nano-yuan a token; 1,000 is one yuan per million tokens
    output_price: int | None = Price
    samples: int = Field(1, ge=1, le=10_000)  # answers to each question
    temperature: float = Field(0.7, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(1024, ge=1, lt=2**31)  # of an answer, thinking included
    seed: int | None = Field(0, ge=0, lt=2**53)  # answer number j is asked for with seed + j; None asks without one
    thinking: bool | None = None  # of a local teacher: force or forbid it; None: the model decides
    extra_body: dict[str, Any] = {}  # further fields of each request over HTTP, such as reasoning_effort


class LogitsCacheConfig(Config):
    """What is kept of the teacher's distributions."""

    top_k: int = Field(64, ge=1, lt=2**31)  # tokens kept at each place; all others are one bucket
    temperature: float = Field(1.0, ge=0.01, le=100)
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"  # of the kept log-probabilities


class LogitsConfig(LogitsCacheConfig):
    """How a student is pulled to the teacher's distributions on the rows that it learns."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = Field(0.5, gt=0, lt=1)  # of jsd: the teacher's share of the mixture
    weight: float = Field(0.5, ge=0, le=1)  # of the divergence; the rest is cross-entropy


class SpansConfig(Config):
    """How a student with another tokenizer is pulled to how likely the teacher finds each piece of an answer."""

    weight: float = Field(0.5, ge=0, le=1)  # of the pieces' divergence; the rest is cross-entropy


class TeachConfig(FinetuneConfig):
    """SFT on a teacher's traces; with ``logits`` also towards its distributions, with ``spans`` its likelihoods."""

    traces: TracesConfig = TracesConfig()
    logits: LogitsConfig | None = None
    spans: SpansConfig | None = None


def load_teach_config(
    student: str,
    *,
    lora: int | None = None,
    recipe: str | Path | None = None,
    table: dict[str, Any] | None = None,
    overrides: Iterable[str] = (),
    where: str = "distill",
) -> TeachConfig:
    """The config of one run of ``sprat distill TEACHER``.

    Args:
        student: a model or a size; fresh weights have a rate of their own where no recipe is named.
        lora: rank of adapters.
        recipe: a TOML file.
        table: keys as a recipe has them, instead of one.
        overrides: ``a.b=value``.
        where: what a fault in ``table`` is said to be in.

    Raises:
        ConfigError: the file is missing, a key is unknown, or a value does not fit.
    """
    if lora is None and is_size(student):
        table = merge_tables({"optim": {"adam_lr": _FRESH_LR}}, table or {})
    return load_with_rank(TeachConfig, lora, recipe, table, overrides, where)


def is_size(student: str) -> bool:
    """Whether ``student`` is a size and no model."""
    return student in size_names() and not Path(student).exists()


class ServerConfig(Config):
    """A teacher behind a URL, as a run names it among its inputs."""

    url: str
    model: str


class NewStudentConfig(Config):
    """A student with fresh weights, as a run names it among its inputs."""

    size: str

"""Published measurements of training: model, chip, precision and layout of each, and tokens a second.

``published_rows.csv`` is a copy of a public table (its first line names the source). It is read as it stands: what a
row does not say is not made up, a layout that contradicts itself is changed as little as it takes, and ``Row.remarks``
names that, and every word of a row that is not understood.
"""

from __future__ import annotations

import csv
import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sprat.config.parallel import ParallelPlan
from sprat.errors import ConfigError
from sprat.plan.families import load_shape
from sprat.plan.hardware import chip
from sprat.plan.step import StepEstimate, StepOptions, step_time

ROWS_FILE = Path(__file__).with_name("published_rows.csv")
# How the tables write precisions. A release that names none has the reader's inference in ``extra``.
PRECISIONS = {
    "bf16": "bf16", "fp8": "fp8-cs", "fp8-cs": "fp8-cs", "fp8-ds": "fp8-ds", "fp8-mx": "fp8-mx", "mxfp8": "fp8-mx",
    "fp8-sc": "fp8-sc", "nvfp4": "fp4", "fp4": "fp4", "unknown": "fp8-cs", "": "fp8-cs",
}  # fmt: skip

# What the column ``extra`` may say; what is not here is named in ``Row.remarks``, since nobody reckons with it.
UNDERSTOOD = {
    "", "tokendrop", "dropless", "routing", "granularity", "ga", "precision not in source", "precision_inferred",
    "check", "mtp",
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


def read_rows(path: Path = ROWS_FILE, release: str = "") -> list[Row]:
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
        plan, StepOptions(PRECISIONS[precision], mtp, not adapters, deduplicates="tokendrop" not in extra),
        tuple(remarks),
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
    raw = _estimate(row.model, row.system, row.plan, row.options)
    return replace(raw, factor=factor)


@functools.lru_cache(maxsize=256)
def _estimate(model: str, system: str, plan: ParallelPlan, options: StepOptions) -> StepEstimate:
    return step_time(load_shape(model), plan, chip(system), options)

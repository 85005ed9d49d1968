"""What a rank holds from step to step: parameters, gradients, master weights and moments, as ZeRO shares them out.

Arithmetic, no replay: tensor and expert parallelism cut the matrices, the pipeline deals out the layers, and ZeRO
shares what is left among the ranks that hold the same. MTP modules go with the last stage; where a tied head or
they are on another rank than the embedding, it is copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sprat.config.parallel import DTYPE_BYTES, ParallelPlan
from sprat.plan.activations import rank_parameters
from sprat.plan.shapes import Layer, Matrix, ModelShape

MIXED = "Micikevicius et al., arXiv 1710.03740, section 3.1"
ZERO = "Rajbhandari et al., arXiv 1910.02054, section 5"
_MATRIX_BLOCK = 128 * 128  # numbers that share a scale in FP8 weights (arXiv 2412.19437, section 3.3.2)


@dataclass(frozen=True)
class Term:
    """One part of a rank's memory: bytes, how they come about, and the source of that."""

    name: str
    bytes: float
    formula: str
    source: str


@dataclass(frozen=True)
class Stage:
    """What one stage holds.

    Attributes:
        layers: its decoder layers; an MTP module's counts as one.
        first, last: whether it has the embedding, and the last norm, the head and the loss.
        copies_embedding: whether it holds a copy of the embedding, for a tied head or MTP on another rank.
        joins: MTP modules in it.
    """

    layers: tuple[Layer, ...]
    first: bool
    last: bool
    copies_embedding: bool
    joins: int


def split_stages(shape: ModelShape, plan: ParallelPlan) -> list[Stage]:
    """The stages of ``shape`` under ``plan``, in the order of the layers; MTP modules go with the last one.

    Raises:
        ConfigError: the plan does not fit the model.
    """
    check_fit(shape, plan)
    stages, start = [], 0
    apart = plan.rank_of_stage(0) != plan.rank_of_stage(plan.stages - 1)
    for number, count in enumerate(plan.split_layers(len(shape.layers))):
        last = number == plan.stages - 1
        layers = shape.layers[start : start + count] + (shape.mtp if last else ())
        stages.append(
            Stage(
                layers,
                number == 0,
                last,
                last and apart and (shape.tied or bool(shape.mtp)),
                len(shape.mtp) if last else 0,
            )
        )
        start += count
    return stages


def check_fit(shape: ModelShape, plan: ParallelPlan) -> None:
    """Refuse degrees that do not cut the model.

    Raises:
        ConfigError: it names the nearest degree that does.
    """
    sizes: dict[str, set[int]] = {"layers": {len(shape.layers)}}
    for block in shape.blocks:
        if block.core is not None:
            sizes.setdefault("heads", set()).add(block.core.heads)
            if block.kind == "gqa":
                sizes.setdefault("kv_heads", set()).add(block.core.kv_heads)
        if block.mixture is not None:
            sizes.setdefault("experts", set()).add(block.mixture.experts)
            sizes.setdefault("expert_ffn", set()).add(block.mixture.expert_ffn)
        if block.ffn:
            sizes.setdefault("ffn", set()).add(block.ffn)
    experts = min(sizes.get("experts", {0}))
    cuts = math.gcd(*(value for name in ("heads", "kv_heads", "ffn") for value in sizes.get(name, ())))
    for name, values in sizes.items():
        for value in values:
            plan.check_model(tensor_cuts=cuts, **{"experts": experts, name: value})


def _matrices(stage: Stage, shape: ModelShape) -> tuple[list[Matrix], float]:
    """The matrices of ``stage``, and how many numbers it has that are none."""
    blocks = [block for layer in stage.layers for block in layer]
    matrices = [matrix for block in blocks for matrix in block.matrices]
    if stage.first or stage.copies_embedding:
        matrices.append(shape.embedding)
    if stage.last and not shape.tied:
        matrices.append(shape.head)
    vectors = float(sum(block.vectors for block in blocks))
    vectors += (shape.end_vectors if stage.last else 0) + stage.joins * shape.mtp_vectors
    return matrices + [shape.mtp_join] * stage.joins, vectors


@dataclass(frozen=True)
class _Held:
    """Numbers on one rank, before ZeRO: of experts, of other matrices, of those the optimizer treats as vectors."""

    experts: float
    linears: float
    others: float


def _held(stages: Iterable[Stage], shape: ModelShape, plan: ParallelPlan) -> _Held:
    experts = linears = others = 0.0
    for stage in stages:
        matrices, vectors = _matrices(stage, shape)
        others += vectors
        for matrix in matrices:
            numbers = rank_parameters(matrix, plan)
            if matrix.is_expert:
                experts += numbers
            elif matrix.name in ("embed_tokens", "lm_head", "gate"):
                others += numbers
            else:
                linears += numbers
    return _Held(experts, linears, others)


def _parameter_bytes(plan: ParallelPlan) -> tuple[float, float]:
    """Bytes of a number of a linear, and of another."""
    if plan.precision == "fp8":
        return 1 + 4 / _MATRIX_BLOCK, 2.0
    wide = float(DTYPE_BYTES[plan.precision])
    return wide, wide


def state_terms(stages: list[Stage], shape: ModelShape, plan: ParallelPlan) -> list[Term]:
    """What a rank with ``stages`` holds from step to step: parameters, gradients, master weights, moments."""
    held = _held(stages, shape, plan)
    dense, expert = plan.shard_ranks, plan.expert_shard_ranks

    def shared(level: int, of_expert: float, of_linear: float, of_other: float) -> float:
        cut = plan.zero >= level
        rest = held.linears * of_linear + held.others * of_other
        return held.experts * of_expert / (expert if cut else 1) + rest / (dense if cut else 1)

    numbers = f"({held.experts:,.0f} of experts + {held.linears:,.0f} in linears + {held.others:,.0f} others)"
    zero = f"ZeRO-{plan.zero}: / {dense} (experts / {expert})"
    linear, other = _parameter_bytes(plan)
    gradient = DTYPE_BYTES[plan.gradient_dtype] or other
    terms = [
        Term(
            "parameters", shared(3, linear, linear, other), f"{numbers} x {linear:.7g}, {linear:.7g}, {other:g} bytes"
            + (f"; {zero}" if plan.zero >= 3 else ""), MIXED,
        ),
        Term(
            "gradients", shared(2, gradient, gradient, gradient),
            f"{numbers} x {gradient:g} bytes" + (f"; {zero}" if plan.zero >= 2 else ""), MIXED,
        ),
    ]  # fmt: skip
    if plan.precision != "fp32" and (master := DTYPE_BYTES[plan.master_dtype]):
        formula = f"{numbers} x {master} bytes" + (f"; {zero}" if plan.zero else "")
        terms.append(Term("master weights", shared(1, master, master, master), formula, ZERO))
    moment = DTYPE_BYTES[plan.moment_dtype]
    matrix, vector = {"adamw": (2, 2), "muon": (1, 2), "sgd": (1, 1)}[plan.optimizer]
    formula = f"{numbers} x {matrix}, {matrix}, {vector} moments x {moment} bytes" + (f"; {zero}" if plan.zero else "")
    terms.append(Term("moments", shared(1, matrix * moment, matrix * moment, vector * moment), formula, ZERO))
    if plan.zero == 3:
        terms.append(_gathered(stages, plan, linear))
    return terms


def _gathered(stages: list[Stage], plan: ParallelPlan, linear: float) -> Term:
    """ZeRO-3: the layer at work and the next one whole, and the gradients of one before they are shared out."""
    layers = [layer for stage in stages for layer in stage.layers] or [()]
    sizes = [sum(rank_parameters(m, plan) for block in layer for m in block.matrices) for layer in layers]
    largest, gradient = max(sizes), max(linear, 2)  # gradients are bf16 with fp8 too
    formula = f"largest layer {largest:,.0f} x (2 x {linear:.7g} + {gradient:g} bytes)"
    return Term("gathered parameters", largest * (2 * linear + gradient), formula, f"{ZERO}; FSDP prefetches one")

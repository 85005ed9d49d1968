"""Memory of the fullest rank under a plan, term by term, each with its formula and where that comes from.

What stays from step to step is arithmetic: parameters, gradients, master weights, moments, cut by tensor, expert and
pipeline parallelism and shared out by ZeRO. What comes and goes is replayed: each rank walks through its schedule's
table, a forward puts what its stage keeps on the pile, a backward takes it off, and the highest point counts, with what
the action itself needs beside it. The fullest rank is looked for among all ranks of the pipeline, since which one it is
depends on the split: the first holds the most micro-batches, the last the logits.

Left out: the allocator's rounding and fragmentation, and buffers of the communication libraries, for which ``margin``
stands; it is an allowance and no measurement. Experts are taken to be busy alike unless ``imbalance`` says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from sprat.config.parallel import ParallelPlan
from sprat.errors import ConfigError
from sprat.plan.activations import FUSED, Kernels, Ledger, Operation, rank_parameters
from sprat.plan.schedule import make_table
from sprat.plan.shapes import ModelShape
from sprat.plan.state import Stage, Term, split_stages, state_terms

KEPT = "Korthikanti et al., arXiv 2205.05198, section 4, with fused attention and SwiGLU"
GROUPS = ("stream", "attention", "feed-forward", "experts", "loss")


@dataclass(frozen=True)
class RankMemory:
    """What one rank of the pipeline holds at its fullest moment."""

    rank: int
    stages: tuple[int, ...]
    layers: int
    terms: tuple[Term, ...]

    @property
    def bytes(self) -> float:
        """All terms together."""
        return sum(term.bytes for term in self.terms)

    def term(self, name: str) -> float:
        """Bytes of the terms that are called ``name``."""
        return sum(term.bytes for term in self.terms if term.name == name)


@dataclass(frozen=True)
class _Pass:
    """A stage's micro-batch: what it keeps, by group, and how far its passes rise above what lay there before."""

    kept: dict[str, float]
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return sum(self.kept.values())


def _stage_pass(stage: Stage, shape: ModelShape, plan: ParallelPlan, ledger: Ledger) -> _Pass:
    """Walk through the operations of ``stage`` forwards and backwards."""
    modules, full = plan.recompute_modules, plan.recompute_modules == ("full",)
    kept = dict.fromkeys(GROUPS, 0.0)
    walk: list[tuple[list[Operation], float]] = []  # of each layer or block: its operations, and what it recomputes
    if stage.first:
        numbers = rank_parameters(shape.embedding, plan) * ledger.wide
        walk.append(([Operation("stream", 8.0 * ledger.tokens, ledger.stream, 0.0, numbers)], 0.0))
    for layer in stage.layers:
        if full:
            operations = [each for block in layer for each in ledger.block(block)]
            again = sum(each.kept for each in operations) - ledger.stream
            kept["stream"] += ledger.stream
            walk.append((operations, max(again, 0.0)))
            continue
        for block in layer:
            operations = list(ledger.block(block))
            for each in operations:
                kept[each.group] += 0.0 if set(each.modules) & set(modules) else each.kept
            walk.append((operations, sum(each.kept for each in operations if set(each.modules) & set(modules))))
    if stage.joins:
        operations = [_join(shape, ledger)] * stage.joins
        kept["loss"] += sum(each.kept for each in operations)
        walk.append((operations, 0.0))
    if stage.last:
        operations, forward = _loss(shape, plan, ledger, 1 + stage.joins)
        kept["loss"] += sum(each.kept for each in operations)
        walk.append((operations, 0.0))
    else:
        forward = 0.0
        kept["stream"] += ledger.stream if ledger.kernels.keeps_output else 0.0
    kept["stream"] += 8.0 * ledger.tokens if stage.first else 0.0
    total = sum(kept.values())
    return _Pass(kept, total + forward, _backward_peak(walk, total, ledger.stream))


def _backward_peak(walk: list[tuple[list[Operation], float]], total: float, stream: float) -> float:
    """The highest point of a backward pass over ``walk``, above what lay there before its forward pass."""
    here, peak = total, total
    for operations, again in reversed(walk):
        here += again
        for each in reversed(operations):
            peak = max(peak, here + stream + each.out + each.into + each.weight)
            here -= each.kept
    return peak


def _join(shape: ModelShape, ledger: Ledger) -> Operation:
    """An MTP module before its layer: two norms, both results side by side, ``eh_proj``."""
    kept = 2 * ledger.norm(shape.hidden, ledger.shard) + 2 * ledger.stream / ledger.wide * ledger.linear
    return Operation("loss", kept, ledger.stream, 4 * ledger.stream, ledger.weight(shape.mtp_join))


def _loss(shape: ModelShape, plan: ParallelPlan, ledger: Ledger, heads: int) -> tuple[list[Operation], float]:
    """Last norm, head and cross-entropy -> (operations, what the forward pass needs beside what it keeps)."""
    head = rank_parameters(shape.head, plan)
    rows = ledger.tokens * shape.vocab / plan.tensor
    norm = Operation("loss", heads * ledger.norm(shape.hidden, ledger.shard), ledger.stream, ledger.stream)
    if ledger.kernels.logits:
        kept = heads * (rows * ledger.kernels.logits + ledger.input(shape.hidden))
        weight = ledger.weight(shape.head)
        return [norm, Operation("loss", kept, 0.0, ledger.gathered, weight)], 0.0
    kept = heads * (2 * ledger.stream + head * ledger.wide)
    own = head * ledger.wide
    transposed = own if shape.vocab / plan.tensor <= 8192 else 0.0  # of a head that fits a cache
    # The head's gradient is added up in float32, then scaled, and kept in the head's dtype.
    beside = 4 * head if ledger.wide == 4 else 8 * head
    return [norm, Operation("loss", kept, 0.0, ledger.stream, own)], transposed + beside


def _peak(rank: int, plan: ParallelPlan, passes: dict[int, _Pass]) -> tuple[float, dict[int, int], float]:
    """The highest point of ``rank``'s table -> (bytes, micro-batches of each stage then, bytes of the action)."""
    held = dict.fromkeys(plan.stages_of_rank(rank), 0)
    best: tuple[float, dict[int, int], float] = (0.0, dict(held), 0.0)
    chunks = plan.virtual_stages
    count, steady = plan.micro_batches, 8 * plan.stages  # by then each rank has held what it ever holds
    if count > steady and (count % plan.pipeline == 0 or plan.schedule in ("1f1b", "zbv", "dualpipe_v")):
        count = steady
    for action in make_table(plan.schedule, plan.pipeline, count, chunks)[rank]:
        pile = sum(number * passes[stage].total for stage, number in held.items())
        own = 0.0
        if action.kind in ("F", "FB"):
            own = passes[action.stage].forward
        backward = action.backward_stage if action.kind == "FB" else action.stage
        if action.kind in ("B", "I", "FB"):
            own += passes[backward].backward - passes[backward].total
        if pile + own > best[0]:
            best = (pile + own, dict(held), own)
        if action.kind in ("F", "FB"):
            held[action.stage] += 1
        if action.kind in ("B", "W", "FB"):
            held[backward] -= 1
    return best


def rank_memory(
    shape: ModelShape,
    plan: ParallelPlan,
    rank: int,
    *,
    kernels: Kernels = FUSED,
    imbalance: float = 1.0,
    margin: float = 0.05,
) -> RankMemory:
    """Memory of pipeline rank ``rank``.

    Args:
        kernels: what computes the model, which decides what is kept.
        imbalance: tokens of the busiest rank's experts over the mean.
        margin: share of all else that is added for the allocator and communication buffers.

    Raises:
        ConfigError: the plan does not fit the model, or a number is absurd.
    """
    if not 1 <= imbalance < 1e6 or not 0 <= margin < 10:
        raise ConfigError(f"imbalance {imbalance}, margin {margin}", where="memory", todo="give 1 or more, and 0 to 10")
    stages = split_stages(shape, plan)
    ledger = Ledger(plan, kernels, shape.hidden, imbalance)
    own = plan.stages_of_rank(rank)
    passes = {number: _stage_pass(stages[number], shape, plan, ledger) for number in own}
    terms = state_terms([stages[number] for number in own], shape, plan)
    _, held, action = _peak(rank, plan, passes)
    for group in GROUPS:
        size = sum(count * passes[number].kept[group] for number, count in held.items())
        counts = ", ".join(f"stage {number}: {count}" for number, count in held.items())
        formula = f"kept by micro-batches in flight ({counts}) of {plan.micro_batch_tokens} tokens"
        terms.append(Term(f"activations: {group}", size, formula, KEPT))
    formula = "what the fullest action holds of its own micro-batch, its gradients, and weights' gradients on their way"
    terms.append(Term("working space", action, formula, KEPT))
    if plan.context > 1:
        terms.append(_ring(shape, plan, ledger))
    terms = [term for term in terms if term.bytes]
    allowance = margin * sum(term.bytes for term in terms)
    if margin:
        terms.append(Term("margin", allowance, f"{margin:g} x all the above", "an allowance, not measured"))
    return RankMemory(rank, own, sum(len(stages[number].layers) for number in own), tuple(terms))


def _ring(shape: ModelShape, plan: ParallelPlan, ledger: Ledger) -> Term:
    """Context parallelism: another rank's keys and values, two of them under way."""
    cores = [block.core for block in shape.blocks if block.core is not None]
    width = max((max(1, core.kv_heads / plan.tensor) * (core.qk_dim + core.v_dim) for core in cores), default=0.0)
    size = 2 * ledger.tokens * width * ledger.wide
    return Term("ring attention", size, "2 x tokens x (keys + values) of a neighbour", "Liu et al., arXiv 2310.01889")


def fullest_rank(
    shape: ModelShape,
    plan: ParallelPlan,
    *,
    kernels: Kernels = FUSED,
    imbalance: float = 1.0,
    margin: float = 0.05,
) -> RankMemory:
    """Memory of the rank that holds the most; see ``rank_memory``."""
    ranks = (
        rank_memory(shape, plan, rank, kernels=kernels, imbalance=imbalance, margin=margin)
        for rank in range(plan.pipeline)
    )
    return max(ranks, key=lambda each: each.bytes)

"""How long one micro-batch takes through one stage of a pipeline: its layers, and what only first and last stages have.

Computation and messages of a stage are kept apart, since schedules differ in what they hide: most of the messages of
tensor and context parallelism runs under the products (``EXPOSED``), those of experts under nothing, unless forward
and backward of two micro-batches run at once (DualPipe), where the longer of the two counts.
"""

# L layers, S stages, R ranks of the pipeline, T tries

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sprat.plan.layer_time import MESSAGES, Rank, Term, block_terms, combine
from sprat.plan.shapes import Block, Layer, ModelShape
from sprat.plan.simulate import StageTime

# Share of a message that nothing hides. Tensor: a product cut in chunks hides most of it (arXiv 2205.05198, section 4;
# TransformerEngine's user buffers); fitted to figures.toml and release 25.09 by eye, as are the others.
EXPOSED = {"tensor messages": 0.5, "context messages": 0.3, "expert messages": 1.0, "parameter messages": 1.0}
HOST_SECONDS = 6e-6  # that Python and the driver take to start a kernel: where kernels are shorter, they are waited for
OVERLAP_SLOWDOWN = 132 / 112  # of computation beside messages: 20 of 132 units send (arXiv 2412.19437, section 3.2.2)
FSDP_SLOWDOWN = 0.15  # what a hidden gathering of parameters costs the computation beside it: NCCL's share of the units

Counts = npt.NDArray[np.int64]
Loads = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Stage:
    """One stage on one rank: the terms of a micro-batch, and its parameters there (before ZeRO shares them out)."""

    terms: tuple[Term, ...]
    dense_parameters: float
    expert_parameters: float

    def seconds(self, kind: str) -> float:
        """Of a micro-batch's ``forward``, ``inputs`` or ``weights``, with what is not hidden of its messages."""
        return sum(EXPOSED.get(term.name, 1.0) * float(getattr(term, kind)) for term in self.terms)

    def messages(self) -> float:
        """Seconds of all messages of a forward and a backward, hidden or not."""
        return sum(t.forward + t.inputs + t.weights for t in self.terms if t.name in MESSAGES)

    def computation(self) -> float:
        """Seconds of all that is no message, of a forward and a backward."""
        return sum(t.forward + t.inputs + t.weights for t in self.terms if t.name not in MESSAGES)

    @property
    def kernels(self) -> int:
        """That a forward starts."""
        return sum(term.kernels for term in self.terms)

    def time(self) -> StageTime:
        """What the simulation of the schedule needs."""
        host = self.kernels * HOST_SECONDS
        forward = max(self.seconds("forward"), host)
        weight = self.seconds("weights")
        backward = max(self.seconds("inputs") + weight, 2 * host)
        hidden = self.computation() * OVERLAP_SLOWDOWN
        pair = min(max(hidden, self.messages()), forward + backward)
        return StageTime(forward, backward, weight, pair / 2)


class StageMaker:
    """Stages of ``shape`` under the plan of ``rank``, each block priced once."""

    def __init__(self, shape: ModelShape, rank: Rank, *, mtp: bool = True) -> None:
        self.shape, self.rank, self.mtp = shape, rank, mtp
        self._known: dict[int, list[Term]] = {}

    def terms(self, block: Block) -> list[Term]:
        """The terms of ``block``; equal blocks of a shape are one object."""
        if id(block) not in self._known:
            self._known[id(block)] = block_terms(block, self.rank, self.shape.hidden)
        return self._known[id(block)]

    @property
    def layers(self) -> list[Layer]:
        """Decoder layers, and behind them those of the MTP modules that are trained along."""
        return [*self.shape.layers, *(self.shape.mtp if self.mtp else ())]

    def stage(self, first: int, count: int, *, is_first: bool, is_last: bool) -> Stage:
        """``layers`` from ``first`` on; the first stage has the embedding, the last one the head of each module."""
        rank, plan = self.rank, self.rank.plan
        depth, join = len(self.shape.layers), self.shape.mtp_join
        blocks = [block for layer in self.layers[first : first + count] for block in layer]
        joins = max(0, first + count - max(first, depth))  # MTP modules here
        terms = [rank.product("products", rank.own_tokens, join.outputs, join.inputs) for _ in range(joins)]
        for block in blocks:
            terms += self.terms(block)
        dense = joins * join.parameters + sum((b.parameters - b.expert_parameters) / plan.tensor for b in blocks)
        if is_first:
            terms.append(self._embedding())
            dense += self.shape.embedding.parameters / plan.tensor
        if is_last:
            for _ in range(1 + len(self.layers) - depth):
                terms += self._head()
            if not (self.shape.tied and is_first):
                dense += self.shape.head.parameters / plan.tensor
        experts = sum(b.expert_parameters for b in blocks) / (plan.expert * plan.expert_tensor)
        return self._with_parameters(Stage(tuple(combine(terms)), dense, experts))

    def _embedding(self) -> Term:
        return self.rank.bytes_moved("elementwise", 4.0 * self.shape.hidden * self.rank.own_tokens, 2)

    def _head(self) -> list[Term]:
        """The head in bf16, and the loss in one pass: logits are read, and their gradient is left in their place."""
        rank, plan = self.rank, self.rank.plan
        high = "bf16" if "bf16" in rank.chip.peak and rank.recipe.peak != "fp32" else "fp32"
        columns = self.shape.vocab / plan.tensor
        head = rank.product("products", rank.tokens, columns, self.shape.hidden, precision=high)
        loss = rank.bytes_moved("elementwise", 6.0 * rank.tokens * columns, 4)
        return [replace(head, name="head"), replace(loss, name="head")]

    def _with_parameters(self, stage: Stage) -> Stage:
        """Adds gathering parameters and scattering gradients in each micro-batch, where ZeRO-3 shares them."""
        plan, chip = self.rank.plan, self.rank.chip
        if plan.zero < 3 or plan.shard_ranks <= 1:
            return stage
        stride = plan.tensor
        width = 1.0 if self.rank.recipe.peak in ("fp8", "fp4") else 2.0

        def among(bytes_each: float) -> float:
            own = chip.ring_seconds(bytes_each * stage.dense_parameters, plan.shard_ranks, stride)
            return own + chip.ring_seconds(bytes_each * stage.expert_parameters, plan.expert_shard_ranks, plan.expert)

        gather, scatter = among(width), among(self.rank.gradient_bytes if self.rank.trains_weights else 0.0)
        backward = stage.seconds("inputs") + stage.seconds("weights")
        exposed = (_beside(gather, stage.seconds("forward")), _beside(gather + scatter, backward))
        return replace(stage, terms=(*stage.terms, Term("parameter messages", *exposed)))


def _beside(messages: float, computation: float) -> float:
    """What ``messages`` add to the ``computation`` that hides them."""
    return max(0.0, messages - computation) + FSDP_SLOWDOWN * min(messages, computation)


def balance_layers(maker: StageMaker) -> tuple[int, ...]:
    """Layers of each stage (``StageMaker.layers``) such that the busiest rank has the least to do, as if set by hand.

    Starts even and gives a layer of the busiest rank to the idlest one as long as that helps, and as evenly among
    stages as it goes. A plan that names its ``stage_layers`` keeps them, with the MTP modules in the last stage.
    """
    plan, layers = maker.rank.plan, len(maker.layers)
    if plan.stage_layers or plan.stages == 1:
        counts = list(plan.split_layers(len(maker.shape.layers)))
        counts[-1] += layers - len(maker.shape.layers)
        return tuple(counts)

    def cost(first: int, count: int, is_first: bool = False, is_last: bool = False) -> float:
        time = maker.stage(first, count, is_first=is_first, is_last=is_last).time()
        return time.forward + time.backward

    each = [cost(layer, 1) for layer in range(layers)]
    before_L = np.concatenate([[0.0], np.cumsum(each)])
    ends_S = np.zeros(plan.stages)
    ends_S[0] += cost(0, 0, is_first=True)
    ends_S[-1] += cost(0, 0, is_last=True)
    owner_S = np.array([plan.rank_of_stage(stage) for stage in range(plan.stages)])
    belongs_SR = np.eye(plan.pipeline)[owner_S]

    def judge(counts_TS: Counts) -> tuple[Loads, Loads, Loads]:
        """Of each try: the busiest rank's seconds, how unevenly stages share, and every rank's."""
        last_TS = np.cumsum(counts_TS, axis=1)
        seconds_TS = ends_S + before_L[last_TS] - before_L[last_TS - counts_TS]
        ranks_TR = seconds_TS @ belongs_SR
        return ranks_TR.max(axis=1), (seconds_TS**2).sum(axis=1), ranks_TR

    counts_S = np.array([layers // plan.stages + (stage < layers % plan.stages) for stage in range(plan.stages)])
    (busiest,), (uneven,), (ranks_R,) = judge(counts_S[None])
    away_SS, unit_SS = np.abs(np.subtract.outer(range(plan.stages), range(plan.stages))), np.eye(plan.stages, dtype=int)
    for _ in range(4 * layers):
        allowed_SS = (away_SS == 1) | ((ranks_R[owner_S] >= 0.999 * busiest)[:, None] & (away_SS > 0))
        givers, takers = np.nonzero(allowed_SS & (counts_S > 0)[:, None])
        tries_TS = counts_S - unit_SS[givers] + unit_SS[takers]
        most_T, uneven_T, ranks_TR = judge(tries_TS)
        best = np.lexsort((uneven_T, np.round(most_T / busiest, 3)))[0]
        if (round(float(most_T[best] / busiest), 3), uneven_T[best]) >= (1.0, uneven):
            break
        counts_S, busiest, uneven, ranks_R = tries_TS[best], most_T[best], uneven_T[best], ranks_TR[best]
    return tuple(int(count) for count in counts_S)


def make_stages(shape: ModelShape, ranks: Sequence[Rank], *, mtp: bool = True) -> list[Stage]:
    """All stages in order; ``ranks`` has one entry, or one for each pipeline rank (mixed fleets)."""
    plan = ranks[0].plan
    makers = [StageMaker(shape, rank, mtp=mtp) for rank in ranks]
    stages, first = [], 0
    counts = balance_layers(makers[0])
    for number, count in enumerate(counts):
        maker = makers[plan.rank_of_stage(number) if len(makers) > 1 else 0]
        stages.append(maker.stage(first, count, is_first=number == 0, is_last=number == len(counts) - 1))
        first += count
    return stages

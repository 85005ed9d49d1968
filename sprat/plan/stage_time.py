"""How long one micro-batch takes through one stage of a pipeline: its layers, and what only first and last stages have.

Computation and messages of a stage are kept apart, since schedules differ in what they hide: most of the messages of
tensor and context parallelism runs under the products (``EXPOSED``), those of experts under nothing, unless forward
and backward of two micro-batches run at once (DualPipe), where the longer of experts' messages and computation counts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from sprat.plan.layer_time import MESSAGES, Rank, Term, block_terms, combine
from sprat.plan.shapes import Block, Layer, ModelShape
from sprat.plan.simulate import StageTime

# Share of a message that nothing hides. Tensor: a product cut in chunks hides most of it (arXiv 2205.05198, section 4;
# TransformerEngine's user buffers); fitted to figures.toml and release 25.09 by eye, as are the others.
EXPOSED = {"tensor messages": 0.5, "context messages": 0.3, "expert messages": 1.0, "parameter messages": 1.0}
HOST_SECONDS = 6e-6  # that Python and the driver take to start a kernel: where kernels are shorter, they are waited for
OVERLAP_SLOWDOWN = 132 / 112  # of computation beside messages: 20 of 132 units send (arXiv 2412.19437, section 3.2.2)
FSDP_SLOWDOWN = 0.15  # what a hidden gathering of parameters costs the computation beside it: NCCL's share of the units


@dataclass(frozen=True)
class Stage:
    """One stage on one rank: the terms of a micro-batch, and its parameters there (before ZeRO shares them out)."""

    terms: tuple[Term, ...]
    dense_parameters: float
    expert_parameters: float

    def seconds(self, kind: str) -> float:
        """Of a micro-batch's ``forward``, ``inputs`` or ``weights``, with what is not hidden of its messages."""
        return sum(EXPOSED.get(term.name, 1.0) * float(getattr(term, kind)) for term in self.terms)

    def whole(self, name: str) -> float:
        """Seconds of the term ``name`` in a forward and a backward, hidden or not."""
        return sum(t.forward + t.inputs + t.weights for t in self.terms if t.name == name)

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
        computed = sum(self.whole(term.name) for term in self.terms if term.name not in MESSAGES)
        others = sum(EXPOSED[name] * self.whole(name) for name in MESSAGES if name != "expert messages")
        pair = max(computed * OVERLAP_SLOWDOWN, self.whole("expert messages")) + others
        pair = min(pair, forward + backward)
        return StageTime(forward, backward, weight, pair / 2)


@dataclass(frozen=True, eq=False)
class Priced:
    """The terms of a block, and its parameters on a rank: those of experts apart. Told apart by identity."""

    terms: tuple[Term, ...]
    dense: float
    experts: float


class StageMaker:
    """Stages of ``shape`` under the plan of ``rank``, each block priced once."""

    def __init__(self, shape: ModelShape, rank: Rank, *, mtp: bool = True) -> None:
        self.shape, self.rank, self.mtp = shape, rank, mtp
        self._known: dict[int, Priced] = {}  # by the block's identity, which is quicker than its value
        self._priced: dict[Block, Priced] = {}

    def price(self, block: Block) -> Priced:
        """The terms and parameters of ``block``: one object for all blocks that are equal."""
        if id(block) not in self._known:
            if block not in self._priced:
                plan, experts = self.rank.plan, block.expert_parameters
                dense = (block.parameters - experts) / plan.tensor
                terms = block_terms(block, self.rank, self.shape.hidden)
                self._priced[block] = Priced(tuple(terms), dense, experts / (plan.expert * plan.expert_tensor))
            self._known[id(block)] = self._priced[block]
        return self._known[id(block)]

    @property
    def layers(self) -> list[Layer]:
        """Decoder layers, and behind them those of the MTP modules that are trained along."""
        return [*self.shape.layers, *(self.shape.mtp if self.mtp else ())]

    def stage(self, first: int, count: int, *, is_first: bool, is_last: bool) -> Stage:
        """``layers`` from ``first`` on; the first stage has the embedding, the last one the head of each module."""
        rank, plan = self.rank, self.rank.plan
        depth, join = len(self.shape.layers), self.shape.mtp_join
        joins = max(0, first + count - max(first, depth))  # MTP modules here
        terms = [rank.product("products", rank.own_tokens, join.outputs, join.inputs) for _ in range(joins)]
        dense, experts = float(joins * join.parameters), 0.0
        blocks = (self.price(block) for layer in self.layers[first : first + count] for block in layer)
        for priced, times in Counter(blocks).items():
            terms += [term.times(times) for term in priced.terms]
            dense += times * priced.dense
            experts += times * priced.experts
        if is_first:
            terms.append(self._embedding())
            dense += self.shape.embedding.parameters / plan.tensor
        if is_last:
            for _ in range(1 + len(self.layers) - depth):
                terms += self._head()
            if not (self.shape.tied and is_first):
                dense += self.shape.head.parameters / plan.tensor
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

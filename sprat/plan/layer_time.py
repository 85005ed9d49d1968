"""How long one micro-batch takes through one block of a model on one rank: forward, gradients of inputs, of weights.

A block is the matrices, the attention core and the experts that ``shapes.py`` lists. Each becomes kernels on a chip:

    products     one product for the matrices that share an input; a backward is two products of the same FLOPs
    experts      one grouped product over the experts that a rank holds, with as many rows as tokens come to it
    attention    scores and values; FlashAttention's backward is 2.5 times its forward (arXiv 2307.08691, section 3.1)
    scan         Mamba-2's chunks (arXiv 2405.21060, section 6), at a quarter of the rate of products
    elementwise  norms, residuals, rotations, activations, the sorting of tokens by expert: bytes over memory bandwidth
    quantize     casts to the eight- or four-bit format, both row- and column-wise, and the reading for their maximum
    messages     tensor: an all-gather before and a reduce-scatter after a block (sequence parallelism, 2205.05198);
                 expert: an all-to-all to the experts and one back; context: keys and values around a ring

The backward of what moves bytes moves twice as many. Recomputed modules are computed again before their backward.
Left out: dropout, uneven loads of experts (a factor of ``StepOptions``), and kernels fused beyond these groups.
"""

# T tokens of a micro-batch on one tensor rank; M, N, K sizes of a product

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sprat.config.parallel import ParallelPlan
from sprat.plan.hardware import Chip
from sprat.plan.precision import Recipe
from sprat.plan.shapes import Block, Matrix, Mixture

SCAN_SHARE = 0.25  # of the rate of bf16 products; assumed
GROUPED_SHARE = 0.85  # of a large product's rate (DeepGEMM's README: 1,100 to 1,300 TFLOP/s grouped, 1,550 dense)
ATTENTION_BACKWARD = 2.5
MESSAGES = ("tensor messages", "expert messages", "context messages")


@dataclass(frozen=True)
class Term:
    """Seconds of one kind of work in a micro-batch's forward, and in both halves of its backward."""

    name: str
    forward: float
    inputs: float = 0.0
    weights: float = 0.0
    kernels: int = 0  # that a forward starts; a backward starts twice as many

    def times(self, count: int) -> Term:
        """``count`` of them."""
        return Term(self.name, count * self.forward, count * self.inputs, count * self.weights, count * self.kernels)


@dataclass(frozen=True)
class Rank:
    """Where a block runs: chip, plan, recipe, and whether weights learn (adapters alone: they have no gradients)."""

    chip: Chip
    plan: ParallelPlan
    recipe: Recipe
    trains_weights: bool = True
    imbalance: float = 1.0  # load of the fullest expert rank over the mean
    deduplicates: bool = True  # a token goes once to each rank and domain, however many of its experts are there
    gradient_bytes: float = 4.0

    @property
    def tokens(self) -> float:
        """Tokens of one micro-batch that this rank's tensor group computes."""
        return self.plan.micro_batch_tokens

    @property
    def own_tokens(self) -> float:
        """Those between the products, which sequence parallelism cuts."""
        return self.tokens / self.plan.tensor

    def product(self, name: str, m: float, n: float, k: float, groups: float = 1, precision: str = "") -> Term:
        """A linear layer of M tokens, N outputs and K inputs, ``groups`` times."""
        peak, rate = precision or self.recipe.peak, 1.0 if precision else self.recipe.rate
        chip = self.chip
        forward = chip.gemm_seconds(m, n, k, peak, groups=groups) / rate
        inputs = chip.gemm_seconds(m, k, n, peak, groups=groups) / rate
        weights = 0.0
        if self.trains_weights:  # gradients are added to what earlier micro-batches left
            moved = groups * (2.0 * m * (n + k) + 2 * self.gradient_bytes * n * k)
            weights = chip.gemm_seconds(n, k, m, peak, groups=groups, moved=moved) / rate
        return Term(name, forward, inputs, weights, 1)

    def bytes_moved(self, name: str, moved: float, kernels: int) -> Term:
        """``moved`` bytes in the forward, twice as many in the backward, by ``kernels`` kernels."""
        starts = kernels * self.chip.efficiency.kernel
        seconds = self.chip.memory_seconds(moved)
        return Term(name, seconds + starts, 2 * (seconds + starts), 0.0, kernels)

    def cast(self, numbers_in: float, numbers_out: float, precision: str = "") -> Term:
        """Casts of a product's inputs in the forward and of its outputs' gradients in the backward."""
        if precision or not self.recipe.cast_bytes:
            return Term("quantize", 0.0)
        seconds = [self.chip.memory_seconds(self.recipe.cast_bytes * each) for each in (numbers_in, numbers_out)]
        start = self.chip.efficiency.kernel
        return Term("quantize", seconds[0] + start, seconds[1] + start, 0.0, 1)


def block_terms(block: Block, rank: Rank, hidden: int) -> list[Term]:
    """All terms of ``block`` for one micro-batch on ``rank``; terms of one name are summed.

    Args:
        hidden: width of the residual stream.
    """
    terms = [*_products(block, rank), *_core(block, rank), _elementwise(block, rank, hidden)]
    terms += _messages(block, rank, hidden)
    return combine(_recompute(block, rank, terms))


def combine(terms: list[Term]) -> list[Term]:
    """``terms`` with those of one name added up."""
    sums: dict[str, list[Term]] = {}
    for term in terms:
        sums.setdefault(term.name, []).append(term)
    return [
        Term(
            name,
            sum(term.forward for term in each),
            sum(term.inputs for term in each),
            sum(term.weights for term in each),
            sum(term.kernels for term in each),
        )
        for name, each in sums.items()
    ]


def _fused(block: Block) -> Iterator[tuple[Matrix, int]]:
    """Matrices that are one product since they share an input and its cut, each with the outputs of all of them."""
    groups: dict[tuple[int, str, int, str], tuple[Matrix, int]] = {}
    for matrix in block.matrices:
        family = matrix.name.rpartition(".")[0] or ("gate" if matrix.name == "gate" else "")
        key = (matrix.inputs, matrix.cut, matrix.copies, family)
        first, outputs = groups.get(key, (matrix, 0))
        groups[key] = (first, outputs + matrix.outputs)
    yield from groups.values()


def _products(block: Block, rank: Rank) -> Iterator[Term]:
    plan = rank.plan
    for matrix, outputs in _fused(block):
        n, k = float(outputs), float(matrix.inputs)
        if matrix.copies > 1:
            groups = max(1.0, matrix.copies / plan.expert)
            m = rank.own_tokens * plan.expert * plan.expert_tensor * matrix.active / matrix.copies * rank.imbalance
            cut = plan.expert_tensor
            n, k = (n, k / cut) if matrix.cut == "row" else (n / cut, k)
            term = rank.product("experts", m, n, k, groups)
            starts = round(groups) * (2 if rank.recipe.cast_bytes else 1)  # each expert's cast and product by itself
            halves = term.forward / GROUPED_SHARE, term.inputs / GROUPED_SHARE, term.weights / GROUPED_SHARE
            yield Term("experts", *halves, starts)
            yield rank.cast(groups * m * k, groups * m * n)
            continue
        m = rank.own_tokens if matrix.cut == "none" else rank.tokens
        n = n / plan.tensor if matrix.cut == "column" else n
        k = k / plan.tensor if matrix.cut == "row" else k
        precision = _kept_high(rank) if matrix.name == "gate" or "hyper" in matrix.name else ""
        yield rank.product("products", m, n, k, precision=precision)
        yield rank.cast(m * k, m * n, precision)
        if not rank.trains_weights:  # adapters read the input once more, and add theirs to the product's output
            yield rank.bytes_moved("elementwise", m * (2.0 * k + 4.0 * n), 3)


def _kept_high(rank: Rank) -> str:
    """The precision of what no recipe computes in eight bits: routers and the head."""
    return "bf16" if "bf16" in rank.chip.peak and rank.recipe.peak != "fp32" else "fp32"


def _core(block: Block, rank: Rank) -> Iterator[Term]:
    plan, chip = rank.plan, rank.chip
    if block.core is not None:
        flops = block.core.flops(plan.sequence_length, causal=True) * rank.tokens / plan.tensor
        keys = block.core.keys(plan.sequence_length, causal=False)
        forward = chip.attention_seconds(flops, keys)
        yield Term(
            "attention", forward, chip.attention_seconds(ATTENTION_BACKWARD * flops, keys, backward=True), 0.0, 2
        )
    if block.scan is not None:
        peak = chip.flops(_kept_high(rank)) * SCAN_SHARE
        forward = block.scan.flops * rank.tokens / plan.tensor / peak
        yield Term("scan", forward, ATTENTION_BACKWARD * forward, 0.0, 5)


def _elementwise(block: Block, rank: Rank, hidden: int) -> Term:
    """Bytes of the forward, two for each number: see the comments."""
    cut = rank.plan.tensor
    moved, kernels = 10.0 * hidden * rank.own_tokens, 2  # norm: in, out; residual: two in, one out
    if block.core is not None:
        core = block.core
        keys = core.heads if core.latent else core.kv_heads
        width = core.heads * core.qk_dim + keys * (core.qk_dim + core.v_dim)
        moved += 8.0 * width * rank.tokens / cut  # split or joined, and rotated: in and out each
        kernels += 6
    if block.scan is not None:
        scan = block.scan
        states = 3 * 4.0 * scan.inner * scan.state / scan.chunk  # of each chunk: made, passed on, read
        states += 4.0 * scan.conv_channels + 14.0 * scan.inner  # convolution; gate, norm, dt and the scan's own
        moved += states * rank.tokens / cut
        kernels += 6
    if block.mixture is not None:
        mix = block.mixture
        chosen = mix.top_k * rank.imbalance
        passes = 4 if rank.plan.expert > 1 else 2  # sorted by rank, then by expert; and both ways
        moved += rank.own_tokens * (16.0 * mix.experts + passes * 4.0 * chosen * mix.width)
        ends = 6.0 if mix.gated else 4.0
        moved += rank.own_tokens * ends * chosen * mix.expert_ffn
        moved += rank.tokens * ends * mix.shared_ffn / cut
        kernels += 24
    if block.ffn:
        moved += rank.tokens * (6.0 if block.gated else 4.0) * block.ffn / cut
        kernels += 2
    return rank.bytes_moved("elementwise", moved, kernels)


def _messages(block: Block, rank: Rank, hidden: int) -> Iterator[Term]:
    plan, chip = rank.plan, rank.chip
    if plan.tensor > 1 and any(matrix.cut != "none" and matrix.copies == 1 for matrix in block.matrices):
        each = chip.ring_seconds(2.0 * rank.tokens * hidden, plan.tensor)
        yield Term("tensor messages", 2 * each, 2 * each, each if rank.trains_weights else 0.0, 2)
    if block.mixture is not None and plan.expert > 1:
        yield _expert_messages(block.mixture, rank)
    if plan.context > 1 and block.core is not None:
        width = block.core.kv_heads * (block.core.qk_dim + block.core.v_dim) / plan.tensor
        size = 2.0 * rank.tokens * width * plan.context
        each = chip.ring_seconds(size, plan.context, plan.tensor)
        yield Term("context messages", each, 2 * each, 0.0, 2)


def _expert_messages(mix: Mixture, rank: Rank) -> Term:
    """There in the recipe's precision, back in bf16; in the backward the same, the other way round.

    DeepEP sends a token once to each other domain and once to each rank (arXiv 2412.19437, section 3.2.2); a plain
    all-to-all sends every copy.
    """
    chip, span = rank.chip, rank.plan.expert * rank.plan.expert_tensor
    copies, domains = float(mix.top_k), 0.0
    if rank.deduplicates:
        copies = _reached(span, mix.top_k)
        count = span / chip.domain
        if count > 1:
            reached = _reached(count, mix.top_k)
            limit = mix.groups_used if mix.groups > 1 else count
            domains = min(reached, limit) * (count - 1) / count / copies
    size = rank.own_tokens * copies * mix.width * rank.imbalance
    there = chip.all_to_all_seconds(rank.recipe.dispatch_bytes * size, span, domains=domains)
    back = chip.all_to_all_seconds(2.0 * size, span, domains=domains)
    return Term("expert messages", there + back, there + back, 0.0, 4)


def _reached(places: float, top_k: int) -> float:
    """Of ``places``, how many at least one of ``top_k`` experts lies in, on average."""
    return places * (1 - (1 - 1 / places) ** top_k) if places > 1 else 1.0


def _recompute(block: Block, rank: Rank, terms: list[Term]) -> list[Term]:
    """Adds to the backward what is computed a second time."""
    modules = rank.plan.recompute_modules
    shares: dict[str, float] = {}
    if "full" in modules:
        shares = {term.name: 1.0 for term in terms}
    if "core_attn" in modules and block.core is not None:
        shares["attention"] = 1.0
    if block.mixture is not None and "moe" in modules:
        shares |= dict.fromkeys(("experts", "products", "quantize", "elementwise", "expert messages"), 1.0)
    if block.ffn and "mlp" in modules:
        shares |= dict.fromkeys(("products", "quantize", "elementwise", "tensor messages"), 1.0)
    if {"layernorm", "moe_act"} & set(modules):
        shares.setdefault("elementwise", 0.3)
    if "mla_up_proj" in modules and block.core is not None and block.core.latent:
        ups = sum(m.outputs * m.inputs for m in block.matrices if m.name in ("q_b_proj", "kv_b_proj"))
        shares.setdefault("products", ups / max(1, sum(m.outputs * m.inputs for m in block.matrices)))
    return [
        Term(t.name, t.forward, t.inputs + shares.get(t.name, 0.0) * t.forward, t.weights, t.kernels) for t in terms
    ]

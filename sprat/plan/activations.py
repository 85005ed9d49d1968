"""What a micro-batch leaves behind for the way back, operation by operation, and what the way back needs beside it.

A block is a chain of operations. In the forward pass each *keeps* what its gradient needs. On the way back the chain is
walked in reverse: an operation holds the gradient that comes in (``out``), the one that it makes (``into``) and its
weight's (``weight``), and then lets go of what it kept. So the peak of a backward pass follows, and with recomputation
what was not kept comes back for one block at a time.

What an operation keeps depends on the kernels: see ``Kernels``. Sizes are in bytes of one micro-batch on one rank; a
tensor-parallel rank has its heads and widths, and between the products its share of the sequence (Korthikanti et al.
2022, arXiv 2205.05198, sections 4 and 5, whose counts these are with fused attention and SwiGLU).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sprat.config.parallel import ParallelPlan
from sprat.plan.shapes import Block, Matrix

Modules = tuple[str, ...]
FP8_TILE = 1 + 4 / 128  # bytes of an FP8 number with its share of a tile's float32 scale (arXiv 2412.19437, 3.3.2)


@dataclass(frozen=True)
class Kernels:
    """What the kernels keep that compute a model.

    Attributes:
        fused_norm: a norm keeps its input and a scalar a token; else float32 copies of both, as torch's operators do.
        fused_swiglu: SwiGLU keeps gate and up; else silu(gate) too.
        joint_keys: attention keeps keys and queries laid out side by side (FlashAttention, torch's SDPA); else it takes
            latent attention's products as they come.
        gate_up_copy: gate and up are laid side by side for one product, and that copy is kept (our CPU kernels).
        regather: a rank keeps its share of the sequence, and gathers the rest again on the way back (Megatron).
        fused_weight_gradient: weight gradients are added up where they stay; else each is a tensor first.
        combine: copies of the experts' outputs that are kept; 0 where their weights go into the activation.
        logits: bytes that are kept for each logit; 0: rows are taken in chunks, and the loss keeps the gradients of the
            hidden states and of the head instead (our fused loss).
        keeps_output: of a stage; else it is let go once it is sent.
    """

    name: str
    fused_norm: bool = True
    fused_swiglu: bool = True
    joint_keys: bool = True
    gate_up_copy: bool = False
    regather: bool = True
    fused_weight_gradient: bool = True
    combine: int = 0
    logits: int = 6
    keeps_output: bool = False


FUSED = Kernels("fused")  # GPUs: Megatron Core, Transformer Engine, FlashAttention; bf16 logits and a float32 softmax
_OURS = {"regather": False, "fused_weight_gradient": False, "combine": 2, "logits": 0, "keeps_output": True}
NATIVE = Kernels("native", joint_keys=False, gate_up_copy=True, **_OURS)  # type: ignore[arg-type]  # our CPU kernels
STOCK = Kernels("stock", fused_norm=False, fused_swiglu=False, **_OURS)  # type: ignore[arg-type]  # torch's operators
KERNELS = {kernels.name: kernels for kernels in (FUSED, NATIVE, STOCK)}


@dataclass(frozen=True)
class Operation:
    """One operation of a block, in bytes of a micro-batch.

    Attributes:
        group: of the report: stream, attention, feed-forward, experts, loss.
        kept: what it keeps for the way back.
        out: the gradient that comes in.
        into: the gradients that it makes.
        weight: the largest gradient of a weight that it makes.
        modules: by whose names it is recomputed; ``kept`` is then needed for its own way back alone.
    """

    group: str
    kept: float
    out: float = 0.0
    into: float = 0.0
    weight: float = 0.0
    modules: tuple[str, ...] = ()


class Ledger:
    """Sizes that all blocks of a plan share, and their operations."""

    def __init__(self, plan: ParallelPlan, kernels: Kernels, hidden: int, imbalance: float = 1.0) -> None:
        self.plan, self.kernels, self.hidden, self.imbalance = plan, kernels, hidden, imbalance
        self.tokens = plan.micro_batch_tokens
        self.shard = self.tokens / plan.tensor  # of the sequence, between the products
        self.wide = 4 if plan.precision == "fp32" else 2  # bytes of an activation
        self.linear = FP8_TILE if plan.precision == "fp8" else float(self.wide)  # of what a linear keeps
        self.stream = self.shard * hidden * self.wide
        self.gathered = self.tokens * hidden * self.wide
        self.fused_norm = kernels.fused_norm or self.wide == 4

    def norm(self, width: int, tokens: float) -> float:
        """What a norm over ``width`` keeps, without its output, which the product behind it keeps."""
        if self.fused_norm:
            return tokens * (width * self.wide + 4)
        return tokens * (width * (4 + self.wide) + 4)

    def input(self, width: int) -> float:
        """What a column-parallel product keeps: its input, gathered over the sequence or not."""
        return (self.shard if self.kernels.regather else self.tokens) * width * self.linear

    def weight(self, *matrices: Matrix) -> float:
        """The gradient of the largest of ``matrices`` on this rank, in the dtype of the products."""
        if self.kernels.fused_weight_gradient:
            return 0.0
        return max(rank_parameters(matrix, self.plan) for matrix in matrices) * self.wide

    def block(self, block: Block) -> Iterator[Operation]:
        """The operations of ``block``, forwards."""
        yield Operation("stream", self.norm(self.hidden, self.shard), self.stream, self.stream)
        if block.kind == "moe":
            yield from self._moe(block)
        elif block.kind == "dense":
            yield from self._feed_forward(block, "feed-forward", block.ffn, self.tokens, "", ("mlp",), ("mlp",))
        elif block.kind == "mamba2":
            yield from self._mamba(block)
        elif block.kind == "mla":
            yield from self._mla(block)
        else:
            yield from self._gqa(block)

    def _named(self, block: Block, *names: str) -> list[Matrix]:
        return [matrix for matrix in block.matrices if matrix.name in names]

    def _gqa(self, block: Block) -> Iterator[Operation]:
        """Projections, attention, projection back; DeepSeek-V4's with its latent queries in between."""
        core, tensor = block.core, self.plan.tensor
        assert core is not None
        query = self.tokens * core.heads * core.qk_dim / tensor * self.wide
        keys = self.tokens * max(1, core.kv_heads / tensor) * core.qk_dim * self.wide
        into = query + (2 * keys if block.kind == "gqa" else keys)
        ups, downs = [m for m in block.matrices if m.cut != "row"], [m for m in block.matrices if m.cut == "row"]
        extra = sum(m.outputs for m in ups if m.cut == "none") * self.tokens * self.wide if core.compress else 0.0
        copies = 1 if self.kernels.regather else 2
        yield Operation(
            "attention", self.input(self.hidden), into, copies * self.gathered, self.weight(*ups), ("layernorm",)
        )
        if core.qk_norm:
            rows = self.tokens * (core.heads / tensor + max(1, core.kv_heads / tensor))
            yield Operation("attention", self.norm(core.qk_dim, rows), into, into)
        out = self.tokens * core.heads * core.v_dim / tensor
        yield Operation("attention", into + extra, out * self.wide, into)
        yield Operation("attention", self.tokens * core.heads / tensor * 4, modules=("core_attn",))
        yield Operation("attention", out * self.linear, self.gathered, out * self.wide, self.weight(*downs))

    def _mla(self, block: Block) -> Iterator[Operation]:
        """Latents, their norms, queries and keys rebuilt from them, attention, projection back."""
        core, tensor = block.core, self.plan.tensor
        assert core is not None
        downs = self._named(block, "q_a_proj", "kv_a_proj_with_mqa") or list(block.matrices)
        ups = self._named(block, "q_b_proj", "kv_b_proj", "q_proj")
        rope = next(m.outputs for m in block.matrices if m.name == "kv_a_proj_with_mqa") - core.latent
        q_rank = sum(m.outputs for m in self._named(block, "q_a_proj"))
        latents = self.tokens * (core.latent + q_rank)
        yield Operation(
            "attention",
            self.input(self.hidden),
            latents * self.wide,
            2 * self.gathered,
            self.weight(*downs),
            ("layernorm",),
        )
        yield Operation("attention", self.norm(core.latent + q_rank, self.tokens) + self.tokens * rope * self.wide)
        query = self.tokens * core.heads * core.qk_dim / tensor * self.wide
        value = self.tokens * core.heads * (core.qk_dim - rope + core.v_dim) / tensor * self.wide
        rebuilt = query + value + (query if self.kernels.joint_keys else 0.0)
        yield Operation("attention", latents * self.linear, query + value, latents * self.wide, self.weight(*ups))
        out = self.tokens * core.heads * core.v_dim / tensor
        yield Operation("attention", rebuilt, out * self.wide, rebuilt, modules=("mla_up_proj",))
        yield Operation("attention", self.tokens * core.heads / tensor * 4, modules=("core_attn",))
        if core.index_heads:
            yield Operation("attention", self.tokens * (core.index_heads + 1) * core.index_dim * self.wide)
        yield Operation(
            "attention", out * self.linear, self.gathered, out * self.wide, self.weight(*self._named(block, "o_proj"))
        )

    def _mamba(self, block: Block) -> Iterator[Operation]:
        """In-projection, convolution and scan, gated norm, out-projection (mamba_ssm keeps the states of chunks)."""
        scan, tensor = block.scan, self.plan.tensor
        assert scan is not None
        joint, inner = block.matrices[0].outputs / tensor, scan.inner / tensor
        per_token = self.tokens * self.wide
        weight = [self.weight(matrix) for matrix in block.matrices]
        yield Operation(
            "attention", self.input(self.hidden), joint * per_token, self.gathered, weight[0], ("layernorm",)
        )
        states = self.tokens / scan.chunk * inner * scan.state * 4
        kept = (joint + scan.conv_channels / tensor + inner) * per_token + states
        yield Operation("attention", kept, inner * per_token, joint * per_token + states)
        yield Operation("attention", inner * self.tokens * self.linear, self.gathered, inner * per_token, weight[1])

    def _feed_forward(
        self, block: Block, group: str, ffn: float, rows: float, prefix: str, modules: Modules, act: Modules
    ) -> Iterator[Operation]:
        """Up, activation, down over ``rows`` rows of width ``ffn``; the input is the caller's where it has a prefix."""
        ups = self._named(block, f"{prefix}gate_proj", f"{prefix}up_proj")
        downs, hidden = self._named(block, f"{prefix}down_proj"), ups[0].inputs
        width = ffn / (self.plan.expert_tensor if prefix == "experts." else self.plan.tensor)
        product, ends = rows * width, rows * hidden * self.wide
        halves, joint = len(ups), self.kernels.gate_up_copy and len(ups) == 2
        copy = sum(rank_parameters(matrix, self.plan) for matrix in ups) * self.wide if joint else 0.0
        weight = 2 * self.weight(*ups) if joint else self.weight(*ups)
        if not prefix:
            yield Operation(group, self.input(self.hidden), modules=("layernorm",))
        elif prefix == "experts.":
            yield Operation(group, rows * hidden * self.linear, modules=modules)
        into = ends if joint or self.kernels.regather else 2 * ends
        yield Operation(group, copy, halves * product * self.wide, into, weight, modules)
        kept = (halves + (0 if self.kernels.fused_swiglu else 1)) * product
        kept *= self.linear if self.kernels.fused_swiglu else self.wide  # V3 keeps SwiGLU's input in FP8
        yield Operation(group, kept, product * self.wide, halves * product * self.wide, 0, modules)
        yield Operation(group, product * self.linear, ends, product * self.wide, self.weight(*downs), act)

    def _moe(self, block: Block) -> Iterator[Operation]:
        """Router, dispatch, experts, combine, and the shared experts, in this order."""
        mix, tensor = block.mixture, self.plan.tensor
        assert mix is not None
        yield Operation("experts", self.stream / self.wide * self.linear, modules=("layernorm",))
        scores = self.shard * mix.experts * 4
        wide = self.shard * self.hidden * 4 if self.wide < 4 and not self.kernels.fused_norm else 0.0
        routed = scores + wide + self.shard * (12 * mix.top_k + 4)
        yield Operation("experts", routed, scores, self.stream * 2, 0, ("moe",))
        pairs = self.shard * mix.top_k * self.imbalance * self.plan.expert_tensor
        sent = pairs * mix.width * self.wide
        yield Operation("experts", self.shard * 16 * mix.top_k, sent, self.stream, 0, ("moe",))
        names = ("experts.", ("moe",), ("moe_act", "moe"))
        yield from self._feed_forward(block, "experts", mix.expert_ffn, pairs, *names)
        yield Operation("experts", self.kernels.combine * sent + 4 * pairs, self.stream, 2 * sent, 0, ("moe",))
        if mix.shared_ffn:
            if tensor > 1 and not self.kernels.regather:
                yield Operation("experts", self.gathered, modules=("moe",))
            shared = ("shared_experts", "moe")
            act = ("moe_act", *shared)
            rows = self.tokens
            yield from self._feed_forward(block, "experts", mix.shared_ffn, rows, "shared_experts.", shared, act)


def rank_parameters(matrix: Matrix, plan: ParallelPlan) -> float:
    """Numbers of ``matrix`` on one rank before ZeRO: cut by expert and tensor parallelism."""
    if matrix.is_expert:
        return matrix.parameters / plan.expert / plan.expert_tensor
    return matrix.parameters / (1 if matrix.cut == "none" else min(plan.tensor, matrix.pieces or plan.tensor))

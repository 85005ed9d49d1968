"""A model as a list of blocks, and each block as the matrices and the attention core that it is made of.

Everything that the planner counts follows from here: a matrix of ``inputs`` by ``outputs`` has that many parameters
and costs two FLOPs for each of them and token; an attention core costs its products over the keys that a token sees.
So there is one list of facts about a family, and not one for parameters and another for FLOPs.

``tensor`` parallelism cuts a matrix by its outputs ("column"), its inputs ("row") or not at all ("none"), as Megatron
does (Shoeybi et al. 2019, arXiv 1909.08053, section 3); experts are cut by ``expert`` ranks whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Cut = Literal["column", "row", "none"]
Kind = Literal["gqa", "mla", "compressed", "mamba2", "dense", "moe"]


@dataclass(frozen=True)
class Matrix:
    """A weight of ``inputs`` x ``outputs``, ``copies`` times (one an expert); a token uses ``active`` of them.

    ``pieces`` is how many ranks can cut it at most (key heads; more ranks repeat them); 0: as many as there are.
    """

    name: str
    inputs: int
    outputs: int
    cut: Cut = "none"
    bias: bool = False
    copies: int = 1
    active: int = 1
    pieces: int = 0

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to the routed experts."""
        return self.name.startswith("experts.")

    @property
    def parameters(self) -> int:
        """Of all copies, biases included."""
        return self.copies * (self.inputs * self.outputs + (self.outputs if self.bias else 0))

    @property
    def active_parameters(self) -> int:
        """Of the copies that one token uses."""
        return self.active * (self.inputs * self.outputs + (self.outputs if self.bias else 0))

    @property
    def flops(self) -> int:
        """Forward FLOPs a token: two for each number of the matrix."""
        return 2 * self.active * self.inputs * self.outputs


@dataclass(frozen=True)
class Core:
    """What an attention layer does between its matrices; widths in numbers a head.

    Attributes:
        qk_dim: width of queries and keys; with ``v_dim`` it makes the FLOPs of a query-key pair.
        window: keys that a token sees at most, its own included; None: all before it.
        cache: numbers a token that a KV cache keeps (MLA: the latent and the rotary key).
        index_heads, index_dim, index_top_k: of DeepSeek-V3.2's indexer, which scores all keys and lets the attention
            see ``index_top_k`` of them; 0: has none.
        compress: tokens that one key stands for, beyond the window (DeepSeek-V4); 0: each has its own.
        qk_norm: whether queries and keys of each head go through a norm.
        latent: MLA's ``kv_lora_rank``; 0: keys and values are projected from the stream.
    """

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    cache: int
    window: int | None = None
    index_heads: int = 0
    index_dim: int = 0
    index_top_k: int = 0
    compress: int = 0
    latent: int = 0
    qk_norm: bool = False

    def keys(self, sequence_length: int, *, causal: bool) -> float:
        """Keys that a token attends to, averaged over a sequence.

        >>> Core(1, 1, 8, 8, 16).keys(4, causal=True), Core(1, 1, 8, 8, 16, window=2).keys(4, causal=True)
        (2.5, 1.75)
        """
        if self.compress:
            far = _average_keys(sequence_length // self.compress or 1, self.index_top_k or None, causal)
            return _average_keys(sequence_length, self.window, causal) + far
        limits = [limit for limit in (self.window, self.index_top_k or None) if limit is not None]
        return _average_keys(sequence_length, min(limits, default=None), causal)

    def flops(self, sequence_length: int, *, causal: bool) -> float:
        """Forward FLOPs a token: scores and the weighted sum of values; the indexer's scores over all keys too."""
        pair = 2.0 * self.heads * (self.qk_dim + self.v_dim)
        index = 2.0 * self.index_heads * self.index_dim / (self.compress or 1)
        seen = index * _average_keys(sequence_length, None, causal)
        return pair * self.keys(sequence_length, causal=causal) + seen


def _average_keys(sequence_length: int, limit: int | None, causal: bool) -> float:
    """Keys of a token that sees ``limit`` at most, averaged over a sequence."""
    most = sequence_length if limit is None else min(limit, sequence_length)
    if not causal:
        return float(most)
    return (most * (most + 1) / 2 + (sequence_length - most) * most) / sequence_length


@dataclass(frozen=True)
class StateSpace:
    """The scan of a Mamba-2 layer (Dao and Gu 2024, arXiv 2405.21060, section 6): chunks of ``chunk`` tokens."""

    heads: int
    head_dim: int
    state: int
    groups: int
    conv: int
    chunk: int

    @property
    def inner(self) -> int:
        """Width of the scan's input."""
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: the input, B and C."""
        return self.inner + 2 * self.groups * self.state

    @property
    def flops(self) -> float:
        """Forward FLOPs a token: the convolution, the products within a chunk, and those with the state."""
        within = 2.0 * self.chunk * (self.groups * self.state + self.inner)
        return 2.0 * self.conv * self.conv_channels + within + 4.0 * self.inner * self.state


@dataclass(frozen=True)
class Mixture:
    """Sizes of a mixture of experts that are no matrix."""

    experts: int
    top_k: int
    width: int  # of the stream that goes to the experts: the hidden size, or the latent one of Nemotron 3
    expert_ffn: int
    shared_ffn: int = 0  # 0: no shared expert
    gated: bool = True  # SwiGLU: two matrices up; relu2: one
    groups: int = 1
    groups_used: int = 1


@dataclass(frozen=True)
class Block:
    """One mixer or one feed-forward, with the norm before it.

    Attributes:
        kind: what it is.
        matrices: its weights that are multiplied by.
        vectors: parameters that are no matrix: gains of norms, sinks, the convolution of Mamba-2.
        core: of attention.
        scan: of Mamba-2.
        mixture: of a mixture of experts.
        ffn: width of a dense feed-forward; 0 for others.
    """

    kind: Kind
    matrices: tuple[Matrix, ...]
    vectors: int
    core: Core | None = None
    scan: StateSpace | None = None
    mixture: Mixture | None = None
    ffn: int = 0
    gated: bool = True

    @property
    def parameters(self) -> int:
        """All of them, all experts included."""
        return sum(matrix.parameters for matrix in self.matrices) + self.vectors

    @property
    def expert_parameters(self) -> int:
        """Of the routed experts, all together."""
        return sum(matrix.parameters for matrix in self.matrices if matrix.is_expert)

    @property
    def active_parameters(self) -> int:
        """Those that one token uses."""
        return sum(matrix.active_parameters for matrix in self.matrices) + self.vectors

    def flops(self, sequence_length: int, *, causal: bool) -> float:
        """Forward FLOPs a token, averaged over a sequence of ``sequence_length`` tokens."""
        total = float(sum(matrix.flops for matrix in self.matrices))
        if self.core is not None:
            total += self.core.flops(sequence_length, causal=causal)
        return total + (self.scan.flops if self.scan is not None else 0.0)


Layer = tuple[Block, ...]  # a decoder layer: attention and feed-forward; with Nemotron one block


@dataclass(frozen=True)
class ModelShape:
    """A decoder: embedding, layers, last norm, head, and the modules of multi-token prediction.

    Attributes:
        layers: the decoder layers, each a tuple of blocks.
        mtp: the layer of each MTP module; its three norms and ``eh_proj``, which published sizes leave out, are
            ``mtp_vectors`` and ``mtp_join``.
        end_vectors: parameters between the last layer and the head: the last norm.
        context: tokens that positions reach; 0: not known.
        source: where the shape comes from.
    """

    name: str
    hidden: int
    vocab: int
    tied: bool
    layers: tuple[Layer, ...]
    mtp: tuple[Layer, ...] = ()
    end_vectors: int = 0
    context: int = 0
    source: str = ""
    family: str = ""

    @property
    def mtp_join(self) -> Matrix:
        """``eh_proj`` of an MTP module, which joins the stream with the next token's embedding."""
        return Matrix("eh_proj", 2 * self.hidden, self.hidden)

    @property
    def mtp_vectors(self) -> int:
        """The norms of an MTP module: of the stream, of the embedding, before the head."""
        return 3 * self.hidden

    @property
    def embedding(self) -> Matrix:
        """The embedding: a look-up, so nothing is multiplied; a token uses one row."""
        return Matrix("embed_tokens", self.vocab, self.hidden, "row")

    @property
    def head(self) -> Matrix:
        """The head, whose parameters are the embedding's where it is tied."""
        return Matrix("lm_head", self.hidden, self.vocab, "column")

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks of the decoder layers, in their order."""
        return tuple(block for layer in self.layers for block in layer)

"""The blocks that models are made of, each built from the numbers that its family's ``config.json`` gives.

Which matrices there are is what the published code has: DeepSeek's ``modeling_deepseek.py``, and transformers' files of
the same families for the others. Norms stand with the block behind them.
"""

from __future__ import annotations

from sprat.plan.shapes import Block, Core, Layer, Matrix, Mixture, StateSpace


def gqa(
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    bias: bool = False,
    out_bias: bool = False,
    qk_norm: bool = False,
    window: int | None = None,
    sinks: bool = False,
) -> Block:
    """Grouped-query attention (arXiv 2305.13245); ``sinks``: a learned score a head (GPT-OSS)."""
    matrices = (
        Matrix("q_proj", hidden, heads * head_dim, "column", bias),
        Matrix("k_proj", hidden, kv_heads * head_dim, "column", bias, pieces=kv_heads),
        Matrix("v_proj", hidden, kv_heads * head_dim, "column", bias, pieces=kv_heads),
        Matrix("o_proj", heads * head_dim, hidden, "row", out_bias),
    )
    vectors = hidden + (2 * head_dim if qk_norm else 0) + (heads if sinks else 0)
    core = Core(heads, kv_heads, head_dim, head_dim, 2 * kv_heads * head_dim, window, qk_norm=qk_norm)
    return Block("gqa", matrices, vectors, core)


def mla(
    hidden: int,
    heads: int,
    q_rank: int | None,
    rank: int,
    nope: int,
    rope: int,
    value: int,
    *,
    bias: bool = False,
    index: tuple[int, int, int] = (0, 0, 0),
) -> Block:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Args:
        bias: of the projections into and out of the layer.
        index: heads, head width and top-k of V3.2's indexer, which takes its queries from the query latent.
    """
    qk = nope + rope
    if q_rank is None:
        queries: tuple[Matrix, ...] = (Matrix("q_proj", hidden, heads * qk, "column"),)
    else:
        queries = (
            Matrix("q_a_proj", hidden, q_rank, bias=bias),
            Matrix("q_b_proj", q_rank, heads * qk, "column"),
        )
    matrices = (
        *queries,
        Matrix("kv_a_proj_with_mqa", hidden, rank + rope, bias=bias),
        Matrix("kv_b_proj", rank, heads * (nope + value), "column"),
        Matrix("o_proj", heads * value, hidden, "row", bias),
    )
    vectors = hidden + (q_rank or 0) + rank
    index_heads, index_dim, index_top_k = index
    if index_heads:
        matrices += (
            Matrix("indexer.wq_b", q_rank or hidden, index_heads * index_dim),
            Matrix("indexer.wk", hidden, index_dim),
            Matrix("indexer.weights_proj", hidden, index_heads),
        )
        vectors += 2 * index_dim
    cache = rank + rope + (index_dim if index_heads else 0)
    core = Core(
        heads, heads, qk, value, cache, None, index_heads, index_dim, index_top_k if index_heads else 0, latent=rank
    )
    return Block("mla", matrices, vectors, core)


def compressed(
    hidden: int,
    heads: int,
    head_dim: int,
    q_rank: int,
    out_groups: int,
    out_rank: int,
    window: int,
    ratio: int,
    index: tuple[int, int, int] = (0, 0, 0),
) -> Block:
    """DeepSeek-V4's attention: one key head and a window, and beyond it one key for ``ratio`` tokens; 0: none.

    Args:
        index: heads, head width and top-k of the indexer that chooses among the compressed keys; without it all of
            them are seen. With it keys overlap, so that the compressor is twice as wide.
    """
    matrices = [
        Matrix("q_a_proj", hidden, q_rank),
        Matrix("q_b_proj", q_rank, heads * head_dim, "column"),
        Matrix("kv_proj", hidden, head_dim),
        Matrix("o_a_proj", heads * head_dim // out_groups, out_groups * out_rank, "column"),
        Matrix("o_b_proj", out_groups * out_rank, hidden, "row"),
    ]
    vectors, cache = hidden + q_rank + head_dim + heads, 0
    index_heads, index_dim, index_top_k = index if ratio else (0, 0, 0)
    if ratio:
        width = head_dim * (2 if index_heads else 1)
        matrices += [Matrix("compressor.kv_proj", hidden, width), Matrix("compressor.gate_proj", hidden, width)]
        vectors += ratio * width + head_dim
        cache = head_dim // ratio
    if index_heads:
        matrices += [
            Matrix("indexer.kv_proj", hidden, 2 * index_dim),
            Matrix("indexer.gate_proj", hidden, 2 * index_dim),
            Matrix("indexer.q_b_proj", q_rank, index_heads * index_dim),
            Matrix("indexer.weights_proj", hidden, index_heads),
        ]
        vectors += ratio * 2 * index_dim + index_dim
        cache += index_dim // ratio
    core = Core(heads, 1, head_dim, head_dim, cache, window, index_heads, index_dim, index_top_k, ratio)
    return Block("compressed", tuple(matrices), vectors, core)


def mamba2(hidden: int, heads: int, head_dim: int, state: int, groups: int, conv: int, chunk: int) -> Block:
    """A Mamba-2 mixer (arXiv 2405.21060) as Nemotron-H has it: a bias in the convolution, a gated norm behind."""
    scan = StateSpace(heads, head_dim, state, groups, conv, chunk)
    matrices = (
        Matrix("in_proj", hidden, scan.inner + scan.conv_channels + heads, "column"),
        Matrix("out_proj", scan.inner, hidden, "row"),
    )
    vectors = hidden + (conv + 1) * scan.conv_channels + 3 * heads + scan.inner
    return Block("mamba2", matrices, vectors, scan=scan)


def _feed_forward(prefix: str, hidden: int, ffn: int, gated: bool, bias: bool = False) -> tuple[Matrix, ...]:
    ups = ("gate_proj", "up_proj") if gated else ("up_proj",)
    columns = tuple(Matrix(f"{prefix}{name}", hidden, ffn, "column", bias) for name in ups)
    return (*columns, Matrix(f"{prefix}down_proj", ffn, hidden, "row", bias))


def dense(hidden: int, ffn: int, *, gated: bool = True, bias: bool = False) -> Block:
    """A feed-forward: SwiGLU (arXiv 2002.05202), or one matrix up and one down."""
    return Block("dense", _feed_forward("", hidden, ffn, gated, bias), hidden, ffn=ffn, gated=gated)


def moe(
    hidden: int,
    experts: int,
    top_k: int,
    expert_ffn: int,
    *,
    shared_ffn: int = 0,
    gated: bool = True,
    bias: bool = False,
    latent: int = 0,
    groups: int = 1,
    groups_used: int = 1,
) -> Block:
    """A mixture of experts with its router.

    Args:
        shared_ffn: width of all shared experts together; 0: none.
        bias: of the router and the experts (GPT-OSS). The bias that balances V3's load is no parameter.
        latent: width to which tokens are projected before they go to their experts (Nemotron 3); 0: not.
    """
    width = latent or hidden
    matrices = [Matrix("gate", hidden, experts, bias=bias)]
    for matrix in _feed_forward("experts.", width, expert_ffn, gated):
        matrices.append(Matrix(matrix.name, matrix.inputs, matrix.outputs, matrix.cut, bias, experts, top_k))
    if shared_ffn:
        matrices += _feed_forward("shared_experts.", hidden, shared_ffn, gated)
    if latent:
        matrices += [Matrix("fc1_latent_proj", hidden, latent), Matrix("fc2_latent_proj", latent, hidden)]
    mixture = Mixture(experts, top_k, width, expert_ffn, shared_ffn, gated, groups, groups_used)
    return Block("moe", tuple(matrices), hidden, mixture=mixture, gated=gated)


def with_hyper_connections(layer: Layer, hidden: int, streams: int) -> Layer:
    """``layer`` with DeepSeek-V4's ``streams`` residual streams, mixed anew before each of its blocks."""
    weights = 2 * streams + streams * streams
    mixed = Matrix("hyper_connection.fn", streams * hidden, weights)
    return tuple(
        Block(
            block.kind, (*block.matrices, mixed), block.vectors + weights + 3,
            block.core, block.scan, block.mixture, block.ffn, block.gated,
        )
        for block in layer
    )  # fmt: skip

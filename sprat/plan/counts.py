"""Parameters, FLOPs and KV bytes of a model, in closed form from its shape.

Three traps of published figures, each with its switch here:

- *Causal or not.* A causal token sees half of the keys; papers count either way (4.8 points of MFU on DeepSeek-V3).
- *MTP.* The hub's 685 B of DeepSeek-V3 is the main model with its MTP module, and published sizes of that module leave
  ``eh_proj`` out.
- *Active.* Of the embedding a token reads one row: we leave it out of ``active`` (36.6 B for V3), the head stays in.
"""

from __future__ import annotations

from dataclasses import dataclass

from sprat.plan.shapes import Block, ModelShape

TRAINING_FACTOR = 3  # forward, and twice as much on the way back: gradients of inputs and of weights


@dataclass(frozen=True)
class Counts:
    """Parameters of a model.

    Attributes:
        total: of the main model, without MTP modules.
        active: those that one token uses, without the embedding.
        experts: of routed experts, within ``total``.
        embedding: of the embedding, within ``total``.
        mtp: of the MTP modules with ``eh_proj``; they share embedding and head with the main model.
        mtp_without_join: of the MTP modules as published sizes have it.
    """

    total: int
    active: int
    experts: int
    embedding: int
    mtp: int
    mtp_without_join: int


def count_parameters(shape: ModelShape) -> Counts:
    """Parameters of ``shape``, exactly those of the built model.

    >>> from sprat.plan.families import load_shape
    >>> count = count_parameters(load_shape("v3"))
    >>> f"{count.total / 1e9:.1f} B, {count.active / 1e9:.1f} B active"
    '671.0 B, 36.6 B active'
    """
    head = 0 if shape.tied else shape.head.parameters
    ends = shape.embedding.parameters + shape.end_vectors + head
    total = sum(block.parameters for block in shape.blocks) + ends
    idle = sum(block.parameters - block.active_parameters for block in shape.blocks)
    modules = sum(block.parameters for layer in shape.mtp for block in layer) + len(shape.mtp) * shape.mtp_vectors
    return Counts(
        total=total,
        active=total - idle - (0 if shape.tied else shape.embedding.parameters),
        experts=sum(block.expert_parameters for block in shape.blocks),
        embedding=shape.embedding.parameters,
        mtp=modules + len(shape.mtp) * shape.mtp_join.parameters,
        mtp_without_join=modules,
    )


def forward_flops(shape: ModelShape, sequence_length: int, *, causal: bool = True, mtp: bool = False) -> float:
    """Forward FLOPs a token, averaged over a sequence of ``sequence_length`` tokens.

    Args:
        causal: whether a token's attention is counted over the keys that it sees, or over all of them.
        mtp: count the MTP modules too, each with a head of its own to go through.
    """
    total = sum(block.flops(sequence_length, causal=causal) for block in shape.blocks) + shape.head.flops
    if mtp:
        for layer in shape.mtp:
            total += sum(block.flops(sequence_length, causal=causal) for block in layer)
            total += shape.mtp_join.flops + shape.head.flops
    return float(total)


def training_flops(shape: ModelShape, sequence_length: int, *, causal: bool = True, mtp: bool = False) -> float:
    """FLOPs a token of a training step, without what is recomputed: three times the forward pass.

    >>> from sprat.plan.families import load_shape
    >>> round(training_flops(load_shape("v3"), 4096) / 1e9)
    250
    """
    return TRAINING_FACTOR * forward_flops(shape, sequence_length, causal=causal, mtp=mtp)


def kv_bytes_per_token(shape: ModelShape, bytes_per_number: int = 2) -> int:
    """Bytes that a KV cache keeps for a token, all layers together; what a window drops later is not taken off.

    >>> from sprat.plan.families import load_shape
    >>> kv_bytes_per_token(load_shape("v3")), kv_bytes_per_token(load_shape("LLAMA3.1_405B"))
    (70272, 516096)
    """
    return bytes_per_number * sum(block.core.cache for block in shape.blocks if block.core is not None)


def kv_bytes(shape: ModelShape, tokens: int, bytes_per_number: int = 2) -> int:
    """Bytes of the KV cache of a sequence of ``tokens``: layers with a window keep no more than it, Mamba its state."""
    return bytes_per_number * sum(_kept(block, tokens) for block in shape.blocks)


def _kept(block: Block, tokens: int) -> int:
    """Numbers that a layer keeps of a sequence."""
    if block.scan is not None:
        scan = block.scan
        return scan.inner * scan.state + (scan.conv - 1) * scan.conv_channels
    if block.core is None:
        return 0
    core = block.core
    if core.compress:
        return core.cache * tokens + core.qk_dim * min(tokens, core.window or tokens)
    if block.kind == "compressed":
        return core.qk_dim * min(tokens, core.window or tokens)
    return core.cache * (tokens if core.window is None else min(tokens, core.window))

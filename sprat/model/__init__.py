"""What computes: MLA, DeepSeekMoE, MTP and dense decoders, on one device."""

from sprat.model.counts import Counts, count_parameters, flops_per_token
from sprat.model.kv_cache import KVCache
from sprat.model.layers import Embedding, Linear, RMSNorm
from sprat.model.moe import MLP, Experts, Gate, MoE, Routing, balance_loss
from sprat.model.transformer import Block, Hidden, Transformer

__all__ = [
    "MLP",
    "Block",
    "KVCache",
    "Counts",
    "Embedding",
    "Experts",
    "Gate",
    "Hidden",
    "Linear",
    "MoE",
    "RMSNorm",
    "Routing",
    "Transformer",
    "balance_loss",
    "count_parameters",
    "flops_per_token",
]

"""Rotary positions (RoFormer, arXiv 2104.09864) with YaRN and Llama-3 stretching, as one complex table.

A pair of channels is a complex number; position ``p`` rotates it by ``p * inv_freq``. Queries and keys rotated
so depend on each other only through the *difference* of their positions. That is why packed rows need no
restart of positions at each document: inside a document the differences are the same.

DeepSeek lays the pairs out side by side ``(x0, x1), (x2, x3) ...`` (``rope_interleave``); Llama and Qwen pair
channel ``i`` with ``i + dim/2``. Scores do not depend on the order of the *output* channels as long as queries
and keys share it, so the side-by-side layout is rotated in place.

YaRN (arXiv 2309.00071) keeps fast frequencies, divides slow ones by ``factor``, and blends between; it also
sharpens attention by ``mscale``: part of that sits in the table (``attention_factor``), and the rest, for
``mscale_all_dim``, in the softmax scale (``attention_scale``). Left out: dynamic NTK and LongRoPE.
"""

# B batch, T time, H heads, r rotary width, P positions

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sprat.config.model import ModelConfig
from sprat.errors import ConfigError


def _mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's sharpening for a context stretched by ``factor``."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def attention_scale(config: ModelConfig, head_dim: int) -> float:
    """The factor on query-key products: ``1/sqrt(head_dim)``, times ``mscale^2`` for MLA with ``mscale_all_dim``."""
    scale = float(head_dim**-0.5)
    scaling = config.rope_scaling or {}
    if config.is_mla and scaling.get("mscale_all_dim"):
        scale *= _mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
    return scale


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """(inverse frequencies [r/2] in radians per token, factor on the table) for ``config``.

    Raises:
        ConfigError: the rope type is not known or lacks a value.
    """
    dim = config.qk_rope_head_dim if config.is_mla else config.attention_head_dim
    powers = config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float, device="cpu") / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / powers, 1.0
    kind = scaling.get("rope_type")
    try:
        if kind == "linear":
            return 1.0 / powers / scaling["factor"], 1.0
        if kind == "yarn":
            return _yarn(scaling, powers, dim, config)
        if kind == "llama3":
            return _llama3(scaling, 1.0 / powers), 1.0
    except KeyError as error:
        raise ConfigError(f"rope_scaling of type {kind!r} lacks {error}", where="rope_scaling", todo="add it") from None
    except (ArithmeticError, ValueError, TypeError) as error:
        what = f"rope_scaling of type {kind!r} has values that make no sense: {error}"
        raise ConfigError(what, where="rope_scaling", todo="correct them") from None
    raise ConfigError(f"rope type {kind!r} is not known", where="rope_scaling", todo="use yarn, llama3 or linear")


def _yarn(scaling: dict[str, Any], powers: Tensor, dim: int, config: ModelConfig) -> tuple[Tensor, float]:
    """YaRN's blend of kept and stretched frequencies, and its table factor (arXiv 2309.00071, section 3)."""
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
    both = scaling.get("mscale") and scaling.get("mscale_all_dim")
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = _mscale(factor)
        if both:
            attention = _mscale(factor, scaling["mscale"]) / _mscale(factor, scaling["mscale_all_dim"])

    def channel(rotations: float) -> float:
        """The channel that turns ``rotations`` times within the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = channel(scaling.get("beta_fast") or 32), channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float, device="cpu") - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return (1 - keep) / (factor * powers) + keep / powers, float(attention)


def _llama3(scaling: dict[str, Any], inverse: Tensor) -> Tensor:
    """Llama 3.1's stretching: long waves divided by ``factor``, short ones kept, a smooth step between."""
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = ((original * inverse / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    stretched: Tensor = (1 - smooth) * inverse / scaling["factor"] + smooth * inverse
    return stretched


class RotaryTable:
    """``exp(i * position * inv_freq)`` for positions 0..P-1, grown when a later position is asked for."""

    def __init__(self, config: ModelConfig) -> None:
        self.inv_freq, self.attention_factor = inverse_frequencies(config)
        self._freqs_cis_Pr = torch.empty(0, self.inv_freq.shape[0], dtype=torch.complex64, device="cpu")

    def freqs_cis(self, count: int, device: torch.device) -> Tensor:
        """Rotations of positions 0..count-1: complex64 [count, r/2]."""
        if self._freqs_cis_Pr.shape[0] < count or self._freqs_cis_Pr.device != device:
            size = max(count, 2 * self._freqs_cis_Pr.shape[0], 256)
            angles_Pr = torch.arange(size, dtype=torch.float, device=device)[:, None] * self.inv_freq.to(device)
            self._freqs_cis_Pr = torch.polar(torch.full_like(angles_Pr, self.attention_factor), angles_Pr)
        return self._freqs_cis_Pr[:count]


def apply_rotary_emb(x_BTHr: Tensor, freqs_cis_BTr: Tensor, interleave: bool) -> Tensor:
    """``x_BTHr``, pairs rotated by ``freqs_cis_BTr`` (complex, r/2 wide; B may be 1); same shape and dtype."""
    freqs_cis_BT1r = freqs_cis_BTr.unsqueeze(2)
    if interleave:
        wide = x_BTHr.float()
        if wide.storage_offset() % 2 or any(stride % 2 for stride in wide.stride()[:-1]):  # behind an odd width
            wide = wide.clone(memory_format=torch.contiguous_format)
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * freqs_cis_BT1r).flatten(-2).to(x_BTHr.dtype)
    cos, sin = freqs_cis_BT1r.real, freqs_cis_BT1r.imag
    first, second = x_BTHr.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BTHr.dtype)

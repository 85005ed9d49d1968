"""INT4 round-to-nearest: a weight in four bits and an eighth.

A weight matrix is cut into groups of 32 neighboring input channels. Each group keeps one scale ``s``
(float16) and a code of −8 … 7 per weight, so that ``w ≈ s · code``: 4 + 16/32 = 4.5 bits a weight. Two codes
share a byte, the even channel in the low nibble.

The only freedom is the scale. The extreme of a group can lie at either end of the codes: over −8, which reaches
farther, or over 7. Both are tried, each also improved by least squares for the codes that it gives
(``s = ⟨w, c⟩ / ⟨c, c⟩``), and the one of least squared error wins. Searching on among scales that clip the extreme
gives less error of the weights, and of the model now less and now more (docs/log.md). What text can tell
about the weights is in ``gptq``.

What stays as it is: the router and its bias (a wrong expert is worse than a coarse one), the norms, the
biases. Embedding and head are one row per token, and rare tokens have odd rows: INT8 with one scale
per row by default.

Files of other programs may hold a second number a group, the minimum ``m``: ``w = s · code + m`` with codes of
0 … 15. Such codes are kept and computed as they came; we make none ourselves.

The seam: a quantized module keeps the interface of what it replaces and offers ``weight`` (for experts
``w_gate_EFD`` and so on) as a property that dequantizes. Every use of the weight works unchanged, the
absorbed MLA products included. With ``materialize`` the float32 weight is kept after the first use:
fast without a kernel, but then only the file is small, not the memory.

N rows, I input channels, G groups, K channels per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sprat.config import Rounding

CHUNK = 1 << 16  # weights at once: they stay in the cache of a core
# the group's extreme divided by these: it lies at one end of the codes
EXTREME_DIVISORS = {4: (-8.0, 7.0), 8: (-128.0, 127.0)}
_TINY, _HUGE = 2.0**-24, 65504.0  # the least and the largest float16
_LEAST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized tensor: ``codes`` uint8 (two nibbles a byte) at 4 bits, int8 at 8, bfloat16 at 16, float32 at 32.

    ``scales`` is float16 [..., G] (empty from 16 bits on). ``width`` is I, the input channels of the original; the
    last group may hold fewer than ``group``. With ``minimums`` (float16 [..., G], 4 bits only) the codes are 0 … 15
    and a weight is ``scale * code + minimum``; without, they are −8 … 7. ``rounding`` says how they were found.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group: int
    width: int
    minimums: Tensor | None = None
    rounding: Rounding = "nearest"


def quantize_tensor(weight: Tensor, *, bits: int = 4, group: int = 32) -> QuantizedTensor:
    """Quantize the last dimension of ``weight`` (float, [..., I]) in groups; ``group=0`` is one group per row.

    16 bits is bfloat16 with no scales.
    """
    width = weight.shape[-1]
    size = group or width
    if bits == 16:
        no_scales = torch.empty(0, dtype=torch.float16)
        return QuantizedTensor(weight.detach().to(torch.bfloat16), no_scales, 16, size, width)
    shape = (*weight.shape[:-1], -(-width // size))
    groups_NK = group_channels(weight.detach().float(), size).flatten(0, -2)
    codes_NK = torch.empty(groups_NK.shape, dtype=torch.int8)
    scales_N = torch.empty(len(groups_NK), dtype=torch.float16)
    step = max(1, CHUNK // size)
    for at in range(0, len(groups_NK), step):
        part = groups_NK[at : at + step]
        scales = search_scales(part, bits, EXTREME_DIVISORS[bits])
        codes_NK[at : at + step], scales_N[at : at + step] = round_to_codes(part, scales.unsqueeze(-1), bits), scales
    codes = codes_NK.view(*shape, size).flatten(-2)[..., :width]
    codes = pack_int4(codes) if bits == 4 else codes.contiguous()
    return QuantizedTensor(codes, scales_N.view(shape), bits, size, width)


def dequantize_tensor(packed: QuantizedTensor) -> Tensor:
    """The float32 weight [..., I] that ``packed`` stands for: the reference of every kernel."""
    if packed.bits >= 16:
        return packed.codes.float()
    codes = unpack_int4(packed.codes, packed.width) if packed.bits == 4 else packed.codes
    if packed.minimums is None:
        return codes.float() * _per_channel(packed.scales, packed)
    return (codes & 15).float() * _per_channel(packed.scales, packed) + _per_channel(packed.minimums, packed)


def _per_channel(each_group: Tensor, packed: QuantizedTensor) -> Tensor:
    """A number for each group (float16 [..., G]) as float32 for each channel [..., I]."""
    return each_group.float().repeat_interleave(packed.group, dim=-1)[..., : packed.width]


def pack_int4(codes: Tensor) -> Tensor:
    """Codes of −8 … 7 (int8, [..., I]) two to a byte (uint8, [..., ceil(I/2)]), the even one in the low nibble.

    >>> pack_int4(torch.tensor([[-8, 7, 1]], dtype=torch.int8)).tolist()
    [[120, 1]]
    """
    nibbles = (torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)) & 15).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor, width: int) -> Tensor:
    """The int8 codes [..., width] of ``pack_int4``.

    >>> unpack_int4(torch.tensor([[120, 1]], dtype=torch.uint8), 3).tolist()
    [[-8, 7, 1]]
    """
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :width].to(torch.int8)
    return nibbles - ((nibbles & 8) << 1)


def group_channels(channels: Tensor, size: int) -> Tensor:
    """``channels`` [..., I] as [..., G, size], padded with zeros."""
    padded: Tensor = torch.nn.functional.pad(channels, (0, -channels.shape[-1] % size)).unflatten(-1, (-1, size))
    return padded


def search_scales(groups: Tensor, bits: int, divisors: Sequence[float], importance: Tensor | None = None) -> Tensor:
    """The scale [...] of each group [..., K] that loses least; float32, of values that float16 holds.

    Args:
        divisors: candidates are the group's extreme by each of these, and what least squares make of it.
        importance: of each channel's squared error, broadcast to ``groups``; all alike if not given.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    extreme = torch.where(high > -low, high, low)
    best, least = extreme, torch.full_like(extreme, torch.inf)

    def total(each: Tensor) -> Tensor:
        return (each if importance is None else each * importance).sum(-1, keepdim=True)

    for divisor in divisors:
        scale = _as_float16(extreme / divisor)
        for improve in (True, False):
            codes = round_to_codes(groups, scale, bits)
            error = total((codes * scale - groups).square_())
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
            if improve:
                scale = _as_float16(total(codes * groups) / total(codes.square_()).clamp(min=_LEAST))
    return best.squeeze(-1)


def round_to_codes(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest codes (float32 whole numbers) of ``values``; zero where the scale is zero."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    inverse = torch.where(scales.abs() < _TINY, 0.0, 1.0 / scales)
    return (values * inverse).round_().clamp_(low, high)


def _as_float16(scale: Tensor) -> Tensor:
    """``scale`` as float16 holds it, in float32, never beyond its range."""
    return scale.clamp(-_HUGE, _HUGE).to(torch.float16).float()

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

With a second number a group, the minimum ``m``, a weight is ``w = s · code + m`` with codes of 0 … 15: half a bit
more in groups of 32, and no code is lost on a side where no weight is. Files of other programs have it (GGUF's Q4_1,
and Q4_K in its way); ``symmetric=False`` makes it. Where ``zero_points`` asks for it, ``m`` is a whole number
of scales, ``m = -z · s``, and ``s`` has so few digits that float16 holds every such product: what runtimes with integer
zero points compute is then the same to the last bit.

The seam: a quantized module keeps the interface of what it replaces and offers ``weight`` (for experts
``w_gate_EFD`` and so on) as a property that dequantizes. Every use of the weight works unchanged, the
absorbed MLA products included. With ``materialize`` the float32 weight is kept after the first use:
fast without a kernel, but then only the file is small, not the memory.

N rows, I input channels, G groups, K channels per group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sprat.config import Rounding
from sprat.config.quant import Clip

CHUNK = 1 << 16  # weights at once: they stay in the cache of a core
# the group's extreme divided by these: it lies at one end of the codes
EXTREME_DIVISORS = {4: (-8.0, 7.0), 8: (-128.0, 127.0)}
CLIP_RATIOS = tuple(1 - step / 20 for step in range(10))  # of the range that codes reach, for ``clip="mse"``
FLOAT16_TINY, FLOAT16_MAX = 2.0**-24, 65504.0  # the least and the largest float16
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


class Scheme(NamedTuple):
    """How one matrix is rounded; ``group=0`` is one group per row. See ``QuantizeConfig``."""

    bits: int = 4
    group: int = 32
    symmetric: bool = True
    clip: Clip = "extreme"
    zero_points: bool = False


Grid = tuple[Tensor, Tensor | None]  # scales, and minimums where codes are 0 ... 15


def quantize_tensor(
    weight: Tensor,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    clip: Clip = "extreme",
    zero_points: bool = False,
) -> QuantizedTensor:
    """Quantize the last dimension of ``weight`` (float, [..., I]) in groups; ``group=0`` is one group per row.

    16 bits is bfloat16 with no scales. For the rest see ``Scheme``.
    """
    width = weight.shape[-1]
    size = group or width
    if bits == 16:
        no_scales = torch.empty(0, dtype=torch.float16)
        return QuantizedTensor(weight.detach().to(torch.bfloat16), no_scales, 16, size, width)
    shape, scheme = (*weight.shape[:-1], -(-width // size)), Scheme(bits, size, symmetric, clip, zero_points)
    groups_NK = group_channels(weight.detach().float(), size, repeat_last=not symmetric).flatten(0, -2)
    codes_NK = torch.empty(groups_NK.shape, dtype=torch.int8)
    scales_N = torch.empty(len(groups_NK), dtype=torch.float16)
    minimums_N = None if symmetric else torch.empty_like(scales_N)
    present_NK = None  # what pads the last group is no weight
    if width % size and not symmetric:
        present_NK = group_channels(torch.ones(width), size).repeat(len(groups_NK) // shape[-1], 1)
    step = max(1, CHUNK // size)
    for at in range(0, len(groups_NK), step):
        part = slice(at, at + step)
        scales, minimums = search_grid(groups_NK[part], scheme, None if present_NK is None else present_NK[part])
        codes_NK[part] = round_to_codes(groups_NK[part], scales.unsqueeze(-1), bits, per_group(minimums))
        scales_N[part] = scales
        if minimums_N is not None and minimums is not None:
            minimums_N[part] = minimums
    codes = codes_NK.view(*shape, size).flatten(-2)[..., :width]
    codes = pack_int4(codes) if bits == 4 else codes.contiguous()
    minimums = None if minimums_N is None else minimums_N.view(shape)
    return QuantizedTensor(codes, scales_N.view(shape), bits, size, width, minimums)


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


def group_channels(channels: Tensor, size: int, *, repeat_last: bool = False) -> Tensor:
    """``channels`` [..., I] as [..., G, size], padded with zeros, or with the last one where zero is out of range."""
    missing = -channels.shape[-1] % size
    if repeat_last and missing:
        channels = torch.cat((channels, channels[..., -1:].expand(*channels.shape[:-1], missing)), -1)
        missing = 0
    padded: Tensor = torch.nn.functional.pad(channels, (0, missing)).unflatten(-1, (-1, size))
    return padded


def per_group(each: Tensor | None) -> Tensor | None:
    """A number for each group [...] so that it broadcasts to the channels [..., K]."""
    return None if each is None else each.unsqueeze(-1)


def search_grid(
    groups: Tensor, scheme: Scheme, importance: Tensor | None = None, divisors: Sequence[float] | None = None
) -> Grid:
    """Scale and minimum [...] of each group [..., K] that lose least; float32, of values that float16 holds.

    Args:
        importance: of each channel's squared error, broadcast to ``groups``; all alike if not given.
        divisors: what ``clip="extreme"`` tries of symmetric codes instead of the ends of the codes.
    """
    if not scheme.symmetric:
        return search_ranges(
            groups, CLIP_RATIOS if scheme.clip == "mse" else (1.0,), importance, zero_points=scheme.zero_points
        )
    ends = EXTREME_DIVISORS[scheme.bits]
    if scheme.clip == "minmax":  # the range is as wide to both sides as all codes together
        return _as_float16(groups.abs().amax(-1) / ((ends[1] - ends[0]) / 2)), None
    if scheme.clip == "mse":
        divisors = [end / ratio for ratio in CLIP_RATIOS for end in ends]
    return search_scales(groups, scheme.bits, divisors or ends, importance), None


def search_scales(groups: Tensor, bits: int, divisors: Sequence[float], importance: Tensor | None = None) -> Tensor:
    """The scale [...] of each group [..., K] that loses least; float32, of values that float16 holds.

    Args:
        divisors: candidates are the group's extreme by each of these, and what least squares make of it.
        importance: of each channel's squared error, broadcast to ``groups``; all alike if not given.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    extreme = torch.where(high > -low, high, low)

    def total(each: Tensor) -> Tensor:
        return (each if importance is None else each * importance).sum(-1, keepdim=True)

    def refit(codes: Tensor) -> Grid:
        return _as_float16(total(codes * groups) / total(codes.square_()).clamp(min=_LEAST)), None

    starts: Iterable[Grid] = ((_as_float16(extreme / divisor), None) for divisor in divisors)
    return _least_error(groups, bits, starts, refit, total, (extreme, None))[0].squeeze(-1)


def search_ranges(
    groups: Tensor, ratios: Sequence[float], importance: Tensor | None = None, *, zero_points: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and minimum [...] of each group [..., K] for codes 0 … 15 that lose least, as float16 holds them.

    Args:
        ratios: candidates are these shares of the range from the least to the greatest weight, and of each what least
            squares make of it.
        importance: see ``search_scales``.
        zero_points: minimums are whole numbers of scales, 0 … 15 below zero.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if zero_points:  # zero has a code of its own
        low, high = low.clamp(max=0), high.clamp(min=0)
    weighting = torch.ones_like(groups) if importance is None else importance.expand_as(groups)
    weight_sum = weighting.sum(-1, keepdim=True).clamp(min=_LEAST)

    def total(each: Tensor) -> Tensor:
        return (each * weighting).sum(-1, keepdim=True)

    def grid(scale: Tensor, minimum: Tensor) -> Grid:
        if not zero_points:
            return _as_float16(scale), _as_float16(minimum)
        scale = _seven_digits(scale)
        zero = torch.where(scale < FLOAT16_TINY, 0.0, -minimum / scale).round_().clamp_(0, 15)
        return scale, -zero * scale

    def refit(codes: Tensor) -> Grid:
        mean_code, mean = total(codes) / weight_sum, total(groups) / weight_sum
        offset = codes - mean_code
        scale = total(offset * groups) / total(offset.square()).clamp(min=_LEAST)
        return grid(scale.clamp(min=0), mean - scale.clamp(min=0) * mean_code)

    starts = (grid((high - low) * (ratio / 15), low * ratio) for ratio in ratios)
    scale, minimum = _least_error(groups, 4, starts, refit, total, grid((high - low) / 15, low))
    assert minimum is not None
    return scale.squeeze(-1), minimum.squeeze(-1)


def _least_error(
    groups: Tensor,
    bits: int,
    starts: Iterable[Grid],
    refit: Callable[[Tensor], Grid],
    total: Callable[[Tensor], Tensor],
    best: Grid,
) -> Grid:
    """Of all ``starts``, and of what ``refit`` makes of the codes that each gives, the one of least squared error."""
    (best_scale, best_minimum), least = best, torch.full_like(best[0], torch.inf)
    for scale, minimum in starts:
        for improve in (True, False):
            codes = round_to_codes(groups, scale, bits, minimum)
            restored = codes * scale if minimum is None else codes * scale + minimum
            error = total((restored - groups).square_())
            better = error < least
            best_scale, least = torch.where(better, scale, best_scale), torch.minimum(error, least)
            if minimum is not None and best_minimum is not None:
                best_minimum = torch.where(better, minimum, best_minimum)
            if improve:
                scale, minimum = refit(codes)
    return best_scale, best_minimum


def round_to_codes(values: Tensor, scales: Tensor, bits: int, minimums: Tensor | None = None) -> Tensor:
    """The nearest codes (float32 whole numbers) of ``values``; zero where the scale is zero."""
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if minimums is None else (0, (1 << bits) - 1)
    inverse = torch.where(scales.abs() < FLOAT16_TINY, 0.0, 1.0 / scales)
    return ((values if minimums is None else values - minimums) * inverse).round_().clamp_(low, high)


def _as_float16(scale: Tensor) -> Tensor:
    """``scale`` as float16 holds it, in float32, never beyond its range."""
    return scale.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16).float()


def _seven_digits(scale: Tensor) -> Tensor:
    """``scale`` (not negative) in float16 with seven binary digits: fifteen times it is still exact there."""
    bits = (scale.clamp(max=FLOAT16_MAX / 16).to(torch.float16).view(torch.int16) + 8) & -16
    return bits.view(torch.float16).float()

"""INT4 round-to-nearest: a weight in four bits and an eighth.

A weight matrix is cut into groups of 32 neighbouring input channels. Each group keeps one scale ``s``
(float16) and a code of −8 … 7 per weight, so that ``w ≈ s · code``: 4 + 16/32 = 4.5 bits a weight. Two codes
share a byte, the even channel in the low nibble.

The only freedom is the scale. The usual choice, the largest magnitude over 7, spends the range on one
outlier. Here some forty candidates are tried per group (clipped by up to half, and of either sign, since −8
reaches farther than 7), each is improved by least squares for the codes that it gives (``s = ⟨w, c⟩ / ⟨c, c⟩``),
and the one of least squared error wins. The plain choice is among them, so the search never loses;
it takes about a third off the squared error of a Gaussian weight and needs no data. Calibrated methods
(GPTQ, AWQ) are left out here.

What stays as it is: the router and its bias (a wrong expert is worse than a coarse one), the norms, the
biases. Embedding and head are one row per token, and rare tokens have odd rows: INT8 with one scale
per row by default.

Files of other programs may hold a second number a group, the minimum ``m``: ``w = s · code + m`` with codes of
0 … 15. Such codes are kept and computed as they came; we make none ourselves.

The seam: a quantised module keeps the interface of what it replaces and offers ``weight`` (for experts
``w_gate_EFD`` and so on) as a property that dequantises. Every use of the weight works unchanged, the
absorbed MLA products included. With ``materialise`` the float32 weight is kept after the first use:
fast without a kernel, but then only the file is small, not the memory.

N rows, I input channels, G groups, K channels per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 20  # weights that one round of the search holds
_CLIPS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.78, 0.74, 0.7, 0.65, 0.6, 0.55, 0.5)
_TINY, _HUGE = 2.0**-24, 65504.0  # the least and the largest float16


@dataclass(frozen=True)
class Codes:
    """A quantised tensor: ``codes`` uint8 (two nibbles a byte) at 4 bits, int8 at 8, bfloat16 at 16, float32 at 32.

    ``scales`` is float16 [..., G] (empty from 16 bits on). ``width`` is I, the input channels of the original; the
    last group may hold fewer than ``group``. With ``minimums`` (float16 [..., G], 4 bits only) the codes are 0 … 15
    and a weight is ``scale * code + minimum``; without, they are −8 … 7.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group: int
    width: int
    minimums: Tensor | None = None


def quantise(weight: Tensor, *, bits: int = 4, group: int = 32) -> Codes:
    """Quantise the last dimension of ``weight`` (float, [..., I]) in groups; ``group=0`` is one group per row.

    16 bits is bfloat16 with no scales.
    """
    width = weight.shape[-1]
    if bits == 16:
        return Codes(weight.detach().to(torch.bfloat16), torch.empty(0, dtype=torch.float16), 16, group or width, width)
    size = group or width
    padded = torch.nn.functional.pad(weight.detach().float(), (0, -width % size))
    groups_NK = padded.reshape(-1, size)
    step = max(1, CHUNK // size)
    parts = [_search(groups_NK[at : at + step], bits) for at in range(0, groups_NK.shape[0], step)]
    codes = torch.cat([codes for codes, _ in parts]).reshape(padded.shape)[..., :width]
    scales = torch.cat([scales for _, scales in parts]).reshape(*padded.shape[:-1], -1)
    return Codes(pack(codes) if bits == 4 else codes, scales, bits, size, width)


def dequantise(packed: Codes) -> Tensor:
    """The float32 weight [..., I] that ``packed`` stands for: the reference of every kernel."""
    if packed.bits >= 16:
        return packed.codes.float()
    codes = unpack(packed.codes, packed.width) if packed.bits == 4 else packed.codes
    if packed.minimums is None:
        return codes.float() * _spread(packed.scales, packed)
    return (codes & 15).float() * _spread(packed.scales, packed) + _spread(packed.minimums, packed)


def _spread(each_group: Tensor, packed: Codes) -> Tensor:
    """A number for each group (float16 [..., G]) as float32 for each channel [..., I]."""
    return each_group.float().repeat_interleave(packed.group, dim=-1)[..., : packed.width]


def pack(codes: Tensor) -> Tensor:
    """Codes of −8 … 7 (int8, [..., I]) two to a byte (uint8, [..., ceil(I/2)]), the even one in the low nibble.

    >>> pack(torch.tensor([[-8, 7, 1]], dtype=torch.int8)).tolist()
    [[120, 1]]
    """
    nibbles = (torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)) & 15).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(packed: Tensor, width: int) -> Tensor:
    """The int8 codes [..., width] of ``pack``.

    >>> unpack(torch.tensor([[120, 1]], dtype=torch.uint8), 3).tolist()
    [[-8, 7, 1]]
    """
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :width].to(torch.int8)
    return nibbles - ((nibbles & 8) << 1)


def _search(groups_NK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The codes (int8, [N, K]) and scales (float16, [N]) of least squared error found for each group."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    extreme_N1 = groups_NK.gather(1, groups_NK.abs().argmax(1, keepdim=True))
    best_error = best_scale = best_codes = None
    # Dividing by ``low`` sends the extreme to the longer, negative end; by ±``high`` is the plain choice.
    for divisor in (float(high), float(low)):
        for clip in _CLIPS if bits == 4 else _CLIPS[:1]:
            scale_N1 = _half(extreme_N1 * (clip / divisor))
            codes_NK = _round(groups_NK, scale_N1, low, high)
            for refine in (False, True):
                if refine:
                    square_N1 = codes_NK.square().sum(1, keepdim=True)
                    scale_N1 = _half((groups_NK * codes_NK).sum(1, keepdim=True) / square_N1.clamp(min=1))
                    codes_NK = _round(groups_NK, scale_N1, low, high)
                error_N1 = (groups_NK - codes_NK * scale_N1).square().sum(1, keepdim=True)
                if best_error is None or best_scale is None or best_codes is None:
                    best_error, best_scale, best_codes = error_N1, scale_N1, codes_NK
                    continue
                better_N1 = error_N1 < best_error
                best_error = torch.where(better_N1, error_N1, best_error)
                best_scale = torch.where(better_N1, scale_N1, best_scale)
                best_codes = torch.where(better_N1, codes_NK, best_codes)
    if best_scale is None or best_codes is None:
        raise RuntimeError("the search has no candidates")
    return best_codes.to(torch.int8), best_scale[:, 0].to(torch.float16)


def _half(scale: Tensor) -> Tensor:
    """``scale`` as float16 holds it, in float32, never beyond its range."""
    return scale.clamp(-_HUGE, _HUGE).to(torch.float16).float()


def _round(groups_NK: Tensor, scale_N1: Tensor, low: int, high: int) -> Tensor:
    """The nearest codes, float32; zero where the scale is zero."""
    safe = torch.where(scale_N1.abs() < _TINY, torch.ones_like(scale_N1), scale_N1)
    codes = (groups_NK / safe).round().clamp(low, high)
    return torch.where(scale_N1.abs() < _TINY, torch.zeros_like(codes), codes)

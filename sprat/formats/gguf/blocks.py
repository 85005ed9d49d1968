"""Blocks of GGUF tensors as arrays: what each type's bytes mean, in numpy.

``quantized_parts`` keeps the class of a weight: the four-bit types become two codes a byte with float16 scales (and
minimums) a group of 32, which is how ``sprat.quant`` keeps them, so that nothing is rounded on the way in.

- Q4_0, Q5_0, Q8_0: a scale a block of 32; taken over bit for bit (five bits as eight).
- Q4_1: a scale and a minimum a block of 32; bit for bit.
- Q4_K: blocks of 256 with eight 6-bit scales and minimums times two float16 factors; the products are rounded to
  float16 (relative 2^-11, a sixtieth of the 6-bit step).
- Q2_K, Q3_K, Q5_1, Q5_K, Q6_K have no class of ours. Their weights are computed in float32 and rounded anew to eight
  bits with a scale a group of 32 (error at most 1/254 of the largest weight of the group); where plain numbers are
  wanted, they are given as they are.

The way out is ``quantize`` (plain numbers) and ``pack`` (codes that we have), for Q8_0 and Q4_0.

Codes lie in a file as two halves (code ``i`` beside code ``i + 16`` or ``i + 32``), ours as neighbors.
"""

# N rows, B blocks of a row, G groups of 32 in a row, I weights of a row

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Parts = dict[str, Array]
GROUP = 32
_EIGHT_BITS = ("Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K")
PACKED = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4} | dict.fromkeys(_EIGHT_BITS, 8)  # bits of the codes that a type becomes
WITH_MINIMUMS = ("Q4_1", "Q4_K")


def quantized_parts(kind: str, raw_NB: Array, block: int) -> Parts:
    """``codes``, ``scales`` and perhaps ``minimums`` of rows of a quantized type.

    Args:
        raw_NB: uint8 [N, bytes of a row].
        block: bytes of one block.

    Returns:
        codes uint8 [N, I/2] (even weight in the low nibble; −8 … 7 in two's complement, or 0 … 15 where there are
        minimums) or int8 [N, I]; scales and minimums float16 [N, G].
    """
    raw_NBb = raw_NB.reshape(len(raw_NB), -1, block)
    parts = _quantize_int8(_DEQUANTIZE[kind](raw_NBb)) if kind in _DEQUANTIZE else _REPACK[kind](raw_NBb)
    return {name: array.reshape(len(raw_NB), -1) for name, array in parts.items()}


def dequantize(kind: str, raw_NB: Array, block: int) -> Array:
    """The float32 weights [N, I] of rows of any type."""
    if kind == "F32":
        return np.ascontiguousarray(raw_NB).view("<f4")
    if kind == "F16":
        return np.ascontiguousarray(raw_NB).view("<f2").astype(np.float32)
    if kind == "BF16":
        return (np.ascontiguousarray(raw_NB).view("<u2").astype(np.uint32) << 16).view(np.float32)
    if kind in _DEQUANTIZE:
        return _DEQUANTIZE[kind](raw_NB.reshape(len(raw_NB), -1, block)).reshape(len(raw_NB), -1)
    parts = quantized_parts(kind, raw_NB, block)
    codes = _unpacked(parts) if PACKED[kind] == 4 else parts["codes"]
    grouped_NGg = codes.reshape(len(raw_NB), -1, GROUP).astype(np.float32) * _per_group(parts["scales"])
    if "minimums" in parts:
        grouped_NGg += _per_group(parts["minimums"])
    return grouped_NGg.reshape(len(raw_NB), -1)


def quantize(kind: str, weights_NI: Array) -> Array:
    """The bytes [N, bytes of a row] of float32 rows as F32, F16, Q8_0 or Q4_0.

    Codes and scales are those of ggml's reference quantizer (``quantize_row_q8_0_ref``, ``quantize_row_q4_0_ref``).
    """
    if kind in ("F32", "F16"):
        return np.ascontiguousarray(weights_NI, "<f4" if kind == "F32" else "<f2").view(np.uint8)
    grouped_NGg = weights_NI.reshape(len(weights_NI), -1, GROUP)
    sizes = np.abs(grouped_NGg)
    if kind == "Q8_0":
        scales = sizes.max(-1, keepdims=True) / np.float32(127)
    else:  # the weight that is farthest from zero lies at -8
        scales = np.take_along_axis(grouped_NGg, sizes.argmax(-1)[..., None], -1) / np.float32(-8)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    scaled = grouped_NGg * np.where(np.isfinite(inverse), inverse, np.float32(0))
    if kind == "Q8_0":  # halves away from zero
        whole = np.floor(np.abs(scaled))
        codes = np.copysign(whole + (np.abs(scaled) - whole >= 0.5), scaled)
    else:
        codes = np.trunc(scaled + np.float32(8.5)).clip(0, 15) - 8
    return pack(kind, codes.astype(np.int8), _to_half(scales[..., 0]))


def pack(kind: str, codes: Array, scales_NG: Array) -> Array:
    """The bytes [N, bytes of a row] of Q8_0 or Q4_0 that hold these very codes: the inverse of ``quantized_parts``.

    Args:
        codes: int8 [N, I] or [N, G, 32], of -8 … 7 for Q4_0.
        scales_NG: float16.
    """
    codes_NGg = np.ascontiguousarray(codes).reshape(*scales_NG.shape, GROUP)
    if kind == "Q4_0":
        unsigned = (codes_NGg + 8).astype(np.uint8)
        codes_NGg = unsigned[..., : GROUP // 2] | (unsigned[..., GROUP // 2 :] << 4)
    scale_bytes = np.ascontiguousarray(scales_NG, "<f2")[..., None].view(np.uint8)
    return np.concatenate((scale_bytes, codes_NGg.view(np.uint8)), -1).reshape(len(scales_NG), -1)


def bfloat16(values: Array) -> Array:
    """Float32 as the nearest bfloat16 (ties to even), in uint16."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _per_group(group_NG: Array) -> Array:
    """A number for each group as float32 [N, G, 1]."""
    return group_NG.astype(np.float32)[..., None]


def _unpacked(parts: Parts) -> Array:
    """The codes of four-bit ``parts`` as int8 [N, I]."""
    pairs = np.stack((parts["codes"] & 15, parts["codes"] >> 4), -1).reshape(len(parts["codes"]), -1)
    return pairs.astype(np.int8) if "minimums" in parts else ((pairs ^ 8).astype(np.int8) - 8)


def _pack_pairs(codes: Array) -> Array:
    """Codes 0 … 15 [..., even] two to a byte, neighbors together."""
    packed: Array = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed


def _repack_halves(bytes_: Array) -> Array:
    """Bytes [..., n] as codes [..., 2n]: all low nibbles, then all high ones, two to a byte -> [..., n]."""
    return np.concatenate((_pack_pairs(bytes_ & 15), _pack_pairs(bytes_ >> 4)), -1)


def _half(raw: Array, at: int) -> Array:
    """The float16 at byte ``at`` of each block."""
    return np.ascontiguousarray(raw[..., at : at + 2]).view("<f2")[..., 0]


def _q4_0(raw_NBb: Array) -> Parts:
    return {"codes": _repack_halves(raw_NBb[..., 2:]) ^ 0x88, "scales": _half(raw_NBb, 0)}


def _q4_1(raw_NBb: Array) -> Parts:
    return {"codes": _repack_halves(raw_NBb[..., 4:]), "scales": _half(raw_NBb, 0), "minimums": _half(raw_NBb, 2)}


def _q8_0(raw_NBb: Array) -> Parts:
    return {"codes": np.ascontiguousarray(raw_NBb[..., 2:]).view(np.int8), "scales": _half(raw_NBb, 0)}


def _q5_0(raw_NBb: Array) -> Parts:
    return {"codes": _five_bits(raw_NBb[..., 2:]).astype(np.int8) - 16, "scales": _half(raw_NBb, 0)}


def _five_bits(bytes_: Array) -> Array:
    """Bytes [..., 4 + 16]: 32 high bits, then 16 low nibbles and 16 more, as codes 0 … 31 [..., 32]."""
    high = np.unpackbits(np.ascontiguousarray(bytes_[..., :4]), axis=-1, bitorder="little")
    codes: Array = np.concatenate((bytes_[..., 4:] & 15, bytes_[..., 4:] >> 4), -1) | high << 4
    return codes


def _q5_1(raw_NBb: Array) -> Array:
    return _per_group(_half(raw_NBb, 0)) * _five_bits(raw_NBb[..., 4:]) + _per_group(_half(raw_NBb, 2))


def _six_bits(raw_NBb: Array) -> tuple[Array, Array]:
    """Scales and minimums [..., 8] of Q4_K and Q5_K: two float16 factors, then eight pairs of 6 bits in 12 bytes."""
    low, mid, high = (raw_NBb[..., at : at + 4] for at in (4, 8, 12))
    scale = np.concatenate((low & 63, (high & 15) | ((low >> 2) & 48)), -1).astype(np.float32)
    minimum = np.concatenate((mid & 63, (high >> 4) | ((mid >> 2) & 48)), -1).astype(np.float32)
    return _per_group(_half(raw_NBb, 0)) * scale, -_per_group(_half(raw_NBb, 2)) * minimum


def _q4_k(raw_NBb: Array) -> Parts:
    """Bytes: 16 with scales, 128 with codes, 32 + 32 in turn."""
    scale, minimum = _six_bits(raw_NBb)
    codes = _repack_halves(raw_NBb[..., 16:].reshape(*raw_NBb.shape[:-1], 4, 32))
    return {"codes": codes, "scales": _to_half(scale), "minimums": _to_half(minimum)}


def _q5_k(raw_NBb: Array) -> Array:
    """Bytes: 16 with scales, 32 with a fifth bit for each group, 128 with low nibbles, 32 + 32 in turn."""
    scale, minimum = _six_bits(raw_NBb)
    low = _split_bits(raw_NBb[..., 48:], 32, (0, 4)) & 15
    high = _split_bits(raw_NBb[..., 16:48], 32, range(8)) & 1
    weights: Array = _per_group(scale) * (low | high << 4) + _per_group(minimum)
    return weights


def _q2_k(raw_NBb: Array) -> Array:
    """Bytes: 16 with a scale and a minimum of 4 bits, 64 with codes of 2 bits, 2 factor, 2 factor of minimums."""
    scale, minimum = raw_NBb[..., :16] & 15, raw_NBb[..., :16] >> 4
    codes = (_split_bits(raw_NBb[..., 16:80], 32, (0, 2, 4, 6)) & 3).reshape(*raw_NBb.shape[:-1], 16, 16)
    minimum = _per_group(_half(raw_NBb, 82)) * minimum
    weights: Array = _per_group(_per_group(_half(raw_NBb, 80)) * scale) * codes - _per_group(minimum)
    return weights


def _q3_k(raw_NBb: Array) -> Array:
    """Bytes: 32 with a third bit (set: nothing to take away), 64 with two low bits, 12 with 6-bit scales, 2 factor."""
    shape = raw_NBb.shape[:-1]
    low = (_split_bits(raw_NBb[..., 32:96], 32, (0, 2, 4, 6)) & 3).astype(np.int8)
    codes = low - ((_split_bits(raw_NBb[..., :32], 32, range(8)) & 1) ^ 1).astype(np.int8) * 4
    four = _split_bits(raw_NBb[..., 96:104], 8, (0, 4)) & 15
    two = _split_bits(raw_NBb[..., 104:108], 4, (0, 2, 4, 6)) & 3
    scale = (four.reshape(*shape, 16) | two.reshape(*shape, 16) << 4).astype(np.int8) - 32
    weights: Array = _per_group(_per_group(_half(raw_NBb, 108)) * scale) * codes.reshape(*shape, 16, 16)
    return weights


def _q6_k(raw_NBb: Array) -> Array:
    """Bytes: 128 with low nibbles, 64 with two high bits each, 16 scales (int8), 2 factor."""
    shape = raw_NBb.shape[:-1]
    low = _split_bits(raw_NBb[..., :128], 64, (0, 4)) & 15
    high = _split_bits(raw_NBb[..., 128:192], 32, (0, 2, 4, 6)) & 3
    codes = (low.reshape(*shape, 256) | high.reshape(*shape, 256) << 4).astype(np.int8) - 32
    scale = np.ascontiguousarray(raw_NBb[..., 192:208]).view(np.int8).astype(np.float32)
    weights: Array = _per_group(scale * _per_group(_half(raw_NBb, 208))) * codes.reshape(*shape, 16, 16)
    return weights


def _split_bits(bytes_: Array, run: int, shifts: Iterable[int]) -> Array:
    """Runs of ``run`` bytes, each shifted right by all of ``shifts`` in turn -> [..., runs * shifts, run]."""
    by = np.array(list(shifts), np.uint8)[:, None]
    apart: Array = bytes_.reshape(*bytes_.shape[:-1], -1, 1, run) >> by
    return apart.reshape(*bytes_.shape[:-1], -1, run)


def _quantize_int8(weights: Array) -> Parts:
    """Weights [N, B, …] to the nearest of eight bits, with a scale a group of 32."""
    grouped = weights.astype(np.float32).reshape(*weights.shape[:2], -1, GROUP)
    scales = _to_half(np.abs(grouped).max(-1) / 127)
    safe = np.where(scales == 0, np.float32(1), scales.astype(np.float32))[..., None]
    with np.errstate(invalid="ignore"):  # a scale that is not finite is refused by the reader
        return {"codes": np.clip(np.rint(grouped / safe), -127, 127).astype(np.int8), "scales": scales}


def _to_half(values: Array) -> Array:
    """Float32 as float16; what is too large becomes infinite, which the reader refuses."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


_REPACK = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q8_0": _q8_0, "Q4_K": _q4_k}
_DEQUANTIZE = {"Q2_K": _q2_k, "Q3_K": _q3_k, "Q5_1": _q5_1, "Q5_K": _q5_k, "Q6_K": _q6_k}

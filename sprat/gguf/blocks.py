"""Blocks of GGUF tensors as arrays: what each type's bytes mean, in numpy.

``parts`` keeps the class of a weight: the four-bit types become two codes a byte with float16 scales (and minimums) a
group of 32, which is how ``sprat.quant`` keeps them, so that nothing is rounded on the way in.

- Q4_0, Q8_0: a scale a block of 32; taken over bit for bit.
- Q4_1: a scale and a minimum a block of 32; bit for bit.
- Q4_K: blocks of 256 with eight 6-bit scales and minimums times two float16 factors; the products are rounded to
  float16 (relative 2^-11, a sixtieth of the 6-bit step).
- Q6_K: sixteen 8-bit scales a block of 256, six-bit codes; has no class of ours and is rounded anew to eight bits
  with a scale a group of 32 (error at most 1/254 of the largest weight of the group).

Codes lie in a file as two halves (code ``i`` beside code ``i + 16`` or ``i + 32``), ours as neighbours.
"""

# N rows, B blocks of a row, G groups of 32 in a row, I weights of a row

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Parts = dict[str, Array]
GROUP = 32
PACKED = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q8_0": 8, "Q6_K": 8}  # bits of the codes that a type becomes
WITH_MINIMUMS = ("Q4_1", "Q4_K")


def parts(kind: str, raw_NB: Array, block: int) -> Parts:
    """``codes``, ``scales`` and perhaps ``minimums`` of rows of a quantised type.

    Args:
        raw_NB: uint8 [N, bytes of a row].
        block: bytes of one block.

    Returns:
        codes uint8 [N, I/2] (even weight in the low nibble; −8 … 7 in two's complement, or 0 … 15 where there are
        minimums) or int8 [N, I]; scales and minimums float16 [N, G].
    """
    found = _TAKEN_APART[kind](raw_NB.reshape(len(raw_NB), -1, block))
    return {name: array.reshape(len(raw_NB), -1) for name, array in found.items()}


def dense(kind: str, raw_NB: Array, block: int) -> Array:
    """The float32 weights [N, I] of rows of any type."""
    if kind == "F32":
        return np.ascontiguousarray(raw_NB).view("<f4")
    if kind == "F16":
        return np.ascontiguousarray(raw_NB).view("<f2").astype(np.float32)
    if kind == "BF16":
        return (np.ascontiguousarray(raw_NB).view("<u2").astype(np.uint32) << 16).view(np.float32)
    found = parts(kind, raw_NB, block)
    codes = _unpacked(found) if PACKED[kind] == 4 else found["codes"]
    grouped_NGg = codes.reshape(len(raw_NB), -1, GROUP).astype(np.float32) * _each(found["scales"])
    if "minimums" in found:
        grouped_NGg += _each(found["minimums"])
    return grouped_NGg.reshape(len(raw_NB), -1)


def bfloat16(values: Array) -> Array:
    """Float32 as the nearest bfloat16 (ties to even), in uint16."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _each(group_NG: Array) -> Array:
    """A number for each group as float32 [N, G, 1]."""
    return group_NG.astype(np.float32)[..., None]


def _unpacked(found: Parts) -> Array:
    """The codes of four-bit ``found`` as int8 [N, I]."""
    pairs = np.stack((found["codes"] & 15, found["codes"] >> 4), -1).reshape(len(found["codes"]), -1)
    return pairs.astype(np.int8) if "minimums" in found else ((pairs ^ 8).astype(np.int8) - 8)


def _neighbours(codes: Array) -> Array:
    """Codes 0 … 15 [..., even] two to a byte, neighbours together."""
    packed: Array = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed


def _halves(bytes_: Array) -> Array:
    """Bytes [..., n] as codes [..., 2n]: all low nibbles, then all high ones, two to a byte -> [..., n]."""
    return np.concatenate((_neighbours(bytes_ & 15), _neighbours(bytes_ >> 4)), -1)


def _half(raw: Array, at: int) -> Array:
    """The float16 at byte ``at`` of each block."""
    return np.ascontiguousarray(raw[..., at : at + 2]).view("<f2")[..., 0]


def _q4_0(raw_NBb: Array) -> Parts:
    return {"codes": _halves(raw_NBb[..., 2:]) ^ 0x88, "scales": _half(raw_NBb, 0)}


def _q4_1(raw_NBb: Array) -> Parts:
    return {"codes": _halves(raw_NBb[..., 4:]), "scales": _half(raw_NBb, 0), "minimums": _half(raw_NBb, 2)}


def _q8_0(raw_NBb: Array) -> Parts:
    return {"codes": np.ascontiguousarray(raw_NBb[..., 2:]).view(np.int8), "scales": _half(raw_NBb, 0)}


def _q4_k(raw_NBb: Array) -> Parts:
    """Bytes: 2 factor, 2 factor of minimums, 12 with eight pairs of 6 bits, 128 with codes, 32 + 32 in turn."""
    low, mid, high = (raw_NBb[..., at : at + 4] for at in (4, 8, 12))
    scale = np.concatenate((low & 63, (high & 15) | ((low >> 2) & 48)), -1).astype(np.float32)
    minimum = np.concatenate((mid & 63, (high >> 4) | ((mid >> 2) & 48)), -1).astype(np.float32)
    codes = raw_NBb[..., 16:].reshape(*raw_NBb.shape[:-1], 4, 32)
    return {
        "codes": _halves(codes),
        "scales": _to_half(_each(_half(raw_NBb, 0)) * scale),
        "minimums": _to_half(-_each(_half(raw_NBb, 2)) * minimum),
    }


def _q6_k(raw_NBb: Array) -> Parts:
    """Bytes: 128 with low nibbles, 64 with two high bits each, 16 scales (int8), 2 factor. Rounded anew."""
    shape = raw_NBb.shape[:-1]
    low = raw_NBb[..., :128].reshape(*shape, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    high = raw_NBb[..., 128:192].reshape(*shape, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = (low.reshape(*shape, 256) | (high.reshape(*shape, 256) << 4)).astype(np.int8) - 32
    scale = np.ascontiguousarray(raw_NBb[..., 192:208]).view(np.int8).astype(np.float32) * _each(_half(raw_NBb, 208))
    weights = (codes.reshape(*shape, 16, 16).astype(np.float32) * scale[..., None]).reshape(*shape, 8, GROUP)
    scales = _to_half(np.abs(weights).max(-1) / 127)
    safe = np.where(scales == 0, np.float32(1), scales.astype(np.float32))[..., None]
    return {"codes": np.clip(np.rint(weights / safe), -127, 127).astype(np.int8), "scales": scales}


def _to_half(values: Array) -> Array:
    """Float32 as float16; what is too large becomes infinite, which the reader refuses."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


_TAKEN_APART: dict[str, Callable[[Array], Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}

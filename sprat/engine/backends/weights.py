"""Weights as the kernels eat them: floats where they lie, codes in panels (``src/linear.h``), all in large pages."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor

from sprat.kernels import native
from sprat.model.lora import LowRank
from sprat.quant.layers import QuantizedWeight, QuantLinear

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8, INT4, INT4_MIN = 3, 4, 5
GROUP = 32  # groups of weights are multiples of this


class HugePages:
    """Memory for weights in large pages, which one core reads a tenth faster than small ones."""

    SIZE = 1 << 25  # bytes of one piece

    def __init__(self) -> None:
        self._piece, self._used = torch.empty(0, dtype=torch.uint8), 0

    def take(self, count: int) -> Tensor:
        """``count`` bytes, zero, uint8, aligned to 64."""
        if self._used + count > len(self._piece):
            memory = mmap.mmap(-1, max(count, self.SIZE))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._piece, self._used = torch.frombuffer(memory, dtype=torch.uint8), 0
        piece = self._piece[self._used : self._used + count]
        self._used += -(-count // 64) * 64
        return piece


def float_weights(weight: Tensor, bias: Tensor | None = None) -> Any:
    """A float matrix where it lies."""
    weight = weight.detach().contiguous()
    rows, cols = weight.shape
    data = weight.view(torch.uint8) if weight.dtype == torch.bfloat16 else weight
    return native().Weights(DTYPE_CODES[weight.dtype], rows, cols, GROUP, data, None, None, _optional_vector(bias))


def as_float_weights(module: Any, consume: bool = False) -> Any:
    """A matrix that must stay floats: float16 of what its codes stand for, if it has any."""
    if not isinstance(module, QuantLinear):
        return float_weights(module.weight)
    matrix = float_weights(module.packed.codes if module.packed.bits >= 16 else _dense(module.packed).half())
    if consume:
        module.packed.release()
    return matrix


def pack_weights(
    packed: QuantizedWeight, pages: HugePages, bias: Tensor | None = None, consume: bool = False
) -> list[Any]:
    """The matrices of a quantised tensor [rows, cols] or [E, rows, cols]; ``consume`` lets go of the tensor."""
    if packed.bits >= 16:
        return [float_weights(values, bias) for values in packed.codes.reshape(-1, *packed.codes.shape[-2:])]
    cols, bits = packed.width, packed.bits
    padded = -(-cols // GROUP) * GROUP
    group = packed.group if packed.group < cols else padded
    rows, panels, groups = packed.codes.shape[-2], -(-packed.codes.shape[-2] // 16), -(-padded // group)
    minimums = getattr(packed, "minimums", None)
    kind = INT8 if bits == 8 else INT4 if minimums is None else INT4_MIN
    flip = 128 if bits == 8 else 8 if minimums is None else 0
    matrices = []
    for index, codes in enumerate(packed.codes.reshape(-1, *packed.codes.shape[-2:])):
        data = pages.take(panels * padded * 16 * bits // 8)
        native().pack_codes(codes.contiguous(), data, rows, cols, bits, flip)
        scales: list[Tensor | None] = []
        for source in (packed.scales, minimums):
            packed_scales = None if source is None else pages.take(panels * groups * 32)
            if source is not None:
                values = source.reshape(-1, rows, groups)[index].contiguous()
                native().pack_scales(values, packed_scales, rows, groups)
            scales.append(packed_scales)
        matrices.append(native().Weights(kind, rows, cols, group, data, *scales, _optional_vector(bias)))
    if consume:
        packed.release()
    return matrices


def low_rank_pair(low_rank: LowRank, expert: int | None) -> tuple[Tensor, Tensor]:
    """A [R, in], and B with its scale transposed [R, out up to a multiple of 16], of one expert where it is a stack."""
    down, up = low_rank.lora_A.detach(), low_rank.lora_B.detach()
    if expert is not None:
        down, up = down[expert], up[expert]
    scaled = torch.nn.functional.pad((up * low_rank.scaling).T, (0, -len(up) % 16))
    return down.contiguous(), scaled.contiguous()


def trim_heap() -> None:
    """Let the system have what was freed; the C library keeps it for later, here some 60 MB of a 90 MB model."""
    with contextlib.suppress(OSError, AttributeError):  # a C library that has no such call
        ctypes.CDLL(None).malloc_trim(0)


def float_vector(weight: Tensor) -> Tensor:
    """A vector as contiguous float32; the tensor itself where it is that already."""
    return weight.detach().float().contiguous()


def _optional_vector(bias: Tensor | None) -> Tensor | None:
    """``float_vector`` of a bias that may be missing."""
    return None if bias is None else float_vector(bias)


def _dense(packed: QuantizedWeight) -> Tensor:
    """The float32 matrix of a quantised one, without keeping it there."""
    materialize, packed.materialize = packed.materialize, False
    try:
        return packed.dequantize()
    finally:
        packed.materialize = materialize

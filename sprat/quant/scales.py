"""Scales that learn: a quantized model whose codes stay what they are, and whose scales have a gradient.

Of a quantized matrix the codes are whole numbers, and have none. But each group's scale is a number like any other, and
a model has one for every 32 to 128 weights: enough to undo much of what rounding did, and without any bit more in the
file (PEQA, Kim et al. 2023, arXiv 2305.14152; EfficientQAT, Chen et al. 2024, arXiv 2407.11062, section 3.3). What is
learned is the relative change of a scale, since a step of one size then means the same to large and small ones. A scale
is kept in float16, whose steps are as large as what a scale learns in a few dozen steps, so it is rounded already while
it learns. Minimums, where a group has one, stay.
"""

# G groups of a row, K channels of a group, I input channels of a row

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sprat.model import Transformer
from sprat.quant.int4 import QuantizedTensor, group_channels, unpack_int4
from sprat.quant.layers import QuantExperts, QuantizedWeight, QuantLinear

_Packed = TypeVar("_Packed", bound=QuantizedWeight)


class _Dequantize(torch.autograd.Function):
    """``scale · code`` for each channel, with a gradient to the scales; keeps nothing but the codes."""

    @staticmethod
    def forward(ctx: Any, scales_G: Tensor, codes_I: Tensor, size: int) -> Tensor:
        ctx.codes_I, ctx.size = codes_I, size
        groups_GK = group_channels(codes_I, size).float().mul_(scales_G.unsqueeze(-1))
        return groups_GK.flatten(-2)[..., : codes_I.shape[-1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_GK, codes_GK = (group_channels(each, ctx.size) for each in (grads[0].float(), ctx.codes_I))
        return torch.linalg.vecdot(grad_GK, codes_GK.float()), None, None


class LearnedScales(QuantizedWeight):
    """A quantized tensor whose scales are ``scale · (1 + change)``; ``change`` is learned."""

    def __init__(self, packed: QuantizedTensor) -> None:
        super().__init__(packed, materialize=False)
        self.change = nn.Parameter(torch.zeros(packed.scales.shape))
        self._codes = unpack_int4(packed.codes, packed.width) if packed.bits == 4 else packed.codes
        if packed.minimums is not None:
            self._codes = self._codes & 15

    def dequantize(self) -> Tensor:
        """The float32 tensor that will be kept, with a gradient to ``change`` (straight through float16)."""
        scales = self.scales.float() * (1 + self.change)
        scales = scales + (self.learned_scales().float() - scales).detach()
        dense: Tensor = _Dequantize.apply(scales, self._codes, self.group)  # type: ignore[no-untyped-call]
        if self.minimums is None:
            return dense
        return dense + self.minimums.float().repeat_interleave(self.group, dim=-1)[..., : self.width]

    def learned_scales(self) -> Tensor:
        """The scales that were learned, as float16 holds them."""
        return (self.scales.float() * (1 + self.change.detach())).half()

    def learned(self) -> QuantizedTensor:
        """The tensor with these."""
        return replace(self.to_tensor(), scales=self.learned_scales())


def learn_scales(model: Transformer) -> list[LearnedScales]:
    """Let the scales of the matrices inside ``model`` learn, and nothing else of it; embedding and head stay.

    ``keep_scales`` makes it a plain quantized model again.
    """
    model.requires_grad_(False)
    return _replace(model, lambda packed: LearnedScales(packed.to_tensor()))


def keep_scales(model: Transformer, *, learned: bool = True, materialize: bool = True) -> None:
    """Put plain quantized tensors in the place of those of ``learn_scales``; not ``learned``: with the old scales."""

    def plain(packed: QuantizedWeight) -> QuantizedWeight:
        tensor = packed.learned() if learned and isinstance(packed, LearnedScales) else packed.to_tensor()
        return QuantizedWeight(tensor, materialize=materialize)

    _replace(model, plain)


def _replace(model: Transformer, make: Callable[[QuantizedWeight], _Packed]) -> list[_Packed]:
    """Put what ``make`` gives in the place of each quantized tensor inside ``model``; all of them, in order."""
    made = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantLinear | QuantExperts) or name == "head":
            continue
        for leaf, packed in list(module.named_children()):
            if isinstance(packed, QuantizedWeight) and packed.bits < 16:
                made.append(make(packed))
                module.set_submodule(leaf, made[-1])
    return made

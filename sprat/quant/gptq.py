"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round a weight so that its errors cancel on real text.

Rounding each weight to the nearest code makes every weight as good as it can be alone. But a layer is not judged
by its weights, it is judged by ``y = W x``, and channels of real activations are large, small and correlated. With
``H = X^T X`` summed over the rows X of some calibration text, the squared error of the outputs for a change ``d`` of
one row of the weight is ``d H d^T``: a quadratic form, the same for all rows. Two things follow:

- An error in one channel can be undone by its correlated neighbors. Fix the columns one by one; each time, move the
  columns that are still free to where the form is least, given the error just made (Hassibi and Stork 1992). In
  closed form that is ``w_j -= e_c * U[c, j]`` with ``e_c = (w_c - code * scale) / U[c, c]``, where ``U`` is the upper
  Cholesky factor of ``H^-1``: one factorisation serves all rows and all steps.
- The order matters: a column that comes last has nobody left to undo its error. Columns of high energy
  (``diag H``) therefore come first. The groups of a scale stay what they are, so the scales are chosen beforehand,
  each by least squared error weighted with ``diag H``.

What the text never activates, it says nothing about: a group of channels that are all silent is rounded as if there
were no text, and a silent channel among active ones counts as the mean channel does, or the scale would be chosen for
the others and clip it. What passes where, and when it is rounded, is in ``calibration``.

The factor is computed in float64: ``U = R^-1`` of ``H = R^T R``, read backwards. llm-compressor inverts ``H`` and
factorises again, all in float32, and divides by scales where we multiply by their inverse. With
``precision="float32"`` and ``clip="minmax"`` each step is taken in its order, and codes and scales are its own to the
last bit (``bench/gptq_parity.py``).

Left out: moving the weights for what the layers before got wrong (the target is ``W x`` for the inputs that arrive),
and searching scales anew while columns move.
"""

# E matrices side by side (experts; 1 for a Linear), N outputs, I input channels, G groups, K channels of a group

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sprat.config import Rounding
from sprat.config.quant import ActivationOrder
from sprat.errors import DataError
from sprat.quant.int4 import (
    EXTREME_DIVISORS,
    Grid,
    QuantizedTensor,
    Scheme,
    group_channels,
    pack_int4,
    quantize_tensor,
    round_to_codes,
    search_grid,
)

BLOCK = 128  # columns between two updates of all that are still free
# candidates; neighbors make up for clipping
SCALE_DIVISORS = {4: (-9.0, -8.5, -8.0, -7.5, -7.0, 7.5, 7.0, 6.5), 8: EXTREME_DIVISORS[8]}
MAX_HESSIAN_ELEMENTS = 1 << 26  # numbers of H at work at once


class GPTQSettings(NamedTuple):
    """Settings of the recursion; see ``QuantizeConfig``."""

    activation_order: ActivationOrder = "static"
    damping: float = 0.01  # of the mean energy, added to every channel's
    float32: bool = False


DEFAULT = GPTQSettings()


def gptq_quantize(
    weight_ENI: Tensor, hessian_EII: Tensor, scheme: Scheme, settings: GPTQSettings = DEFAULT
) -> QuantizedTensor:
    """The codes of ``weight_ENI`` (float32), rounded column by column so that the errors cancel.

    Args:
        hessian_EII: ``X^T X``, symmetric; where it is zero the matrix is rounded to the nearest.

    Raises:
        DataError: the damping is too small for what the text says.
    """
    experts, rows, width = weight_ENI.shape
    size = scheme.group or width
    step = max(1, MAX_HESSIAN_ELEMENTS // width**2)
    if experts > step:
        pairs = zip(weight_ENI.split(step), hessian_EII.split(step), strict=True)
        return _join([gptq_quantize(weight, part, scheme, settings) for weight, part in pairs])
    diagonal_EI = hessian_EII.diagonal(dim1=-2, dim2=-1)
    grid_ENG = _fitted_grid(weight_ENI, diagonal_EI, scheme, gptq=True)
    if settings.activation_order == "static":
        order_EI = diagonal_EI.argsort(-1, descending=True)
    else:
        order_EI = torch.arange(width).expand(experts, -1)
    order_EIN = order_EI.unsqueeze(-1).expand(-1, -1, rows)
    weight_EIN = weight_ENI.mT.gather(1, order_EIN)
    scale_EIN, minimum_EIN = (None if g is None else g.mT.gather(1, order_EIN // size) for g in grid_ENG)
    assert scale_EIN is not None
    if settings.float32:
        hessian_EII = _reordered(hessian_EII, order_EI)
        codes_EIN = _quantize_float32(weight_EIN.mT, scale_EIN.mT, hessian_EII, scheme.bits, settings.damping).mT
    else:
        factor_EII = _inverse_cholesky(hessian_EII, order_EI, settings.damping)
        codes_EIN = _quantize_columns(weight_EIN, scale_EIN, minimum_EIN, factor_EII, scheme.bits)
    codes_ENI = torch.empty_like(codes_EIN).scatter_(1, order_EIN, codes_EIN).mT
    return _packed(weight_ENI, codes_ENI, grid_ENG, diagonal_EI, scheme, "gptq")


def nearest_quantize(weight_ENI: Tensor, hessian_EII: Tensor, scheme: Scheme) -> QuantizedTensor:
    """The nearest codes of ``weight_ENI``, of scales that err least on text; see ``gptq_quantize``."""
    size = scheme.group or weight_ENI.shape[-1]
    diagonal_EI = hessian_EII.diagonal(dim1=-2, dim2=-1)
    scales_ENG, minimums_ENG = grid_ENG = _fitted_grid(weight_ENI, diagonal_EI, scheme, gptq=False)
    groups_ENGK = group_channels(weight_ENI, size, repeat_last=not scheme.symmetric)
    each = None if minimums_ENG is None else minimums_ENG.unsqueeze(-1)
    codes_ENGK = round_to_codes(groups_ENGK, scales_ENG.unsqueeze(-1), scheme.bits, each).to(torch.int8)
    codes_ENI = codes_ENGK.flatten(-2)[..., : weight_ENI.shape[-1]]
    return _packed(weight_ENI, codes_ENI, grid_ENG, diagonal_EI, scheme, "nearest")


def _packed(
    weight_ENI: Tensor, codes_ENI: Tensor, grid_ENG: Grid, diagonal_EI: Tensor, scheme: Scheme, rounding: Rounding
) -> QuantizedTensor:
    """Codes and grid as they are kept; a matrix that no text reached is rounded to the nearest."""
    packed = pack_int4(codes_ENI) if scheme.bits == 4 else codes_ENI.contiguous()
    scales_ENG, minimums_ENG = (None if g is None else g.half() for g in grid_ENG)
    assert scales_ENG is not None
    silent_E = diagonal_EI.amax(-1) == 0
    plain = quantize_tensor(weight_ENI[silent_E], **scheme._asdict())
    packed[silent_E], scales_ENG[silent_E] = plain.codes, plain.scales
    if minimums_ENG is not None and plain.minimums is not None:
        minimums_ENG[silent_E] = plain.minimums
    width = weight_ENI.shape[-1]
    rounding = "nearest" if bool(silent_E.all()) else rounding
    return QuantizedTensor(packed, scales_ENG, scheme.bits, scheme.group or width, width, minimums_ENG, rounding)


def _join(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Experts of several parts side by side."""
    minimums = [part.minimums for part in parts if part.minimums is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        minimums=torch.cat(minimums) if minimums else None,
    )


def _fitted_grid(weight_ENI: Tensor, diagonal_EI: Tensor, scheme: Scheme, *, gptq: bool) -> Grid:
    """Scale and minimum for each group [E, N, G]: of least error on text, or of the weights where it is silent."""
    size = scheme.group or weight_ENI.shape[-1]
    groups_ENGK = group_channels(weight_ENI, size, repeat_last=not scheme.symmetric)
    active_EI = diagonal_EI > 0
    mean_E1 = diagonal_EI.sum(-1, keepdim=True) / active_EI.sum(-1, keepdim=True).clamp(min=1)
    weighting_EI = torch.where(active_EI, diagonal_EI, mean_E1)
    weighting_E1GK = group_channels(weighting_EI, size).unsqueeze(1)
    grid_ENG = search_grid(groups_ENGK, scheme, weighting_E1GK, SCALE_DIVISORS[scheme.bits] if gptq else None)
    silent_EG = group_channels(diagonal_EI, size).amax(-1) == 0
    if not bool(silent_EG.any()):
        return grid_ENG
    plain_ENG, silent_E1G = search_grid(groups_ENGK, scheme), silent_EG.unsqueeze(1)
    scales_ENG = torch.where(silent_E1G, plain_ENG[0], grid_ENG[0])
    if grid_ENG[1] is None or plain_ENG[1] is None:
        return scales_ENG, None
    return scales_ENG, torch.where(silent_E1G, plain_ENG[1], grid_ENG[1])


def _reordered(hessian_EII: Tensor, order_EI: Tensor) -> Tensor:
    """The Hessian (a copy) with its channels in ``order_EI``."""
    hessian = hessian_EII.gather(1, order_EI.unsqueeze(-1).expand_as(hessian_EII))
    return hessian.gather(2, order_EI.unsqueeze(1).expand_as(hessian_EII))


def _inverse_cholesky(hessian_EII: Tensor, order_EI: Tensor, damping: float) -> Tensor:
    """Upper ``U`` (float32) with ``U^T U = H^-1``, of the damped Hessian with its channels in ``order_EI``.

    Raises:
        DataError: the damped Hessian is not positive.
    """
    hessian = _reordered(hessian_EII, order_EI).double()
    diagonal_EI = hessian.diagonal(dim1=-2, dim2=-1)
    diagonal_EI += damping * diagonal_EI.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    # Read backwards, a lower factor is an upper one: H = R R^T with R upper, so H^-1 = R^-T R^-1.
    upper, fault_E = torch.linalg.cholesky_ex(hessian.flip(-1, -2))
    if bool(fault_E.any()):
        what = f"what the text says of its {hessian.shape[-1]} input channels is too little for so small a damping"
        raise DataError(what, where="damping", todo="raise it (0.01 is usual), or calibrate on more text")
    upper = upper.flip(-1, -2)
    inverse: Tensor = torch.linalg.solve_triangular(upper, torch.eye(upper.shape[-1], dtype=upper.dtype), upper=True)
    return inverse.float()


def _quantize_columns(
    weight_EIN: Tensor, scale_EIN: Tensor, minimum_EIN: Tensor | None, factor_EII: Tensor, bits: int
) -> Tensor:
    """Fix the columns of ``weight_EIN`` (overwritten) one by one; int8 codes [E, I, N]."""
    codes_EIN = torch.empty(weight_EIN.shape, dtype=torch.int8)
    width = weight_EIN.shape[1]
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        error_EBN = torch.empty_like(weight_EIN[:, start:stop])
        for column in range(start, stop):
            value, scale = weight_EIN[:, column], scale_EIN[:, column]
            minimum = None if minimum_EIN is None else minimum_EIN[:, column]
            codes = round_to_codes(value, scale, bits, minimum)
            codes_EIN[:, column] = codes
            restored = codes * scale if minimum is None else codes * scale + minimum
            row_EI = factor_EII[:, column]
            error_EBN[:, column - start] = (value - restored) / row_EI[:, column, None]
            later = row_EI[:, column + 1 : stop, None]
            weight_EIN[:, column + 1 : stop] -= later * error_EBN[:, column - start, None]
        weight_EIN[:, stop:].baddbmm_(factor_EII[:, start:stop, stop:].mT, error_EBN, alpha=-1)
    return codes_EIN


def _quantize_float32(weight_ENI: Tensor, scale_ENI: Tensor, hessian_EII: Tensor, bits: int, damping: float) -> Tensor:
    """The same in the order in which llm-compressor computes it; int8 codes [E, N, I]. The Hessian is overwritten."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    weight_ENI = weight_ENI.contiguous()
    codes_ENI = torch.empty(weight_ENI.shape, dtype=torch.int8)
    for weight, scale, hessian, out in zip(weight_ENI, scale_ENI, hessian_EII, codes_ENI, strict=True):
        diagonal = hessian.diagonal()
        silent = diagonal == 0
        diagonal.masked_fill_(silent, 1.0)
        weight.masked_fill_(silent, 0.0)
        diagonal.add_(damping * diagonal.mean())
        lower, fault = torch.linalg.cholesky_ex(hessian)
        if int(fault):  # not positive: nothing can be said about neighbors
            factor = torch.eye(len(hessian))
        else:
            factor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
        for start in range(0, weight.shape[1], BLOCK):
            stop = min(start + BLOCK, weight.shape[1])
            block, error = weight[:, start:stop].clone(), torch.empty_like(weight[:, start:stop])
            for column in range(stop - start):
                at = start + column
                codes = (block[:, column] / scale[:, at]).clamp_(low, high).round_()
                out[:, at] = codes
                error[:, column] = (block[:, column] - codes * scale[:, at]) / factor[at, at]
                block[:, column:] -= error[:, column, None] * factor[at, at:stop]
            weight[:, stop:] -= torch.bmm(error[None], factor[None, start:stop, stop:])[0]
    return codes_ENI

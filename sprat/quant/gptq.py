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

The later layers must see what the earlier ones really send, so the text passes through the model once, all of
it at once, and every matrix is rounded at the moment when its input arrives: by then all that came before it is
rounded. No layer is run twice, and only one ``H`` (of one stack of experts) is alive.

What the text never activates, it says nothing about. An expert sees only the rows that the router sends to it: below
``MIN_ROWS_PER_CHANNEL`` rows a channel its ``H`` says more about those rows than about text, and it is rounded to the
nearest. So is a group of channels that are all silent, and a silent channel among active ones counts as the mean
channel does, or the scale would be chosen for the others and clip it. Padding is no text, and packed rows stay apart:
``segments_BT`` says which positions count, and no document sees its neighbor.

Left out: moving the weights for what the layers before got wrong (the target is ``W x`` for the inputs that arrive),
and searching scales anew while columns move.
"""

# E matrices side by side (experts; 1 for a Linear), N outputs, I input channels, F expert width, D hidden, M rows

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprat.errors import CheckpointError
from sprat.model import MLP, Experts, Gate, Linear, Routing, Transformer
from sprat.model.moe import dispatch
from sprat.quant.int4 import (
    EXTREME_DIVISORS,
    QuantizedTensor,
    dequantize_tensor,
    group_channels,
    pack_int4,
    quantize_tensor,
    round_to_codes,
    search_scales,
)

BLOCK = 128  # columns between two updates of all that are still free
DAMPING = 0.01  # of the mean energy, added to every channel's
MIN_ROWS_PER_CHANNEL = 1.0  # rows for each input channel that a matrix must have seen
# candidates; neighbors make up for clipping
SCALE_DIVISORS = {4: (-9.0, -8.5, -8.0, -7.5, -7.0, 7.5, 7.0, 6.5), 8: EXTREME_DIVISORS[8]}
MAX_HESSIAN_ELEMENTS = 1 << 26  # numbers of H at work at once

FormatOf = Callable[[str], tuple[int, int]]  # name in the state dict -> bits and group (0 is a group per row)
Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


def calibrate(
    model: Transformer,
    tokens_BT: Tensor,
    format_of: FormatOf,
    *,
    segments_BT: Tensor | None = None,
    on_quantized: Callable[[str], None] = lambda _: None,
) -> dict[str, QuantizedTensor]:
    """Codes of the matrices of ``model`` that ``tokens_BT`` passes through, each fitted to what passes.

    The weights of ``model`` become what the codes stand for. Embedding and head are left alone, and the caller rounds
    in the plain way what no text reaches.

    Args:
        model: float32, with the embedding that will be used.
        tokens_BT: long; all of it is at work at once.
        format_of: bits and group of each matrix.
        segments_BT: which document each token is of, 0 for padding, as in packed rows; one a row if not given.
        on_quantized: called with the name of each matrix that is done.

    Raises:
        CheckpointError: what passes is not finite.
    """
    calibration, hooks = _CalibrationHooks(format_of, on_quantized), []
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module is not model.head:
            hooks.append(module.register_forward_pre_hook(calibration.linear(name, module)))
        elif isinstance(module, MLP):  # it may compute gate and up in one product, past the two
            for leaf in ("gate_proj", "up_proj"):
                hook = calibration.linear(f"{name}.{leaf}", module.get_submodule(leaf))
                hooks.append(module.register_forward_pre_hook(hook))
        elif isinstance(module, Experts):
            hooks.append(module.register_forward_pre_hook(calibration.experts(name, module)))
        elif isinstance(module, Gate):
            hooks.append(module.register_forward_hook(calibration.routed))
    try:
        with torch.no_grad():
            calibration.valid_BT = None if segments_BT is None else segments_BT > 0
            hidden = model.hidden(tokens_BT, segments_BT=segments_BT)
            for depth in range(1, len(model.mtp) + 1):
                if segments_BT is not None:
                    joined_BT = segments_BT[:, depth:] == segments_BT[:, :-depth]
                    calibration.valid_BT = joined_BT & (segments_BT[:, depth:] > 0)
                hidden = model.mtp_hidden(hidden, tokens_BT, segments_BT=segments_BT, depth=depth)
    finally:
        for handle in hooks:
            handle.remove()
    return calibration.codes


class _CalibrationHooks:
    """Rounds each matrix when its input first arrives; ``codes`` by name. Only positions in ``valid_BT`` count."""

    def __init__(self, format_of: FormatOf, on_quantized: Callable[[str], None]) -> None:
        self.codes: dict[str, QuantizedTensor] = {}
        self.valid_BT: Tensor | None = None
        self._valid_M = torch.empty(0, dtype=torch.bool)
        self._format_of, self._on_quantized = format_of, on_quantized
        self._last: tuple[object, Tensor] = (None, torch.empty(0))

    def linear(self, name: str, module: nn.Module) -> Hook:
        """A hook for the Linear ``name``, or for what hands its input on to it."""

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if f"{name}.weight" in self.codes:
                return
            if self._last[0] is not inputs[0]:  # q, k and v are handed the very same tensor
                rows_NI = inputs[0].flatten(0, -2)
                counted = rows_NI if self.valid_BT is None else rows_NI[self.valid_BT.flatten()]
                self._last = (inputs[0], hessian([counted]))
            self._quantize(f"{name}.weight", module.get_parameter("weight"), self._last[1])

        return hook

    def routed(self, _: nn.Module, inputs: tuple[Tensor, ...], routing: Routing) -> None:
        """A hook for a router: which rows of its experts count."""
        if self.valid_BT is not None:
            self._valid_M = dispatch(self.valid_BT.flatten(), routing)[0]

    def experts(self, name: str, module: Experts) -> Hook:
        """A hook for the stacked experts ``name``; their inputs lie sorted by expert."""

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if f"{name}.w_gate_EFD" in self.codes:
                return
            rows: Sequence[Tensor] = inputs[0].split(inputs[1].tolist())
            if self.valid_BT is not None:
                counts = self._valid_M.split(inputs[1].tolist())
                rows = [x_MD[valid_M] for x_MD, valid_M in zip(rows, counts, strict=True)]
            hessian_EDD = hessian(rows)
            self._quantize(f"{name}.w_gate_EFD", module.w_gate_EFD, hessian_EDD)
            self._quantize(f"{name}.w_up_EFD", module.w_up_EFD, hessian_EDD)
            del hessian_EDD
            experts = zip(rows, module.w_gate_EFD, module.w_up_EFD, strict=True)
            hidden = [F.silu(x_MD @ gate_FD.T) * (x_MD @ up_FD.T) for x_MD, gate_FD, up_FD in experts]
            self._quantize(f"{name}.w_down_EDF", module.w_down_EDF, hessian(hidden))

        return hook

    def _quantize(self, name: str, weight: nn.Parameter, hessian_EII: Tensor) -> None:
        """Round ``weight`` ([N, I] or [E, N, I]) in place and keep its codes."""
        if not bool(torch.isfinite(hessian_EII).all()):
            fault = "what the calibration text makes of this matrix's input is not finite"
            raise CheckpointError(fault, where=name, todo="use a checkpoint that did not diverge")
        bits, group = self._format_of(name)
        codes = gptq_quantize(weight.view(-1, *weight.shape[-2:]), hessian_EII, bits=bits, group=group)
        if weight.dim() == 2:
            codes = replace(codes, codes=codes.codes[0], scales=codes.scales[0])
        self.codes[name] = codes
        weight.copy_(dequantize_tensor(codes))
        self._on_quantized(name)


def hessian(rows: Sequence[Tensor]) -> Tensor:
    """``X^T X`` [E, I, I] (float32) of E sets of rows [M, I]; of too few rows, zeros."""
    width = rows[0].shape[-1]
    hessian_EII = torch.zeros(len(rows), width, width)
    for hessian_II, x_MI in zip(hessian_EII, rows, strict=True):
        if len(x_MI) >= MIN_ROWS_PER_CHANNEL * width:
            torch.mm(x_MI.float().T, x_MI.float(), out=hessian_II)
    return hessian_EII


def gptq_quantize(weight_ENI: Tensor, hessian_EII: Tensor, *, bits: int, group: int) -> QuantizedTensor:
    """The codes of ``weight_ENI`` (float32), rounded column by column so that the errors cancel.

    Args:
        hessian_EII: ``X^T X``, symmetric; where it is zero the matrix is rounded to the nearest.
        bits: 4 or 8.
        group: input channels that share a scale; 0 is a group per row.
    """
    experts, _, width = weight_ENI.shape
    size = group or width
    step = max(1, MAX_HESSIAN_ELEMENTS // width**2)
    if experts > step:
        pairs = zip(weight_ENI.split(step), hessian_EII.split(step), strict=True)
        parts = [gptq_quantize(weight, part, bits=bits, group=group) for weight, part in pairs]
        codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
        return replace(parts[0], codes=codes, scales=scales)
    diagonal_EI = hessian_EII.diagonal(dim1=-2, dim2=-1)
    scales_ENG = _scales(weight_ENI, diagonal_EI, bits, size)
    order_EI = diagonal_EI.argsort(-1, descending=True)
    order_EIN = order_EI.unsqueeze(-1).expand(-1, -1, weight_ENI.shape[1])
    scale_EIN, factor_EII = scales_ENG.mT.gather(1, order_EIN // size), _inverse_cholesky(hessian_EII, order_EI)
    codes_EIN = _quantize_columns(weight_ENI.mT.gather(1, order_EIN), scale_EIN, factor_EII, bits)
    codes_ENI = torch.empty_like(codes_EIN).scatter_(1, order_EIN, codes_EIN).mT
    packed, scales_ENG = pack_int4(codes_ENI) if bits == 4 else codes_ENI.contiguous(), scales_ENG.half()
    silent_E = diagonal_EI.amax(-1) == 0
    plain = quantize_tensor(weight_ENI[silent_E], bits=bits, group=group)
    packed[silent_E], scales_ENG[silent_E] = plain.codes, plain.scales
    return QuantizedTensor(packed, scales_ENG, bits, size, width, rounding="gptq")


def _scales(weight_ENI: Tensor, diagonal_EI: Tensor, bits: int, size: int) -> Tensor:
    """A scale for each group [E, N, G]: of least error on text, or where no channel was active, of the weights."""
    groups_ENGK = group_channels(weight_ENI, size)
    active_EI = diagonal_EI > 0
    mean_E1 = diagonal_EI.sum(-1, keepdim=True) / active_EI.sum(-1, keepdim=True).clamp(min=1)
    weighting_EI = torch.where(active_EI, diagonal_EI, mean_E1)
    scales_ENG = search_scales(groups_ENGK, bits, SCALE_DIVISORS[bits], group_channels(weighting_EI, size).unsqueeze(1))
    silent_EG = group_channels(diagonal_EI, size).amax(-1) == 0
    if bool(silent_EG.any()):
        plain_ENG = search_scales(groups_ENGK, bits, EXTREME_DIVISORS[bits])
        scales_ENG = torch.where(silent_EG.unsqueeze(1), plain_ENG, scales_ENG)
    return scales_ENG


def _inverse_cholesky(hessian_EII: Tensor, order_EI: Tensor) -> Tensor:
    """Upper ``U`` (float32) with ``U^T U = H^-1``, of the damped Hessian with its channels in ``order_EI``."""
    hessian = hessian_EII.gather(1, order_EI.unsqueeze(-1).expand_as(hessian_EII))
    hessian = hessian.gather(2, order_EI.unsqueeze(1).expand_as(hessian_EII)).double()
    diagonal_EI = hessian.diagonal(dim1=-2, dim2=-1)
    diagonal_EI += DAMPING * diagonal_EI.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    # Read backwards, a lower factor is an upper one: H = R R^T with R upper, so H^-1 = R^-T R^-1.
    upper = torch.linalg.cholesky(hessian.flip(-1, -2)).flip(-1, -2)
    inverse: Tensor = torch.linalg.solve_triangular(upper, torch.eye(upper.shape[-1], dtype=upper.dtype), upper=True)
    return inverse.float()


def _quantize_columns(weight_EIN: Tensor, scale_EIN: Tensor, factor_EII: Tensor, bits: int) -> Tensor:
    """Fix the columns of ``weight_EIN`` (overwritten) one by one; int8 codes [E, I, N]."""
    codes_EIN = torch.empty(weight_EIN.shape, dtype=torch.int8)
    width = weight_EIN.shape[1]
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        error_EBN = torch.empty_like(weight_EIN[:, start:stop])
        for column in range(start, stop):
            value, scale = weight_EIN[:, column], scale_EIN[:, column]
            codes = round_to_codes(value, scale, bits)
            codes_EIN[:, column] = codes
            row_EI = factor_EII[:, column]
            error_EBN[:, column - start] = (value - codes * scale) / row_EI[:, column, None]
            later = row_EI[:, column + 1 : stop, None]
            weight_EIN[:, column + 1 : stop] -= later * error_EBN[:, column - start, None]
        weight_EIN[:, stop:].baddbmm_(factor_EII[:, start:stop, stop:].mT, error_EBN, alpha=-1)
    return codes_EIN

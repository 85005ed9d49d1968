"""What text says about a model's matrices: it passes through once, and each is rounded when its input arrives.

The later layers must see what the earlier ones really send, so the text passes through the model once, all of
it at once, and every matrix is rounded at the moment when its input arrives: by then all that came before it is
rounded. No layer is run twice, and only one ``H`` (of one stack of experts) is alive.

What the text never activates, it says nothing about. Below ``MIN_ROWS_PER_CHANNEL`` rows a channel a matrix's ``H``
says more about those rows than about text, and an expert sees only the rows that the router sends to it (for experts
the user may give another number). Such a matrix or expert is rounded to the nearest, or judged by all rows that there
are (an expert as if every token had been sent to it), or refused, and is counted (``SeenTokens``). Padding is no text,
and packed rows stay apart: ``segments_BT`` says which positions count, and no document sees its neighbor.
"""

# E experts, B batch, T time, N = B * T tokens, M rows of all experts, I input channels, F expert width, D hidden

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprat.config.quant import FewTokens
from sprat.errors import CheckpointError, DataError
from sprat.model import MLP, Experts, Gate, Linear, Routing, Transformer
from sprat.model.moe import dispatch
from sprat.quant.gptq import DEFAULT, GPTQSettings, gptq_quantize, nearest_quantize
from sprat.quant.int4 import QuantizedTensor, Scheme, dequantize_tensor

MIN_ROWS_PER_CHANNEL = 1.0  # rows for each input channel that a matrix must have seen

SchemeOf = Callable[[str], Scheme]  # name in the state dict -> how it is rounded
Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


@dataclass
class SeenTokens:
    """How much of the text matrices and experts saw.

    Attributes:
        counts: tokens of each expert, by the name of its stack.
        few: names of the matrices and experts that too few tokens reached.
    """

    counts: dict[str, list[int]] = field(default_factory=dict)
    few: list[str] = field(default_factory=list)

    def facts(self, few_tokens: FewTokens) -> dict[str, object]:
        """What a user is told; empty where there are no experts and all is well."""
        counts = [count for counts in self.counts.values() for count in counts]
        if not counts and not self.few:
            return {}
        seen = {"expert_tokens": {"min": min(counts), "median": statistics.median(counts)}} if counts else {}
        return seen | {"few_tokens": {"handled": few_tokens, "count": len(self.few), "names": self.few}}


@dataclass(frozen=True)
class Calibration:
    """Codes of the matrices by name, and what matrices and experts saw."""

    codes: dict[str, QuantizedTensor]
    seen: SeenTokens


def calibrate(
    model: Transformer,
    tokens_BT: Tensor,
    scheme_of: SchemeOf,
    *,
    gptq: GPTQSettings | None = DEFAULT,
    expert_tokens: int = 0,
    few_tokens: FewTokens = "nearest",
    segments_BT: Tensor | None = None,
    on_quantized: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Codes of the matrices of ``model`` that ``tokens_BT`` passes through, each fitted to what passes.

    The weights of ``model`` become what the codes stand for. Embedding and head are left alone, and the caller rounds
    in the plain way what no text reaches.

    Args:
        model: float32, with the embedding that will be used.
        tokens_BT: long; all of it is at work at once.
        scheme_of: how each matrix is rounded.
        gptq: None rounds to the nearest, by scales that err least on the text.
        expert_tokens: that an expert must have seen; 0: one for each input channel.
        few_tokens: what becomes of one that has not, and of a matrix that fewer rows than channels reach; see
            ``QuantizeConfig``.
        segments_BT: which document each token is of, 0 for padding, as in packed rows; one a row if not given.
        on_quantized: called with the name of each matrix that is done.

    Raises:
        CheckpointError: what passes is not finite.
        DataError: too few tokens reach a matrix or an expert, and ``few_tokens`` is ``refuse``.
    """
    calibration, handles = _CalibrationHooks(scheme_of, gptq, expert_tokens, few_tokens, on_quantized), []
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module is not model.head:
            handles.append(module.register_forward_pre_hook(calibration.linear(name, module)))
        elif isinstance(module, MLP):  # it may compute gate and up in one product, past the two
            for leaf in ("gate_proj", "up_proj"):
                hook = calibration.linear(f"{name}.{leaf}", module.get_submodule(leaf))
                handles.append(module.register_forward_pre_hook(hook))
        elif isinstance(module, Experts):
            handles.append(module.register_forward_pre_hook(calibration.experts(name, module)))
        elif isinstance(module, Gate):
            handles.append(module.register_forward_hook(calibration.routed))
    try:
        run_text(model, tokens_BT, segments_BT, calibration)
    finally:
        for handle in handles:
            handle.remove()
    return Calibration(calibration.codes, calibration.seen)


class TextHooks:
    """What listens while text passes; only positions in ``valid_BT`` (None: all) count."""

    valid_BT: Tensor | None = None

    def counted(self, x: Tensor) -> Tensor:
        """The rows [N, I] of ``x`` [..., I], a row for each position, that count."""
        rows_NI = x.flatten(0, -2)
        return rows_NI if self.valid_BT is None else rows_NI[self.valid_BT.flatten()]


def run_text(model: Transformer, tokens_BT: Tensor, segments_BT: Tensor | None, hooks: TextHooks) -> None:
    """Pass text through all that is hooked, MTP modules included."""
    with torch.no_grad():
        hooks.valid_BT = None if segments_BT is None else segments_BT > 0
        hidden = model.hidden(tokens_BT, segments_BT=segments_BT)
        for depth in range(1, len(model.mtp) + 1):
            if segments_BT is not None:
                joined_BT = segments_BT[:, depth:] == segments_BT[:, :-depth]
                hooks.valid_BT = joined_BT & (segments_BT[:, depth:] > 0)
            hidden = model.mtp_hidden(hidden, tokens_BT, segments_BT=segments_BT, depth=depth)


class _CalibrationHooks(TextHooks):
    """Rounds each matrix when its input first arrives; ``codes`` by name."""

    def __init__(
        self,
        scheme_of: SchemeOf,
        gptq: GPTQSettings | None,
        expert_tokens: int,
        few_tokens: FewTokens,
        on_quantized: Callable[[str], None],
    ) -> None:
        self.codes: dict[str, QuantizedTensor] = {}
        self.seen = SeenTokens()
        self._valid_M, self._tokens_ND = torch.empty(0, dtype=torch.bool), torch.empty(0)
        self._scheme_of, self._gptq, self._on_quantized = scheme_of, gptq, on_quantized
        self._expert_tokens, self._few_tokens = expert_tokens, few_tokens
        self._last: tuple[object, Tensor] = (None, torch.empty(0))

    def linear(self, name: str, module: nn.Module) -> Hook:
        """A hook for the Linear ``name``, or for what hands its input on to it."""

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if f"{name}.weight" in self.codes:
                return
            if self._last[0] is not inputs[0]:  # q, k and v are handed the very same tensor
                self._last = (inputs[0], hessian([self.counted(inputs[0])], self._floor))
            self._note_few(name, self.counted(inputs[0]))
            self._quantize(f"{name}.weight", module.get_parameter("weight"), self._last[1])

        return hook

    @property
    def _floor(self) -> int:
        """Rows from which text counts; 0: as many as there are channels."""
        return 1 if self._few_tokens == "all" else 0

    def _note_few(self, name: str, x_NI: Tensor) -> None:
        """Note that fewer rows than channels reach the matrix ``name``."""
        rows, width = x_NI.shape
        if rows < MIN_ROWS_PER_CHANNEL * width:
            self.seen.few.append(name)
            if self._few_tokens == "refuse":
                what = f"{rows} tokens of text reach a matrix of {width} input channels"
                raise DataError(what, where=name, todo="give more text, or set few_tokens=all or few_tokens=nearest")

    def routed(self, _: nn.Module, inputs: tuple[Tensor, ...], routing: Routing) -> None:
        """A hook for a router: which rows of its experts count."""
        self._tokens_ND = self.counted(inputs[0])
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
            rows = self._expert_rows(name, rows, max(module.w_gate_EFD.shape[-2:]))
            floor = self._floor or self._expert_tokens
            hessian_EDD = hessian(rows, floor)
            self._quantize(f"{name}.w_gate_EFD", module.w_gate_EFD, hessian_EDD)
            self._quantize(f"{name}.w_up_EFD", module.w_up_EFD, hessian_EDD)
            del hessian_EDD
            experts = zip(rows, module.w_gate_EFD, module.w_up_EFD, strict=True)
            hidden = [F.silu(x_MD @ gate_FD.T) * (x_MD @ up_FD.T) for x_MD, gate_FD, up_FD in experts]
            self._quantize(f"{name}.w_down_EDF", module.w_down_EDF, hessian(hidden, floor))

        return hook

    def _expert_rows(self, name: str, rows: Sequence[Tensor], width: int) -> Sequence[Tensor]:
        """The rows that each expert is judged by, and a note of those that few tokens reached."""
        self.seen.counts[name] = [len(x_MD) for x_MD in rows]
        floor = self._expert_tokens or int(MIN_ROWS_PER_CHANNEL * width)
        few = {expert for expert, x_MD in enumerate(rows) if len(x_MD) < floor}
        self.seen.few += [f"{name}.{expert}" for expert in sorted(few)]
        if few and self._few_tokens == "refuse":
            least = min(few, key=lambda expert: len(rows[expert]))
            what = f"{len(rows[least])} tokens of text reach expert {least}, fewer than {floor}"
            raise DataError(what, where=name, todo="give more text, or set few_tokens=all or few_tokens=nearest")
        if self._few_tokens == "all":
            rows = [self._tokens_ND if expert in few else x_MD for expert, x_MD in enumerate(rows)]
        return rows

    def _quantize(self, name: str, weight: nn.Parameter, hessian_EII: Tensor) -> None:
        """Round ``weight`` ([N, I] or [E, N, I]) in place and keep its codes."""
        if not bool(torch.isfinite(hessian_EII).all()):
            fault = "what the calibration text makes of this matrix's input is not finite"
            raise CheckpointError(fault, where=name, todo="use a checkpoint that did not diverge")
        weight_ENI, scheme = weight.view(-1, *weight.shape[-2:]), self._scheme_of(name)
        if self._gptq is None:
            codes = nearest_quantize(weight_ENI, hessian_EII, scheme)
        else:
            codes = gptq_quantize(weight_ENI, hessian_EII, scheme, self._gptq)
        if weight.dim() == 2:
            minimums = None if codes.minimums is None else codes.minimums[0]
            codes = replace(codes, codes=codes.codes[0], scales=codes.scales[0], minimums=minimums)
        self.codes[name] = codes
        weight.copy_(dequantize_tensor(codes))
        self._on_quantized(name)


def hessian(rows: Sequence[Tensor], floor: int = 0) -> Tensor:
    """``X^T X`` [E, I, I] (float32) of E sets of rows [M, I]; of fewer than ``floor`` rows (0: of channels), zeros."""
    width = rows[0].shape[-1]
    hessian_EII = torch.zeros(len(rows), width, width)
    for hessian_II, x_MI in zip(hessian_EII, rows, strict=True):
        if len(x_MI) >= (floor or MIN_ROWS_PER_CHANNEL * width):
            torch.mm(x_MI.float().T, x_MI.float(), out=hessian_II)
    return hessian_EII

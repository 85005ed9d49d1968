"""Quantised stand-ins for the model's matrices, and the walk that puts them in place.

A ``Packed`` holds codes and scales as buffers; ``QuantLinear``, ``QuantEmbedding`` and ``QuantExperts`` keep the
interface of what they replace, the dense weight included (as a property that dequantises).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprat.config import QuantConfig
from sprat.errors import CheckpointError
from sprat.model import Experts, Linear, Transformer
from sprat.quant.int4 import Codes, dequantise, quantise

_EXPERT_WEIGHTS = ("w_gate_EFD", "w_up_EFD", "w_down_EDF")


class Packed(nn.Module):
    """One quantised tensor. With ``materialise`` its float32 values are kept after the first use."""

    codes: Tensor
    scales: Tensor

    def __init__(self, packed: Codes, *, materialise: bool) -> None:
        super().__init__()
        self.bits, self.group, self.width, self.materialise = packed.bits, packed.group, packed.width, materialise
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self._dense: Tensor | None = None

    def dense(self) -> Tensor:
        """The float32 tensor that the codes stand for."""
        if self._dense is not None and self._dense.device == self.codes.device:
            return self._dense
        with torch.no_grad():
            dense = dequantise(Codes(self.codes, self.scales, self.bits, self.group, self.width))
        if self.materialise:
            self._dense = dense
        return dense

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


class QuantLinear(nn.Module):
    """``y = x W^T + b`` with a quantised ``W`` [out, in]; stands where a ``Linear`` stood."""

    def __init__(self, packed: Packed, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.packed, self.bias = packed, bias
        self.in_features, self.out_features = packed.width, int(packed.codes.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out], same dtype."""
        return F.linear(x, self.dense_weight().to(x.dtype), self.bias)

    def dense_weight(self) -> Tensor:
        """The float32 matrix [out, in]."""
        return self.packed.dense()

    @property
    def weight(self) -> Tensor:
        """The same, under the name that code which only reads it expects."""
        return self.dense_weight()


class QuantEmbedding(nn.Module):
    """A quantised table [V, D], one row a token; looks up codes and dequantises those rows only."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` long [...] -> float32 [..., D]."""
        packed = self.packed
        rows = (packed.codes[tokens], packed.scales[tokens] if packed.bits < 16 else packed.scales)
        return dequantise(Codes(*rows, packed.bits, packed.group, packed.width))

    @property
    def weight(self) -> Tensor:
        """The float32 table [V, D]."""
        return self.packed.dense()


class QuantExperts(Experts):
    """Stacked experts with quantised weights; each expert's rows are grouped along their input channels."""

    def __init__(self, gate: Packed, up: Packed, down: Packed) -> None:
        nn.Module.__init__(self)  # the parameters of Experts are what we replace
        self.gate, self.up, self.down = gate, up, down

    @property
    def w_gate_EFD(self) -> Tensor:  # type: ignore[override]
        """Float32 [E, F, D]."""
        return self.gate.dense()

    @property
    def w_up_EFD(self) -> Tensor:  # type: ignore[override]
        """Float32 [E, F, D]."""
        return self.up.dense()

    @property
    def w_down_EDF(self) -> Tensor:  # type: ignore[override]
        """Float32 [E, D, F]."""
        return self.down.dense()


def quantize(model: Transformer, config: QuantConfig | None = None, *, materialise: bool = True) -> Transformer:
    """A quantised copy of ``model``; the model itself stays as it is.

    Args:
        config: bits and group of all matrices and experts, and the bits of embedding and head.
        materialise: keep dense float32 weights after the first use (fast on CPUs, but then only the file is small).

    Raises:
        CheckpointError: a weight is not finite.
    """
    config = config or QuantConfig()
    tensors = model.state_dict()

    def pack(name: str, bits: int, group: int) -> Codes:
        if not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError("a weight is not finite", where=name, todo="use a checkpoint that did not diverge")
        return quantise(tensors[name], bits=bits, group=group)

    return place(copy.deepcopy(model), config, pack, materialise=materialise)


def place(
    model: Transformer, config: QuantConfig, pack: Callable[[str, int, int], Codes], *, materialise: bool
) -> Transformer:
    """Replace every matrix of ``model`` in place.

    Args:
        pack: (name in the state dict, bits, group; 0 is a group per row) -> codes.
    """
    wide = 0 if config.head_bits == 8 else config.group
    table = Packed(pack("embed_tokens.weight", config.head_bits, wide), materialise=False)
    tied = model.config.tie_word_embeddings
    for name, module in list(model.named_modules()):
        owner = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if isinstance(module, Linear):
            bits, group = (config.head_bits, wide) if name == "head" else (config.bits, config.group)
            shared = name == "head" and tied
            codes = table if shared else Packed(pack(f"{name}.weight", bits, group), materialise=materialise)
            setattr(owner, leaf, QuantLinear(codes, module.bias))
        elif isinstance(module, Experts):
            parts = [pack(f"{name}.{weight}", config.bits, config.group) for weight in _EXPERT_WEIGHTS]
            setattr(owner, leaf, QuantExperts(*(Packed(part, materialise=materialise) for part in parts)))
    table.materialise = materialise and tied
    model.add_module("embed_tokens", QuantEmbedding(table))
    return model


def recipe_of(model: Transformer) -> QuantConfig | None:
    """How ``model`` was quantised, None if it was not."""
    table = model.embed_tokens
    if not isinstance(table, QuantEmbedding):
        return None
    modules = dict(model.named_modules())
    inner = [m.packed for name, m in modules.items() if isinstance(m, QuantLinear) and name != "head"]
    return QuantConfig.model_validate({"bits": inner[0].bits, "group": inner[0].group, "head_bits": table.packed.bits})


def size_bytes(model: nn.Module) -> int:
    """Bytes of the weights as an artefact holds them: codes, scales, and what stays dense; shared tensors once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())

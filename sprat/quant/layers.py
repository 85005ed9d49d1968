"""Quantised stand-ins for the model's matrices, and the walk that puts them in place.

A ``Packed`` holds codes and scales as buffers; ``QuantLinear``, ``QuantEmbedding`` and ``QuantExperts`` keep the
interface of what they replace, the dense weight included (as a property that dequantises).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprat.config import QuantConfig
from sprat.errors import CheckpointError, ConfigError
from sprat.model import Experts, Linear, Transformer
from sprat.quant.gptq import calibrate
from sprat.quant.int4 import Codes, dequantize_weight, quantize_weight

_EXPERT_WEIGHTS = ("w_gate_EFD", "w_up_EFD", "w_down_EDF")


class Packed(nn.Module):
    """One quantised tensor. With ``materialise`` its float32 values are kept after the first use."""

    codes: Tensor
    scales: Tensor
    minimums: Tensor | None

    def __init__(self, packed: Codes, *, materialise: bool) -> None:
        super().__init__()
        self.bits, self.group, self.width, self.materialise = packed.bits, packed.group, packed.width, materialise
        self.rounding = packed.rounding
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("minimums", packed.minimums)
        self._dense: Tensor | None = None

    def parts(self) -> Codes:
        """What is kept: codes, scales and, where there are any, minimums."""
        return Codes(self.codes, self.scales, self.bits, self.group, self.width, self.minimums, self.rounding)

    def dense(self) -> Tensor:
        """The float32 tensor that the codes stand for."""
        if self._dense is not None and self._dense.device == self.codes.device:
            return self._dense
        with torch.no_grad():
            dense = dequantize_weight(self.parts())
        if self.materialise:
            self._dense = dense
        return dense

    def release(self) -> None:
        """Give the codes up, because somebody else has them in a form of his own. Not to be used afterwards."""
        self.codes, self.scales, self.minimums = self.codes[:0], self.scales[:0], None
        self.codes, self.scales, self._dense = self.codes.clone(), self.scales.clone(), None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minimums."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.minimums is None else self.minimums.nbytes)


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
        scales = packed.scales[tokens] if packed.bits < 16 else packed.scales
        minimums = None if packed.minimums is None else packed.minimums[tokens]
        return dequantize_weight(Codes(packed.codes[tokens], scales, packed.bits, packed.group, packed.width, minimums))

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


def quantize(
    model: Transformer,
    config: QuantConfig | None = None,
    *,
    calibration_BT: Tensor | None = None,
    segments_BT: Tensor | None = None,
    materialise: bool = True,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> Transformer:
    """A quantised copy of ``model``; the model itself stays as it is.

    Args:
        config: bits and group of all matrices and experts, the bits of embedding and head, and how to round.
        calibration_BT: tokens (long) of real text that ``rounding = "gptq"`` fits the codes to; see ``gptq.calibrate``.
        segments_BT: which document each of them is of, 0 for padding; one a row if not given.
        materialise: keep dense float32 weights after the first use (fast on CPUs, but then only the file is small).
        told: hears how many matrices are done, of how many.

    Raises:
        CheckpointError: a weight, or what the text makes of it, is not finite.
        ConfigError: there is no calibration text for a rounding that needs it.
    """
    config = config or QuantConfig()
    tensors, done = model.state_dict(), set[str]()
    of = len(matrices(model))

    def settled(name: str) -> None:
        done.add(name)
        told(len(done), of)

    def pack(name: str) -> Codes:
        settled(name)
        if name in fitted:
            return fitted[name]
        if not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError("a weight is not finite", where=name, todo="use a checkpoint that did not diverge")
        bits, group = bits_of(config, name)
        return quantize_weight(tensors[name], bits=bits, group=group)

    fitted: dict[str, Codes] = {}
    if config.rounding == "gptq":
        if calibration_BT is None:
            todo = "give calibration text, or round to the nearest"
            raise ConfigError("GPTQ needs text to calibrate on", where="quant.rounding", todo=todo)
        draft = copy.deepcopy(model).float()
        draft.embed_tokens.weight.data = dequantize_weight(pack("embed_tokens.weight"))
        form = functools.partial(bits_of, config)
        fitted = calibrate(draft, calibration_BT, form, segments_BT=segments_BT, settled=settled)
    return place(copy.deepcopy(model), pack, materialise=materialise)


def matrices(model: Transformer) -> dict[str, nn.Parameter]:
    """The weights of a dense ``model`` that are quantised, by name; a tied head is left out."""
    found = {"embed_tokens.weight": model.embed_tokens.weight}
    for name, module in model.named_modules():
        leaves = ("weight",) if isinstance(module, Linear) else _EXPERT_WEIGHTS if isinstance(module, Experts) else ()
        if not (name == "head" and model.config.tie_word_embeddings):
            found |= {f"{name}.{leaf}": getattr(module, leaf) for leaf in leaves}
    return found


def bits_of(config: QuantConfig, name: str) -> tuple[int, int]:
    """(bits, group; 0 is a group per row) that ``config`` has for the matrix ``name``."""
    if name in ("embed_tokens.weight", "head.weight"):
        return config.head_bits, 0 if config.head_bits == 8 else config.group
    return config.bits, config.group


def place(model: Transformer, codes_of: Callable[[str], Codes | None], *, materialise: bool) -> Transformer:
    """Replace the matrices of ``model`` in place.

    Args:
        codes_of: name in the state dict -> codes, or None for what stays dense; experts of a layer go together. A
            tied head is asked for as the embedding.
        materialise: see ``quantize``.
    """
    tied = model.config.tie_word_embeddings
    wide = codes_of("embed_tokens.weight")
    table = None if wide is None else Packed(wide, materialise=materialise and tied)
    for name, module in list(model.named_modules()):
        owner = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if isinstance(module, Linear):
            shared = name == "head" and tied
            codes = None if shared else codes_of(f"{name}.weight")
            packed = table if shared else None if codes is None else Packed(codes, materialise=materialise)
            if packed is not None:
                setattr(owner, leaf, QuantLinear(packed, module.bias))
        elif isinstance(module, Experts):
            parts = [codes_of(f"{name}.{weight}") for weight in _EXPERT_WEIGHTS]
            found = [Packed(part, materialise=materialise) for part in parts if part is not None]
            if found:
                setattr(owner, leaf, QuantExperts(*found))
    if table is not None:
        model.add_module("embed_tokens", QuantEmbedding(table))
    return model


def dequantize(model: Transformer) -> Transformer:
    """A dense copy of ``model`` that can be trained: all its weights in float32.

    The model itself stays as it is. A tied head stays tied.
    """
    with torch.device("meta"):
        dense = Transformer(model.config, seed=None)
    wanted = set(dense.state_dict())
    state = {name: tensor.float().clone() for name, tensor in model.state_dict().items() if name in wanted}
    state |= {name: dequantize_weight(packed.parts()) for name, packed in packed_tensors(model).items()}
    if model.config.tie_word_embeddings:
        state["head.weight"] = state["embed_tokens.weight"]
    dense.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        dense.head.weight = dense.embed_tokens.weight
    return dense.train(model.training)


def packed_tensors(model: nn.Module) -> dict[str, Packed]:
    """Every quantised matrix of ``model`` under the name of the weight that it stands for; a tied head is left out."""
    inner = {"gate": "w_gate_EFD", "up": "w_up_EFD", "down": "w_down_EDF", "packed": "weight"}
    table: dict[str, Packed] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding | QuantExperts):
            for leaf, packed in module.named_children():
                if isinstance(packed, Packed):
                    table[f"{name}.{inner[leaf]}"] = packed
    if table.get("head.weight") is not None and table["head.weight"] is table.get("embed_tokens.weight"):
        del table["head.weight"]
    return table


def recipe_of(model: Transformer) -> QuantConfig | None:
    """The recipe by which all matrices of ``model`` were quantised; None if they were not, or not all by one."""
    table = packed_tensors(model)
    inner = {(p.bits, p.group) for name, p in table.items() if name not in ("embed_tokens.weight", "head.weight")}
    plain = any(isinstance(module, Linear) or type(module) is Experts for module in model.modules())
    if plain or len(inner) != 1 or "embed_tokens.weight" not in table:
        return None
    bits, group = next(iter(inner))
    if any(packed.minimums is not None for packed in table.values()) or bits > 8 or group not in (32, 64, 128):
        return None
    head_bits = table["embed_tokens.weight"].bits
    rounding = "gptq" if any(packed.rounding == "gptq" for packed in table.values()) else "nearest"
    recipe = QuantConfig.model_validate({"rounding": rounding, "bits": bits, "group": group, "head_bits": head_bits})
    uniform = all(
        (packed.bits, packed.group) == (want[0], want[1] or packed.width)
        for name, packed in table.items()
        for want in [bits_of(recipe, name)]
        if packed.bits < 16
    )
    return recipe if uniform else None


def size_bytes(model: nn.Module) -> int:
    """Bytes of the weights as an artefact holds them: codes, scales, and what stays dense; shared tensors once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())

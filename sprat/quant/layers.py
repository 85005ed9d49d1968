"""Quantized stand-ins for the model's matrices, and what puts them into a model.

A ``QuantizedWeight`` holds codes and scales as buffers; ``QuantLinear``, ``QuantEmbedding`` and ``QuantExperts`` keep
the interface of what they replace, the dense weight included (as a property that dequantizes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from sprat.config import QuantConfig
from sprat.config.quant import QuantizeConfig
from sprat.kernels import mixed_precision
from sprat.model import Embedding, Experts, Linear, Transformer
from sprat.model.layers import LinearBase, linears, matrix_names, replace_linears
from sprat.model.lora import EXPERT_PROJECTIONS
from sprat.quant.int4 import QuantizedTensor, Scheme, dequantize_tensor

_PUBLISHED = {own: f"{name}.weight" for name, own in EXPERT_PROJECTIONS.items()}


class QuantizedWeight(nn.Module):
    """One quantized tensor. With ``materialize`` its float32 values are kept after the first use."""

    codes: Tensor
    scales: Tensor
    minimums: Tensor | None

    def __init__(self, packed: QuantizedTensor, *, materialize: bool) -> None:
        super().__init__()
        self.bits, self.group, self.width, self.materialize = packed.bits, packed.group, packed.width, materialize
        self.rounding = packed.rounding
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("minimums", packed.minimums)
        self._dense: Tensor | None = None

    def to_tensor(self) -> QuantizedTensor:
        """What is kept: codes, scales and, where there are any, minimums."""
        return QuantizedTensor(self.codes, self.scales, self.bits, self.group, self.width, self.minimums, self.rounding)

    def dequantize(self) -> Tensor:
        """The float32 tensor that the codes stand for."""
        if self._dense is not None and self._dense.device == self.codes.device:
            return self._dense
        with torch.no_grad():
            dense = dequantize_tensor(self.to_tensor())
        if self.materialize:
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


class QuantLinear(LinearBase):
    """``y = x W^T + b`` with a quantized ``W`` [out, in]; stands where a ``Linear`` stood."""

    def __init__(self, packed: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.packed, self.bias = packed, bias
        self.in_features, self.out_features = packed.width, int(packed.codes.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out], same dtype."""
        return mixed_precision.linear(x, self.dense_weight().to(self.compute_dtype or x.dtype), self.bias)

    def dense_weight(self) -> Tensor:
        """The float32 matrix [out, in]."""
        return self.packed.dequantize()

    @property
    def weight(self) -> Tensor:
        """The same, under the name that code which only reads it expects."""
        return self.dense_weight()


class QuantEmbedding(LinearBase):
    """A quantized table [V, D], one row a token; looks up codes and dequantizes those rows only."""

    def __init__(self, packed: QuantizedWeight) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` long [...] -> float32 [..., D]."""
        table = self.packed.to_tensor()
        scales = table.scales[tokens] if table.bits < 16 else table.scales
        minimums = None if table.minimums is None else table.minimums[tokens]
        return dequantize_tensor(replace(table, codes=table.codes[tokens], scales=scales, minimums=minimums))

    @property
    def weight(self) -> Tensor:
        """The float32 table [V, D]."""
        return self.packed.dequantize()


class QuantExperts(Experts):
    """Stacked experts with quantized weights; each expert's rows are grouped along their input channels."""

    def __init__(self, gate: QuantizedWeight, up: QuantizedWeight, down: QuantizedWeight) -> None:
        nn.Module.__init__(self)  # the parameters of Experts are what we replace
        self.gate, self.up, self.down = gate, up, down

    @property
    def w_gate_EFD(self) -> Tensor:  # type: ignore[override]
        """Float32 [E, F, D]."""
        return self.gate.dequantize()

    @property
    def w_up_EFD(self) -> Tensor:  # type: ignore[override]
        """Float32 [E, F, D]."""
        return self.up.dequantize()

    @property
    def w_down_EDF(self) -> Tensor:  # type: ignore[override]
        """Float32 [E, D, F]."""
        return self.down.dequantize()


def quantizable_weights(model: Transformer) -> dict[str, nn.Parameter]:
    """The weights of a dense ``model`` that are quantized, by name; a tied head is left out."""
    shared = {"head.weight"} if model.config.tie_word_embeddings else set[str]()
    return {name: model.get_parameter(name) for name in matrix_names(model) if name not in shared}


def bits_and_group(config: QuantConfig, name: str) -> tuple[int, int]:
    """(bits, group; 0 is a group per row) that ``config`` has for the matrix ``name``."""
    if name in ("embed_tokens.weight", "head.weight"):
        return config.head_bits, 0 if config.head_bits == 8 else config.group
    return config.bits, config.group


def is_part_of_name(part: str, name: str) -> bool:
    """Whether ``part`` is in the name of the matrix ``name``, ours or the published one; a layer's experts share one.

    >>> is_part_of_name("down_proj", "layers.1.mlp.experts.w_down_EDF"), is_part_of_name("lm_head", "head.weight")
    (True, True)
    """
    stem, _, leaf = name.rpartition(".")
    published = "lm_head.weight" if name == "head.weight" else f"model.{stem}.{_PUBLISHED.get(leaf, leaf)}"
    return part in name or part in published


def scheme_of(config: QuantConfig, name: str) -> Scheme:
    """How ``config`` rounds the matrix ``name``; what it does not say is as in a road's recipe."""
    bits, group = bits_and_group(config, name)
    if not isinstance(config, QuantizeConfig):
        return Scheme(bits, group)
    if bits == 4 and any(is_part_of_name(part, name) for part in config.eight_bits):
        bits = 8
    return Scheme(bits, group, config.symmetric or bits != 4, config.clip, config.zero_points and bits == 4)


def replace_with_quantized(
    model: Transformer, codes_of: Callable[[str], QuantizedTensor | None], *, materialize: bool
) -> Transformer:
    """Replace the matrices of ``model`` in place.

    Args:
        codes_of: name in the state dict -> codes, or None for what stays dense; experts of a layer go together. A
            tied head is asked for as the embedding.
        materialize: keep dense float32 weights after the first use.
    """
    tied = model.config.tie_word_embeddings

    def make(name: str, linear: LinearBase) -> LinearBase | None:
        if tied and name == "head":  # the embedding has come before it
            table: nn.Module = model.embed_tokens
            return QuantLinear(table.packed, None) if isinstance(table, QuantEmbedding) else None
        keep = materialize and (tied or not isinstance(linear, Embedding))
        codes = [codes_of(f"{name}.{leaf}") for leaf in linear.weight_names]
        packed = [QuantizedWeight(each, materialize=keep) for each in codes if each is not None]
        if not packed:
            return None
        if isinstance(linear, Experts):
            return QuantExperts(*packed)
        return QuantLinear(packed[0], linear.bias) if isinstance(linear, Linear) else QuantEmbedding(packed[0])

    replace_linears(model, make)
    return model


def dequantize_model(model: Transformer) -> Transformer:
    """A dense copy of ``model`` that can be trained: all its weights in float32.

    The model itself stays as it is. A tied head stays tied.
    """
    with torch.device("meta"):
        dense = Transformer(model.config, seed=None)
    dense_names = set(dense.state_dict())
    state = {name: tensor.float().clone() for name, tensor in model.state_dict().items() if name in dense_names}
    state |= {name: dequantize_tensor(packed.to_tensor()) for name, packed in quantized_weights(model).items()}
    if model.config.tie_word_embeddings:
        state["head.weight"] = state["embed_tokens.weight"]
    dense.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        dense.head.weight = dense.embed_tokens.weight
    return dense.train(model.training)


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Every quantized matrix of ``model`` under the name of the weight that it stands for; a tied head is left out."""
    table = {
        f"{name}.{leaf}": packed
        for name, linear in linears(model)
        for leaf, packed in zip(linear.weight_names, linear.children(), strict=False)
        if isinstance(packed, QuantizedWeight)
    }
    if table.get("head.weight") is not None and table["head.weight"] is table.get("embed_tokens.weight"):
        del table["head.weight"]
    return table


def quant_config_of(model: Transformer) -> QuantConfig | None:
    """The recipe by which all matrices of ``model`` were quantized; None if they were not, or not all by one."""
    table = quantized_weights(model)
    inner = {(p.bits, p.group) for name, p in table.items() if name not in ("embed_tokens.weight", "head.weight")}
    plain = any(isinstance(module, Linear) or type(module) is Experts for module in model.modules())
    if plain or len(inner) != 1 or "embed_tokens.weight" not in table:
        return None
    bits, group = next(iter(inner))
    if any(packed.minimums is not None for packed in table.values()) or bits > 8 or group not in (32, 64, 128):
        return None
    head_bits = table["embed_tokens.weight"].bits
    rounding = "gptq" if any(packed.rounding == "gptq" for packed in table.values()) else "nearest"
    settings = {"rounding": rounding, "bits": bits, "group": group, "head_bits": head_bits}
    quant_config = QuantConfig.model_validate(settings)
    for name, packed in table.items():
        bits, group = bits_and_group(quant_config, name)
        if packed.bits < 16 and (packed.bits, packed.group) != (bits, group or packed.width):
            return None
    return quant_config


def size_bytes(model: nn.Module) -> int:
    """Bytes of the weights as an artefact holds them: codes, scales, and what stays dense; shared tensors once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())

"""A model in, its quantized copy out: rotate, scale, calibrate, round, in this order, as far as the config asks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sprat.config import QuantConfig
from sprat.config.quant import QuantizeConfig
from sprat.errors import CheckpointError, ConfigError
from sprat.model import Experts, Transformer
from sprat.quant.awq import awq_scale
from sprat.quant.calibration import SchemeOf, calibrate
from sprat.quant.gptq import GPTQSettings
from sprat.quant.int4 import (
    FLOAT16_MAX,
    FLOAT16_TINY,
    QuantizedTensor,
    Scheme,
    dequantize_tensor,
    quantize_tensor,
)
from sprat.quant.layers import is_part_of_name, quantizable_weights, replace_with_quantized, scheme_of
from sprat.quant.rotation import rotate, without_mtp


@dataclass
class QuantizeFacts:
    """What came up on the way: ``tokens`` as ``SeenTokens.facts`` tells it, ``mtp_dropped`` modules left out."""

    tokens: dict[str, Any] = field(default_factory=dict)
    mtp_dropped: int = 0


def quantize_model(
    model: Transformer,
    config: QuantConfig | None = None,
    *,
    calibration_BT: Tensor | None = None,
    segments_BT: Tensor | None = None,
    materialize: bool = True,
    in_place: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    facts: QuantizeFacts | None = None,
) -> Transformer:
    """A quantized copy of ``model``; the model itself stays as it is, unless it is to be used up (``in_place``).

    Args:
        config: bits and group of all matrices and experts, the bits of embedding and head, and how to round; a
            ``QuantizeConfig`` also says what is done before.
        calibration_BT: tokens (long) of real text that GPTQ and AWQ fit the codes to (see ``calibrate``); with the
            nearest codes it weights the error by which ``clip = "mse"`` chooses scales.
        segments_BT: which document each of them is of, 0 for padding; one a row if not given.
        materialize: keep dense float32 weights after the first use (fast on CPUs, but then only the file is small).
        in_place: use ``model`` up, so that its weights are in memory once; it is worth nothing after an error.
        on_progress, facts: called with how many matrices are done, of how many; filled with what came up.

    Raises:
        CheckpointError: a weight, or what the text makes of it, is not finite, or beyond what scales in float16 hold;
            experts are stacked otherwise than here.
        ConfigError: a rounding without the text it needs; MTP modules in a rotation's way; a name in ``eight_bits``
            that no matrix has.
        DataError: too few tokens reach a matrix or an expert, and the config refuses that.
    """
    config, facts = config or QuantConfig(), facts or QuantizeFacts()
    schemes = functools.partial(scheme_of, config)
    _check_text(config, calibration_BT)
    _check(model, schemes)
    prepared = _prepared(model, config, facts, in_place=in_place)
    owned, model = in_place or prepared is not model, prepared
    _check_names(model, config)
    total, done, fitted = len(quantizable_weights(model)), set[str](), dict[str, QuantizedTensor]()
    if isinstance(config, QuantizeConfig) and config.awq and calibration_BT is not None:
        floor: dict[str, Any] = {"expert_tokens": config.expert_tokens, "few_tokens": config.few_tokens}
        awq_scale(model, calibration_BT, schemes, segments_BT=segments_BT, **floor)

    def on_quantized(name: str) -> None:
        done.add(name)
        on_progress(len(done), total)

    def pack(name: str) -> QuantizedTensor:
        on_quantized(name)
        return fitted[name] if name in fitted else quantize_tensor(model.get_parameter(name), **schemes(name)._asdict())

    if calibration_BT is not None and _reads_text(config):
        fitted["embed_tokens.weight"] = embedding = pack("embed_tokens.weight")
        dense = model.float() if owned else copy.deepcopy(model).float()
        dense.embed_tokens.weight.data = dequantize_tensor(embedding)
        options = {} if not isinstance(config, QuantizeConfig) else _options(config)
        fit = calibrate(dense, calibration_BT, schemes, segments_BT=segments_BT, on_quantized=on_quantized, **options)
        del dense
        fitted |= fit.codes
        facts.tokens = fit.seen.facts(options.get("few_tokens", "nearest"))
    return replace_with_quantized(model if owned else _with_the_same_matrices(model), pack, materialize=materialize)


def _check_text(config: QuantConfig, calibration_BT: Tensor | None) -> None:
    """Raise ConfigError where there is no text for a rounding that needs it."""
    if calibration_BT is None and (config.rounding == "gptq" or (isinstance(config, QuantizeConfig) and config.awq)):
        name, where = ("GPTQ", "quant.rounding") if config.rounding == "gptq" else ("AWQ", "awq")
        todo = "give calibration text, or round to the nearest"
        raise ConfigError(f"{name} needs text to calibrate on", where=where, todo=todo)


def _with_the_same_matrices(model: Transformer) -> Transformer:
    """A copy of ``model`` with its very matrices, which are about to be replaced."""
    return copy.deepcopy(model, {id(weight): weight for weight in quantizable_weights(model).values()})


def _reads_text(config: QuantConfig) -> bool:
    """Whether rounding itself looks at text that is given."""
    return config.rounding == "gptq" or (isinstance(config, QuantizeConfig) and (config.awq or config.clip == "mse"))


def _options(config: QuantizeConfig) -> dict[str, Any]:
    """What ``calibrate`` is told beyond a road's recipe."""
    settings = GPTQSettings(config.activation_order, config.damping, config.precision == "float32")
    return {
        "gptq": settings if config.rounding == "gptq" else None,
        "expert_tokens": config.expert_tokens,
        "few_tokens": config.few_tokens,
    }


def _prepared(model: Transformer, config: QuantConfig, facts: QuantizeFacts, *, in_place: bool) -> Transformer:
    """The model that is rounded: itself, or a float32 copy where its weights are about to be changed."""
    if not isinstance(config, QuantizeConfig) or not (config.awq or config.drop_mtp or config.rotation != "none"):
        return model
    model = (model if in_place else copy.deepcopy(model)).float()
    if config.drop_mtp:
        facts.mtp_dropped = len(model.mtp)
        model = without_mtp(model)
    return rotate(model, config.seed) if config.rotation == "hadamard" else model


def _check_names(model: Transformer, config: QuantConfig) -> None:
    """Refuse a part of names that no matrix has.

    Raises:
        ConfigError: there is one.
    """
    names = list(quantizable_weights(model))
    for part in config.eight_bits if isinstance(config, QuantizeConfig) else ():
        if not any(is_part_of_name(part, name) for name in names):
            todo = f"say a part of a name, as of {names[-1]!r}"
            raise ConfigError(f"no matrix of the model is called {part!r}", where="eight_bits", todo=todo)


def _check(model: Transformer, schemes: SchemeOf) -> None:
    """Refuse what is not finite or not in reach, and experts stacked otherwise than [E, F, D], [E, F, D], [E, D, F].

    Raises:
        CheckpointError: see above.
    """
    shape = model.config
    for name, module in model.named_modules():
        if type(module) is not Experts:
            continue
        inner = (shape.n_routed_experts, shape.moe_intermediate_size, shape.hidden_size)
        expected = {"w_gate_EFD": inner, "w_up_EFD": inner, "w_down_EDF": (inner[0], inner[2], inner[1])}
        for leaf, sizes in expected.items():
            if (actual := tuple(getattr(module, leaf).shape)) != sizes:
                what, todo = f"experts are stacked as {list(actual)}, not as {list(sizes)}", "transpose them"
                raise CheckpointError(what, where=f"{name}.{leaf}", todo=todo)
    for name, weight in quantizable_weights(model).items():
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError("a weight is not finite", where=name, todo="use a checkpoint that did not diverge")
        least, most = _reach(schemes(name))
        if (largest := float(weight.detach().abs().max())) and not least <= largest <= most:
            what = (
                f"weights of up to {largest:.1e} are beyond what scales in float16 can hold, {least:.1e} to {most:.1e}"
            )
            raise CheckpointError(what, where=name, todo="move their size into the norm before, or train anew")


def _reach(scheme: Scheme) -> tuple[float, float]:
    """How large the largest weight of a matrix must be, and may be, for its scales and minimums to be in float16.

    The least scale that counts is twice the step between the least numbers of float16; below it a weight is off by a
    quarter, and soon all are zero.
    """
    if scheme.bits >= 16:
        return 0.0, float("inf")
    if scheme.symmetric:
        codes = 1 << (scheme.bits - 1)
        return 2 * FLOAT16_TINY * codes, FLOAT16_MAX * codes
    step = FLOAT16_TINY * 16 if scheme.zero_points else FLOAT16_TINY  # such scales have four binary digits less
    return 2 * step * 7.5, FLOAT16_MAX

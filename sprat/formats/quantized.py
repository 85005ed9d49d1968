"""Quantized models on disk: ``config.json``, ``quant.json`` and one safetensors file of codes and scales.

``model.safetensors`` holds ``<name>.codes`` and ``<name>.scales`` for each quantized tensor, under our own
state-dict names (and ``<name>.minimums`` where there are any), and the rest (norms, router, biases) as it was.
``quant.json`` of version 1 holds one recipe for the whole model; version 2, for models that came from elsewhere,
holds bits and group of each tensor, and tensors that it does not name are dense. ``config.json`` names a
``quantization_config`` that no other engine knows, so that none misreads the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sprat.config import Config, QuantConfig, Rounding
from sprat.config.base import parse
from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError
from sprat.files import atomic
from sprat.files.json import write_json
from sprat.formats.memory import check_available_memory
from sprat.formats.safetensors import Shards, read_json_object, remove_other_weights
from sprat.model import Embedding, Transformer
from sprat.model.layers import matrix_names
from sprat.model.transformer import meta_model
from sprat.quant import QuantizedTensor, quant_config_of, quantized_weights
from sprat.quant.layers import QuantizedWeight, bits_and_group, replace_with_quantized

WEIGHTS, QUANT_CONFIG, METHOD = "model.safetensors", "quant.json", "sprat-rtn"
_KIND = {4: torch.uint8, 8: torch.int8, 16: torch.bfloat16, 32: torch.float32}


class TensorFormat(Config):
    """How one matrix is kept; ``group=0`` is one group per row."""

    bits: Literal[4, 8, 16, 32]
    group: int = Field(ge=0, le=1 << 31)
    minimums: bool = False
    rounding: Rounding = "nearest"


Formats = Callable[[str], TensorFormat | None]  # name of a matrix -> how it is kept; None is dense


class _TensorFormats(Config):
    """``quant.json`` of version 2."""

    tensors: dict[str, TensorFormat]


def is_quantized(folder: str | Path) -> bool:
    """Whether ``folder`` holds a model that ``save`` wrote."""
    return (Path(folder) / QUANT_CONFIG).is_file()


def describe(folder: str | Path) -> str:
    """How the weights in ``folder`` are kept, the fewest bits first, as ``quant.json`` says: ``int4``, ``int4/int8``.

    Raises:
        CheckpointError, ConfigError: the file is missing or does not hold.
    """
    path = Path(folder) / QUANT_CONFIG
    quant_table = read_json_object(path)
    tensors = quant_table.get("tensors")
    formats = list(tensors.values()) if isinstance(tensors, dict) else [quant_table]
    bits = sorted({str(each.get("bits")) for each in formats if isinstance(each, dict)}, key=lambda text: text.zfill(3))
    return "/".join(f"int{each}" for each in bits)


def save(model: Transformer, folder: str | Path) -> None:
    """Write a quantized ``model``; each file appears whole or not at all.

    Raises:
        CheckpointError: the model is not quantized.
        MachineError: the disk is full or closed to us.
    """
    from safetensors.torch import save_file

    folder, packed, quant_config = Path(folder), quantized_weights(model), quant_config_of(model)
    if not packed:
        raise CheckpointError("the model is not quantised", where=str(folder), todo="quantise it, or save it as it is")
    if quant_config is not None:
        quant_table = {"version": 1, **quant_config.model_dump()}
    else:
        quant_table = {"version": 2, "tensors": {name: _format_of(part) for name, part in packed.items()}}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(model).items()}
    named = {} if quant_config is None else quant_config.model_dump()
    table = {**model.config.to_hf(), "quantization_config": {"quant_method": METHOD, **named}}
    with atomic.replace_file(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": METHOD})
    remove_other_weights(folder)
    write_json(folder / "config.json", table)
    write_json(folder / QUANT_CONFIG, {"method": METHOD, **quant_table})


def _format_of(packed: QuantizedWeight) -> dict[str, Any]:
    """What ``quant.json`` says of one tensor."""
    minimums = packed.minimums is not None
    return {"bits": packed.bits, "group": packed.group, "minimums": minimums, "rounding": packed.rounding}


def load(folder: str | Path, *, materialize: bool = True) -> Transformer:
    """The quantized model that ``save`` wrote; bit for bit the same codes.

    Args:
        materialize: see ``quantize_model``.

    Raises:
        CheckpointError: a file is missing or torn, or a tensor is missing, unknown or of the wrong shape.
        ConfigError: config.json or quant.json does not hold.
    """
    folder = Path(folder)
    table, quant_table = read_json_object(folder / "config.json"), read_json_object(folder / QUANT_CONFIG)
    table.pop("quantization_config", None)
    config = ModelConfig.from_hf(table, where=str(folder / "config.json"))
    formats = _formats(quant_table, str(folder / QUANT_CONFIG))
    shards = Shards([folder / WEIGHTS])
    check_available_memory(sum(entry.nbytes for entry in shards.entries.values()), folder / WEIGHTS)
    return _build(config, formats, shards, str(folder / WEIGHTS), materialize=materialize)


def _formats(quant_table: dict[str, Any], where: str) -> Formats:
    """How each matrix is kept, by its name, as ``quant.json`` (``quant_table``) says; None is dense."""
    kind = (quant_table.pop("method", None), quant_table.pop("version", None))
    if kind == (METHOD, 1):
        quant_config = parse(QuantConfig, quant_table, where=where)

        def by_quant_config(name: str) -> TensorFormat:
            bits, group = bits_and_group(quant_config, name)
            return TensorFormat(bits=bits, group=group, rounding=quant_config.rounding)

        return by_quant_config
    if kind == (METHOD, 2):
        return parse(_TensorFormats, quant_table, where=where).tensors.get
    raise CheckpointError("an unknown quantised format", where=where, todo="quantise again")


def _build(config: ModelConfig, formats: Formats, shards: Shards, where: str, *, materialize: bool) -> Transformer:
    """A model from the tensors of its file, every one of them checked and used."""
    model = meta_model(config, [entry.shape for entry in shards.entries.values()], Path(where))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unused = set(shards.entries)

    def read_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        if name not in shards.entries:
            raise CheckpointError(f"tensor {name!r} is missing", where=where, todo="quantise the model again")
        unused.discard(name)
        tensor = shards.read(name)
        if tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype):
            fault = f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected {shape}"
            raise CheckpointError(fault, where=where, todo="check that config.json and the weights belong together")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            fault = f"tensor {name!r} is not finite"
            raise CheckpointError(fault, where=where, todo="use a model that did not diverge")
        return tensor

    def pack(name: str) -> QuantizedTensor | None:
        fmt = formats(name)
        if fmt is None:
            return None
        *outer, width = shapes[name]
        size = fmt.group or width
        codes = read_tensor(f"{name}.codes", (*outer, (width + 1) // 2 if fmt.bits == 4 else width), _KIND[fmt.bits])
        grouped = (0,) if fmt.bits >= 16 else (*outer, -(-width // size))
        scales = read_tensor(f"{name}.scales", grouped, torch.float16)
        minimums = read_tensor(f"{name}.minimums", grouped, torch.float16) if fmt.minimums else None
        return QuantizedTensor(codes, scales, fmt.bits, size, width, minimums, fmt.rounding)

    # Names that stay dense are taken first: ``replace_with_quantized`` keeps a Linear's bias as it finds it.
    tied = "head.weight" if config.tie_word_embeddings else ""
    matrices = set(matrix_names(model))
    dense = [name for name in shapes if name != tied and (name not in matrices or formats(name) is None)]
    state = {name: read_tensor(name, shapes[name]) for name in sorted(dense)}
    model.load_state_dict(state, strict=False, assign=True)
    replace_with_quantized(model, pack, materialize=materialize)
    if tied and isinstance(model.embed_tokens, Embedding):
        model.head.weight = model.embed_tokens.weight
    if unused:
        fault = f"tensor {min(unused)!r} is not part of this model"
        raise CheckpointError(fault, where=where, todo="check that config.json and the weights belong together")
    return model


def _tensors(model: Transformer) -> dict[str, Tensor]:
    """Name on disk -> tensor, of a quantized model; a tied head is written once, as the embedding."""
    table: dict[str, Tensor] = {}
    for name, packed in quantized_weights(model).items():
        table |= {f"{name}.{leaf}": tensor for leaf, tensor in packed.state_dict().items()}
    inside = {id(tensor) for packed in quantized_weights(model).values() for tensor in packed.buffers()}
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in inside and not (tied and name.startswith("head.")):
            table[name] = tensor
    return table

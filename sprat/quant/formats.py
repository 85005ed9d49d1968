"""Quantised models on disk: ``config.json``, ``quant.json`` and one safetensors file of codes and scales.

``model.safetensors`` holds ``<name>.codes`` and ``<name>.scales`` for each quantised tensor, under our own
state-dict names, and the rest (norms, router, biases) as it was. ``config.json`` names a
``quantization_config`` that no other engine knows, so that none misreads the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sprat.config import QuantConfig
from sprat.config.base import parse
from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError
from sprat.model import Experts, Linear, Transformer
from sprat.quant.int4 import Codes
from sprat.quant.layers import QuantEmbedding, QuantExperts, QuantLinear, place, recipe_of
from sprat.trust import atomic

WEIGHTS, RECIPE, METHOD = "model.safetensors", "quant.json", "sprat-rtn"


def is_quantised(folder: str | Path) -> bool:
    """Whether ``folder`` holds a model that ``save`` wrote."""
    return (Path(folder) / RECIPE).is_file()


def save(model: Transformer, folder: str | Path) -> None:
    """Write a quantised ``model``; each file appears whole or not at all.

    Raises:
        CheckpointError: the model is not quantised.
        MachineError: the disk is full or closed to us.
    """
    from safetensors.torch import save_file

    folder, recipe = Path(folder), recipe_of(model)
    if recipe is None:
        raise CheckpointError("the model is not quantised", where=str(folder), todo="quantise it, or save it as it is")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(model).items()}
    table = {**model.config.to_hf(), "quantization_config": {"quant_method": METHOD, **recipe.model_dump()}}
    with atomic.replacing(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": METHOD})
    atomic.write_json(folder / "config.json", table)
    atomic.write_json(folder / RECIPE, {"method": METHOD, "version": 1, **recipe.model_dump()})


def load(folder: str | Path, *, materialise: bool = True) -> Transformer:
    """The quantised model that ``save`` wrote; bit for bit the same codes.

    Args:
        materialise: see ``quantize``.

    Raises:
        CheckpointError: a file is missing or torn, or a tensor is missing, unknown or of the wrong shape.
        ConfigError: config.json or quant.json does not hold.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    table, recipe_table = _json(folder / "config.json"), _json(folder / RECIPE)
    if (recipe_table.pop("method", None), recipe_table.pop("version", None)) != (METHOD, 1):
        raise CheckpointError("an unknown quantised format", where=str(folder / RECIPE), todo="quantise again")
    table.pop("quantization_config", None)
    recipe = parse(QuantConfig, recipe_table, where=str(folder / RECIPE))
    config = ModelConfig.from_hf(table, where=str(folder / "config.json"))
    try:
        held = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise CheckpointError("the weights are missing", where=str(folder / WEIGHTS), todo="quantise again") from None
    except (SafetensorError, OSError) as error:
        fault = f"the weights are torn: {error}"
        raise CheckpointError(fault, where=str(folder / WEIGHTS), todo="quantise or fetch again") from None
    return _build(config, recipe, held, str(folder / WEIGHTS), materialise=materialise)


def _build(
    config: ModelConfig, recipe: QuantConfig, held: dict[str, Tensor], where: str, *, materialise: bool
) -> Transformer:
    """A model from the tensors of its file, every one of them checked and used."""
    with torch.device("meta"):
        model = Transformer(config, seed=None)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def take(name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        if name not in held:
            raise CheckpointError(f"tensor {name!r} is missing", where=where, todo="quantise the model again")
        tensor = held.pop(name)
        if tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype):
            fault = f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected {shape}"
            raise CheckpointError(fault, where=where, todo="check that config.json and the weights belong together")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            fault = f"tensor {name!r} is not finite"
            raise CheckpointError(fault, where=where, todo="use a model that did not diverge")
        return tensor

    def pack(name: str, bits: int, group: int) -> Codes:
        *outer, width = shapes[name]
        size = group or width
        last = (width + 1) // 2 if bits == 4 else width
        kind = {4: torch.uint8, 8: torch.int8, 16: torch.bfloat16}[bits]
        codes = take(f"{name}.codes", (*outer, last), kind)
        wanted = (0,) if bits == 16 else (*outer, -(-width // size))
        return Codes(codes, take(f"{name}.scales", wanted, torch.float16), bits, size, width)

    # Names that stay dense are taken first: ``place`` keeps a Linear's bias as it finds it.
    dense = {name: take(name, shapes[name]) for name in sorted(_dense_names(model))}
    model.load_state_dict(dense, strict=False, assign=True)
    place(model, recipe, pack, materialise=materialise)
    if held:
        fault = f"tensor {min(held)!r} is not part of this model"
        raise CheckpointError(fault, where=where, todo="check that config.json and the weights belong together")
    return model


def _dense_names(model: Transformer) -> set[str]:
    """State-dict names that stay dense when ``model`` (not quantised yet) is quantised."""
    packed = {"embed_tokens.weight"}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            packed.add(f"{name}.weight")
        elif isinstance(module, Experts):
            packed |= {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
    return set(model.state_dict()) - packed


def _tensors(model: Transformer) -> dict[str, Tensor]:
    """Name on disk -> tensor, of a quantised model; a tied head is written once, as the embedding."""
    inner = {"gate": "w_gate_EFD", "up": "w_up_EFD", "down": "w_down_EDF", "packed": "weight"}
    table: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding | QuantExperts):
            places |= {f"{name}.{leaf}": f"{name}.{inner[leaf]}" for leaf, _ in module.named_children()}
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if tied and owner == "head.packed":
            continue
        table[f"{places[owner]}.{leaf}" if owner in places else name] = tensor
    return table


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("a file is missing", where=str(path), todo="give the folder of a model") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"not readable as JSON: {error}", where=str(path), todo="fetch it again") from None
    if not isinstance(table, dict):
        raise CheckpointError("not a JSON object", where=str(path), todo="fetch it again")
    return table

"""LoRA adapters beside one model: read from folders in PEFT's layout, held by the engine, chosen by each request.

A request names its adapter, and a step computes requests of several adapters and of none together, as Punica (arXiv
2310.18547) and S-LoRA (arXiv 2311.03285) do. The native step
adds ``s B A x`` to the products of a row that has an adapter (``kernels/src/lora.h``); in torch such rows run through a
view of the model, whose matrices are the model's own with the adapter's beside them. Rows without an adapter meet
nothing of all this and keep their bits.

Left out: DoRA. It scales whole rows of W by a norm of W and the adapter together, which is no product of low rank.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sprat.errors import ConfigError
from sprat.formats.peft import read_peft
from sprat.model import Experts, Linear, Transformer
from sprat.model.layers import LinearBase, replace_linears
from sprat.model.lora import EXPERT_PROJECTIONS, LoRAExperts, LoRALinear, LowRank, add_lora
from sprat.model.lora import adapters as low_ranks_of


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter.

    Attributes:
        name: by which requests choose it.
        low_ranks: its matrices (float32, without gradient) by what they adapt, see ``lora.target_names``.
        digest: SHA-256 (hex) of its matrices and scale: part of the keys of cached blocks.
    """

    name: str
    low_ranks: Mapping[str, LowRank]
    digest: str


def load_adapters(model: Transformer, folders: Mapping[str, str | Path]) -> tuple[Adapter, ...]:
    """The adapters in ``folders`` (by name) for ``model``, which stays as it is and may be quantized.

    Raises:
        ConfigError: a name is empty; the model has adapters in it; one is DoRA, or see ``formats.peft.load_peft``.
        CheckpointError: see ``formats.peft.load_peft``.
    """
    if folders and low_ranks_of(model):
        todo = "load the model without it, or merge it (merge_lora)"
        raise ConfigError("the model has an adapter in it already", where="adapters", todo=todo)
    return tuple(_load(model, name, folder) for name, folder in folders.items())


def _load(model: Transformer, name: str, folder: str | Path) -> Adapter:
    """See ``load_adapters``."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"an adapter cannot be called {name!r}", where="adapters", todo="give it a name")
    with torch.device("meta"):
        shape = Transformer(model.config, seed=None)
    config, state = read_peft(shape, folder)
    if config.dora:
        todo = "merge it into the model (sprat merge), and run that"
        raise ConfigError("a DoRA adapter is not run beside its base", where=str(folder), todo=todo)
    add_lora(shape, config)
    digest = hashlib.sha256(f"{config.rank} {config.alpha} {config.rslora}".encode())
    low_ranks = low_ranks_of(shape)
    for target, low_rank in low_ranks.items():
        tensors = {leaf: state[f"{target}.{leaf}"].contiguous() for leaf in ("lora_A", "lora_B")}
        for leaf, tensor in tensors.items():
            digest.update(f"{target}.{leaf} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        low_rank.load_state_dict(tensors, assign=True)
        low_rank.requires_grad_(False).to(model.norm.weight.device)
    return Adapter(name, low_ranks, digest.hexdigest())


def with_adapter(model: Transformer, adapter: Adapter) -> Transformer:
    """A view of ``model``: the same matrices, norms and tables, with those of ``adapter`` beside them."""
    leaves = [each for each in model.modules() if isinstance(each, LinearBase) or not any(each.children())]
    shared: dict[int, Any] = {id(each): each for each in (*leaves, model.rotary)}
    view = copy.deepcopy(model, shared)

    def make(name: str, linear: LinearBase) -> nn.Module | None:
        if isinstance(linear, Experts):
            names = {projection: f"{name}.{projection}" for projection in EXPERT_PROJECTIONS}
            own = {key: adapter.low_ranks[target] for key, target in names.items() if target in adapter.low_ranks}
            return LoRAExperts(linear, own) if own else None
        low_rank = adapter.low_ranks.get(name)
        return None if low_rank is None else LoRALinear(cast(Linear, linear), low_rank)

    replace_linears(view, make)
    return view

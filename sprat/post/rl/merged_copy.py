"""The policy as plain matrices: what the engine samples from where adapters are trained.

The engine computes with plain weights. So beside a model with adapters there is a copy of it without, into which base
and adapters are written, added up, after each step; nothing of it is allocated anew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sprat.model import Transformer
from sprat.model.layers import linears
from sprat.model.lora import EXPERT_PROJECTIONS, LoRAExperts, LoRALinear, adapters


def plain_copy(model: Transformer) -> Transformer:
    """A copy of ``model``, before adapters are added to it, that is never trained."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def write_merged(model: Transformer, plain: Transformer) -> None:
    """Write what each adapted matrix of ``model`` is now into ``plain``, in place."""
    for name, linear in linears(model):
        if isinstance(linear, LoRALinear):
            plain.get_submodule(name).get_parameter("weight").copy_(linear.dense_weight())
        elif isinstance(linear, LoRAExperts):
            for key, stack in EXPERT_PROJECTIONS.items():
                if (own := getattr(linear, key)) is not None:
                    plain.get_submodule(name).get_parameter(stack).copy_(own.merge(getattr(linear.base, stack)))


@contextmanager
def without_adapters(model: Transformer) -> Iterator[Transformer]:
    """``model`` as its base alone, while the context lasts; not for DoRA, whose magnitudes are no sum."""
    own = list(adapters(model).values())
    scales = [adapter.scaling for adapter in own]
    try:
        for adapter in own:
            adapter.scaling = 0.0
        yield model
    finally:
        for adapter, scale in zip(own, scales, strict=True):
            adapter.scaling = scale

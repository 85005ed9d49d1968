"""The model that RL trains, and an engine on what it computes: whole weights where they lie, adapters merged in a copy.

Trainer, workers and a replay all make it here, so that they have the same tensors under the same names, and draw the
same tokens from them.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from sprat.config.rl import RLRunConfig
from sprat.engine import Engine
from sprat.formats.load import load_dense
from sprat.model import Transformer
from sprat.model.lora import LoRAExperts, LoRALinear, adapters, add_lora, merge_lora
from sprat.tokens import Tokenizer


class Policy:
    """A model under training and the engine that samples from it.

    Args:
        model: with or without adapters.
        max_batch: answers that are sampled together at most.

    Attributes:
        model: the one that is trained.
        engine: computes with its weights as they were at the last ``take_over``.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, max_batch: int) -> None:
        self.model, self._merged = model, model
        if adapters(model):
            self._merged = copy.deepcopy(model).eval().requires_grad_(False)
            merge_lora(self._merged)
        self.engine = Engine(self._merged, tokenizer, max_batch=max_batch)

    @torch.no_grad()
    def take_over(self, model: Transformer | None = None) -> None:
        """Sample with the weights that ``model``, the one that is trained, has now."""
        if self._merged is self.model:
            return
        for name, module in self.model.named_modules():
            if isinstance(module, LoRALinear):
                self._merged.get_submodule(name).get_parameter("weight").copy_(module.dense_weight())
            elif isinstance(module, LoRAExperts):
                for leaf, weight in module.dense_weights().items():
                    self._merged.get_submodule(name).get_parameter(leaf).copy_(weight)


def load_policy(path: str | Path, config: RLRunConfig, *, dequantize: bool = False) -> tuple[Transformer, Tokenizer]:
    """The model at ``path``, in float32, as a run of ``config`` trains it: adapters beside it where it asks for them.

    Raises:
        SpratError: see ``load_dense`` and ``add_lora``.
    """
    model, tokenizer = load_dense(path, dequantize=dequantize)
    if config.lora is not None:
        add_lora(model, config.lora, config.seed)
    return model, tokenizer

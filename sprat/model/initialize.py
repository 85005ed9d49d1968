"""Initial weights: normal with ``initializer_range``, one generator, parameters in order of their names.

Matrices that write into the residual stream (``o_proj`` and all ``down`` matrices) are divided by
``sqrt(2 * layers)``, so that the stream's size does not depend on depth (GPT-2). Norm gains are one, biases
and the router's correction bias zero. Each tensor draws from its own generator, seeded by (seed, name): adding
a module does not change the others.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from sprat.config.model import ModelConfig


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill all parameters of ``model`` in place; the same seed gives the same bits on every device."""
    residual = config.initializer_range * (2 * config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0 if "norm" in name else 0.0)
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        std = residual if "o_proj" in name or "down" in name else config.initializer_range
        parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(std))

"""Quantization-aware training: a model's weights as its file will keep them, while a gradient is computed.

What rounding to four bits costs can be learned away, if the model is trained as it will be kept. Codes have no
gradient, so the gradient at the rounded weights is taken for that of the weights themselves, which stay in float32 and
go on moving by less than a code (the straight-through estimator: Bengio et al. 2013, arXiv 1308.3432; for language
models: Liu et al. 2023, arXiv 2305.17888). Activations are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sprat.config import QuantConfig
from sprat.model import Transformer
from sprat.quant.int4 import dequantize_tensor, quantize_tensor
from sprat.quant.layers import bits_and_group, quantizable_weights


@contextmanager
def fake_quantize(model: Transformer, config: QuantConfig) -> Iterator[None]:
    """While this lasts, every matrix that ``quantize`` would take holds what its nearest codes by ``config`` stand for.

    Then each has the float32 values again that it had before. The weights must not be moved meanwhile.
    """
    originals = {}
    with torch.no_grad():
        for name, weight in quantizable_weights(model).items():
            originals[weight] = weight.clone()
            bits, group = bits_and_group(config, name)
            weight.copy_(dequantize_tensor(quantize_tensor(weight, bits=bits, group=group)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in originals.items():
                weight.copy_(value)

"""How small? INT4 and INT8 round-to-nearest weights, and their files."""

from sprat.quant.formats import is_quantized, load, save
from sprat.quant.int4 import Codes, dequantize_weight, quantize_weight
from sprat.quant.layers import (
    QuantEmbedding,
    QuantExperts,
    QuantLinear,
    dequantize,
    packed_tensors,
    quantize,
    recipe_of,
    size_bytes,
)
from sprat.quant.rounded import rounded

__all__ = [
    "Codes",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "dequantize_weight",
    "dequantize",
    "is_quantized",
    "packed_tensors",
    "load",
    "quantize_weight",
    "quantize",
    "recipe_of",
    "rounded",
    "save",
    "size_bytes",
]

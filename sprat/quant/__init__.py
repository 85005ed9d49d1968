"""How small? INT4 and INT8 round-to-nearest weights, and their files."""

from sprat.quant.formats import is_quantised, load, save
from sprat.quant.int4 import Codes, dequantise, quantise
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

__all__ = [
    "Codes",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "dequantise",
    "dequantize",
    "is_quantised",
    "packed_tensors",
    "load",
    "quantise",
    "quantize",
    "recipe_of",
    "save",
    "size_bytes",
]

"""How small? INT4 and INT8 round-to-nearest weights, and their files."""

from sprat.quant.formats import is_quantized, load, save
from sprat.quant.int4 import QuantizedTensor, dequantize_tensor, quantize_tensor
from sprat.quant.layers import (
    QuantEmbedding,
    QuantExperts,
    QuantLinear,
    dequantize_model,
    quant_config_of,
    quantize_model,
    quantized_weights,
    size_bytes,
)
from sprat.quant.qat import fake_quantize

__all__ = [
    "QuantizedTensor",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "dequantize_tensor",
    "dequantize_model",
    "is_quantized",
    "quantized_weights",
    "load",
    "quantize_tensor",
    "quantize_model",
    "quant_config_of",
    "fake_quantize",
    "save",
    "size_bytes",
]

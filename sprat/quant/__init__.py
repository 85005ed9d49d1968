"""How small? INT4 and INT8 round-to-nearest weights."""

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
    "quantized_weights",
    "quantize_tensor",
    "quantize_model",
    "quant_config_of",
    "fake_quantize",
    "size_bytes",
]

"""How small? INT4 and INT8 weights: how they are rounded, what is done before, and the modules that hold them."""

from sprat.quant.int4 import QuantizedTensor, dequantize_tensor, quantize_tensor
from sprat.quant.layers import (
    QuantEmbedding,
    QuantExperts,
    QuantLinear,
    dequantize_model,
    quant_config_of,
    quantized_weights,
    size_bytes,
)
from sprat.quant.qat import fake_quantize
from sprat.quant.quantize import QuantizeFacts, quantize_model

__all__ = [
    "QuantizeFacts",
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

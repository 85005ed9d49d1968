"""Quantise a GGUF file with llama.cpp's own quantiser. Runs in the environment that has ``llama_cpp``.

Embedding and head become Q8_0 whatever the class of the rest, as the quantiser does itself where a row is no multiple
of 256: both engines then read the head at the same bits.

    python -m bench.inference.requantise SOURCE.gguf TARGET.gguf Q4_0
"""

from __future__ import annotations

import ctypes
import os
import sys

Q8_0 = 8  # ggml's number of the type


def requantise(source: str, target: str, name: str) -> int:
    """Write ``source`` as ``target`` in class ``name`` (Q4_0, Q4_1, Q4_K_M, Q8_0); 0 where that worked."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    settings.nthread = os.cpu_count() or 1
    settings.output_tensor_type = settings.token_embedding_type = Q8_0
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)))


if __name__ == "__main__":
    sys.exit(requantise(*sys.argv[1:]))

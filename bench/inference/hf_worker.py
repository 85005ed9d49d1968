"""transformers as an opponent, and as the float32 reference of the quality figures.

Its best *mode* is found by trial: eager or fused attention in float32, bfloat16, int8 matrices (torch's dynamic
quantisation), and, if asked for, `torch.compile` over a static cache. What is timed is a bare loop of forward calls and
argmax, which is faster than `generate`.

    python -m bench.inference.hf_worker CORES FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from bench.inference.protocol import Clock, bind, memory, serve

MODES = ("eager", "sdpa", "bfloat16", "int8")
COMPILED = "compiled"


class Transformers:
    """The folder's model in every mode, loaded when first asked for."""

    def __init__(self, folder: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.folder = torch, folder
        self.model = lru_cache(2)(self._model)

    def _model(self, mode: str) -> Any:
        from transformers import AutoModelForCausalLM

        torch = self.torch
        dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
        attention = "eager" if mode == "eager" else "sdpa"
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, attn_implementation=attention)
        model.eval()
        if mode == "int8":
            model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        if mode == COMPILED:
            model.forward = torch.compile(model.forward, dynamic=False)
        return model

    def _cache(self, model: Any, mode: str, length: int) -> Any:
        """An empty cache: static for compiled code, else one that grows."""
        from transformers import DynamicCache, StaticCache

        return StaticCache(config=model.config, max_cache_len=length) if mode == COMPILED else DynamicCache()

    def decode(self, mode: str, prompts: list[list[int]], steps: int, warm: int) -> dict[str, float]:
        """Greedy tokens of all ``prompts`` at once; only the ``steps`` after ``warm`` are timed."""
        torch, model = self.torch, self.model(mode)
        tokens_BT = torch.tensor(prompts)
        length = tokens_BT.shape[1]
        cache = self._cache(model, mode, 64 * (-(-(length + warm + steps) // 64)))
        step_of: Callable[..., Any] = model
        for step in range(-1, warm + steps):
            if step == warm:
                clock = Clock()
            at = torch.arange(length) if step < 0 else torch.tensor([length + step])
            out = step_of(tokens_BT, past_key_values=cache, position_ids=at[None], use_cache=True, logits_to_keep=1)
            tokens_BT = out.logits[:, -1].argmax(-1, keepdim=True)
        return clock.read(steps * len(prompts))

    def prefill(self, mode: str, prompt: list[int]) -> dict[str, float]:
        """The first token after ``prompt``."""
        model, tokens_BT = self.model(mode), self.torch.tensor([prompt])
        cache = self._cache(model, mode, len(prompt))
        clock = Clock()
        model(tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        return clock.read(len(prompt))

    def reference(self, target: str, tokens: list[int]) -> dict[str, float]:
        """Write the float32 logits of one window, [T, V], to the .npy file ``target``."""
        import numpy as np

        logits_TV = self.model("sdpa")(self.torch.tensor([tokens])).logits[0].float()
        np.save(target, logits_TV.numpy())
        return {"positions": len(tokens)}


def main() -> None:
    """Serve one folder."""
    cores = [int(core) for core in sys.argv[1].split(",")]
    bind(cores)
    worker = Transformers(sys.argv[2], len(cores))
    serve({"decode": worker.decode, "prefill": worker.prefill, "reference": worker.reference, "memory": memory})


if __name__ == "__main__":
    main()

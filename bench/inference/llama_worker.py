"""llama.cpp as an opponent, driven through its C interface, in an environment that has ``llama_cpp`` and numpy only.

What is timed is what a good C++ caller would do: one ``llama_decode`` for the new tokens of all sequences, logits only
where a token is to be chosen, and a vectorised argmax over them in place. The driver in Python costs some 20 µs a step.
A *setting* is [flash attention?, repacked weights?, one cache for all sequences?, threads]; the harness tries them and
takes the best for every figure.

    python -m bench.inference.llama_worker CORES MODEL.gguf
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any

from bench.inference.protocol import Clock, bind, memory, serve

UBATCH = 512
F32 = 0  # ggml's number of the type
FLASH = {False: 0, True: 1}  # LLAMA_FLASH_ATTN_TYPE_DISABLED, _ENABLED


class Llama:
    """The model file, with each form of its weights loaded when first asked for."""

    def __init__(self, path: str) -> None:
        import llama_cpp
        import numpy

        self.api, self.np, self.path = llama_cpp, numpy, path
        llama_cpp.llama_backend_init()
        self.model = lru_cache(2)(self._model)
        self.context = lru_cache(16)(self._context)
        self.batch = lru_cache(8)(lambda size: llama_cpp.llama_batch_init(size, 0, 1))

    def _model(self, repack: bool) -> Any:
        settings = self.api.llama_model_default_params()
        settings.use_extra_bufts, settings.n_gpu_layers = repack, 0
        model = self.api.llama_model_load_from_file(self.path.encode(), settings)
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {self.path}")
        return model

    def _context(self, setting: tuple[bool, bool, bool, int], sequences: int, length: int, exact: bool) -> Any:
        flash, repack, unified, threads = setting
        settings = self.api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = sequences * length, sequences
        settings.n_batch = settings.n_ubatch = max(UBATCH, sequences)
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type, settings.kv_unified, settings.no_perf = FLASH[flash], unified, True
        if exact:
            settings.type_k = settings.type_v = F32
        context = self.api.llama_init_from_model(self.model(repack), settings)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context for {setting}")
        return context

    def fresh(self, setting: list[Any], sequences: int, length: int, exact: bool = False) -> Any:
        """A context with empty memory for ``sequences`` of ``length`` tokens; ``exact`` stores them in float32."""
        context = self.context(tuple(setting), sequences, -(-length // 256) * 256, exact)
        self.api.llama_memory_clear(self.api.llama_get_memory(context), False)
        return context

    def run(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        """Decode rows of (token, position, sequence, whether its logits are wanted)."""
        batch = self.batch(max(UBATCH, len(rows)))
        batch.n_tokens = len(rows)
        for place, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        if self.api.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def logits(self, context: Any, rows: int) -> Any:
        """The logits of the last ``run`` as they lie in memory, float32 [rows, V]."""
        size = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.api.llama_get_model(context)))
        pointer = ctypes.cast(self.api.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        return self.np.ctypeslib.as_array(pointer, (rows, size))

    def fill(self, context: Any, prompts: list[list[int]]) -> list[int]:
        """Read all ``prompts`` (of one length) as beginnings of sequences 0, 1, …; the greedy token after each."""
        last = len(prompts[0]) - 1
        rows = [
            (token, place, sequence, place == last)
            for sequence, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        tokens: list[int] = []
        for start in range(0, len(rows), UBATCH):
            part = rows[start : start + UBATCH]
            self.run(context, part)
            wanted = sum(row[3] for row in part)
            tokens += self.logits(context, wanted).argmax(1).tolist() if wanted else []
        return tokens

    def decode(self, setting: list[Any], prompts: list[list[int]], steps: int, warm: int) -> dict[str, float]:
        """Greedy tokens of all ``prompts`` at once; only the ``steps`` after ``warm`` are timed."""
        count, length = len(prompts), len(prompts[0])
        context = self.fresh(setting, count, length + warm + steps)
        tokens = self.fill_fraction(context, prompts)
        for step in range(warm + steps):
            if step == warm:
                clock = Clock()
            self.run(context, [(token, length + step, sequence, True) for sequence, token in enumerate(tokens)])
            tokens = self.logits(context, count).argmax(1).tolist()
        return clock.read(steps * count)

    def prefill(self, setting: list[Any], prompt: list[int]) -> dict[str, float]:
        """The first token after ``prompt``."""
        context = self.fresh(setting, 1, len(prompt))
        clock = Clock()
        self.fill_fraction(context, [prompt])
        return clock.read(len(prompt))

    def divergence(self, setting: list[Any], reference: str, tokens: list[int]) -> dict[str, float]:
        """See ``bench.inference.quality.compare``; all logits of one window."""
        from bench.inference.quality import compare

        context = self.fresh(setting, 1, len(tokens))
        self.run(context, [(token, place, 0, True) for place, token in enumerate(tokens)])
        return compare(self.np.load(reference, mmap_mode="r"), self.logits(context, len(tokens)), tokens)

    def agree(self, setting: list[Any], reference: str, tokens: list[int]) -> dict[str, float]:
        """Largest and root-mean-square difference between its logits and those saved in ``reference``."""
        context = self.fresh(setting, 1, len(tokens), exact=True)
        self.run(context, [(token, place, 0, True) for place, token in enumerate(tokens)])
        gap = self.np.load(reference) - self.logits(context, len(tokens))
        return {"largest": float(abs(gap).max()), "rms": float((gap**2).mean() ** 0.5)}


def main() -> None:
    """Serve one model file."""
    bind([int(core) for core in sys.argv[1].split(",")])
    llama = Llama(sys.argv[2])
    serve(
        {
            "decode": llama.decode,
            "prefill": llama.prefill,
            "divergence": llama.divergence,
            "agree": llama.agree,
            "memory": memory,
        }
    )


if __name__ == "__main__":
    main()

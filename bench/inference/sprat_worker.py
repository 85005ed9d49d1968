"""Sprat in a process of its own: through `sprat.Engine`, as a user meets it, and its back end alone.

python -m bench.inference.sprat_worker CORES FOLDER
"""

from __future__ import annotations

import sys
import time
from functools import cached_property
from typing import Any

from bench.inference.protocol import Clock, bind, memory, serve

WARM = 8  # decode steps before the clock starts; all rows have been read by then


class Timed:
    """A back end that counts the seconds spent inside its own steps."""

    def __init__(self, backend: Any) -> None:
        self._backend, self.inside = backend, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, batch: Any) -> Any:
        """One step of the back end, timed."""
        return self._timed(self._backend.run, batch)

    def argmax(self, batch: Any, vocab: int) -> Any:
        """The same, where only the likeliest tokens are wanted."""
        return self._timed(self._backend.argmax, batch, vocab)

    def _timed(self, call: Any, *given: Any) -> Any:
        start = time.perf_counter()
        found = call(*given)
        self.inside += time.perf_counter() - start
        return found


class Sprat:
    """The engine on one folder, its figures, and its back end for figures without the engine.

    Args:
        options: ``consume`` lets the engine take the weights over, as ``sprat serve`` does (then there is no second
            back end); ``i8`` keeps memory in bytes.
    """

    def __init__(self, folder: str, threads: int, options: str = "") -> None:
        bare = memory()["now"]
        import torch

        import sprat
        from sprat import quant
        from sprat.engine.backends import select_backend

        torch.set_num_threads(threads)
        imported = memory()["now"]
        self.model, self.tokenizer = sprat.load(folder)
        self._weights = quant.size_bytes(self.model)
        self._kv_format = "i8" if "i8" in options else None
        backend = select_backend(self.model, self._kv_format, consume="consume" in options)
        self.timed = Timed(backend)
        # frozen weights let prefixes outlive a request; speculation would answer another question than llama.cpp's loop
        more: dict[str, Any] = {"backend": self.timed, "frozen": True, "speculate": "off"}
        self.engine: Any = sprat.Engine(self.model, self.tokenizer, **more)
        self._facts = {"bare": bare, "imported": imported, "backend": type(backend).__name__}

    def facts(self) -> dict[str, Any]:
        """Resident bytes of the bare interpreter and after importing torch and Sprat; the back end's name."""
        return self._facts

    def _submit(self, prompts: list[list[int]], tokens: int) -> list[int]:
        from sprat import Sampling

        return [self.engine.add(prompt, Sampling(temperature=0, max_tokens=tokens)) for prompt in prompts]

    def decode(self, prompts: list[list[int]], steps: int) -> dict[str, float]:
        """Greedy tokens of all ``prompts`` at once through the engine.

        Timed are the ``steps`` steps after ``WARM``, when all rows decode together. ``outside`` are the seconds of them
        in which no native step ran.

        Raises:
            RuntimeError: a request ended before its time.
        """
        first = self.engine.core.handles[self._submit(prompts, steps + WARM)[0]].sequence
        while len(first.output_ids) < WARM:
            self.engine.step()
        clock, inside, finished = Clock(), self.timed.inside, []
        while not finished:
            finished = self.engine.step()
        figures = clock.read(steps * len(prompts))
        figures["outside"] = figures["seconds"] - (self.timed.inside - inside)
        while self.engine.busy:
            finished += self.engine.step()
        if any(len(handle.result().token_ids) != steps + WARM for handle in finished):
            raise RuntimeError("a request ended early: its tokens cannot be counted")
        return figures

    def prefill(self, prompt: list[int]) -> dict[str, float]:
        """The first token after ``prompt``, through the engine; ``hit`` tells how many tokens were cached."""
        from sprat import Sampling

        clock = Clock()
        (output,) = self.engine.generate([prompt], Sampling(temperature=0, max_tokens=1))
        return {**clock.read(len(prompt)), "hit": output.usage.cache_hit_tokens}

    def load(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        """All ``prompts`` answered at once with ``tokens`` each, reading them included."""
        from sprat import Sampling

        clock = Clock()
        outputs = self.engine.generate(prompts, Sampling(temperature=0, max_tokens=tokens))
        return clock.read(sum(len(output.token_ids) for output in outputs))

    def raw_decode(self, prompts: list[list[int]], steps: int) -> dict[str, float]:
        """As ``decode``, with nothing around the back end but an argmax."""
        import numpy as np

        count, length = len(prompts), len(prompts[0])
        tables = self._tables(count, length + WARM + steps)
        tokens = np.concatenate([self._read(tables[row : row + 1], prompt) for row, prompt in enumerate(prompts)])
        for step in range(WARM + steps):
            if step == WARM:
                clock = Clock()
            positions = np.full(count, length + step, np.int32)
            starts, every = np.arange(count + 1, dtype=np.int32), np.arange(count, dtype=np.int32)
            tokens = self._greedy(tokens, positions, starts, tables, every)
        return clock.read(steps * count)

    def raw_prefill(self, prompt: list[int]) -> dict[str, float]:
        """As ``prefill``, with nothing around the back end."""
        tables = self._tables(1, len(prompt))
        clock = Clock()
        self._read(tables, prompt)
        return clock.read(len(prompt))

    def divergence(self, reference: str, tokens: list[int]) -> dict[str, float]:
        """See ``bench.inference.quality.compare``; all logits of one window."""
        import numpy as np

        from bench.inference.quality import compare

        return compare(np.load(reference, mmap_mode="r"), self._logits(tokens), tokens)

    def room(self) -> dict[str, float]:
        """Bytes of the weights as their file holds them, and of the cache that is reserved."""
        return {"weights": self._weights, "cache": self.timed.num_blocks * self.timed.block_bytes}

    @cached_property
    def _alone(self) -> Any:
        """A second back end, so that what is measured without the engine leaves the engine's blocks alone."""
        from sprat.engine.backends import select_backend

        return select_backend(self.model, self._kv_format)

    def _logits(self, tokens: list[int]) -> Any:
        """Logits of every position, float32 [T, V]."""
        import numpy as np

        every = np.arange(len(tokens), dtype=np.int32)
        starts = np.array([0, len(tokens)], np.int32)
        return self._run(np.array(tokens, np.int32), every, starts, self._tables(1, len(tokens)), every)

    def _tables(self, count: int, length: int) -> Any:
        """Blocks for ``count`` sequences of ``length`` tokens."""
        import numpy as np

        from sprat.engine.backend import BLOCK_SIZE

        each = -(-length // BLOCK_SIZE)
        if self._alone.num_blocks < count * each:
            self._alone.reserve(count * each)
        return np.arange(count * each, dtype=np.int32).reshape(count, each)

    def _read(self, table: Any, prompt: list[int]) -> Any:
        """The greedy token after ``prompt``, [1]."""
        import numpy as np

        every = np.arange(len(prompt), dtype=np.int32)
        return self._greedy(np.array(prompt, np.int32), every, np.array([0, len(prompt)], np.int32), table, every[-1:])

    def _greedy(self, *arrays: Any) -> Any:
        """Argmax of the wanted rows of one step, int32 [R]."""
        return self._run(*arrays).argmax(1).astype("int32")

    def _run(self, tokens: Any, positions: Any, starts: Any, tables: Any, wanted: Any) -> Any:
        """One step of the back end; float32 [R, V], valid until the next."""
        import numpy as np

        from sprat.engine.backend import Batch

        return self._alone.run(Batch(tokens, positions, starts.astype(np.int32), tables, wanted)).numpy()


def main() -> None:
    """Serve one folder."""
    cores = [int(core) for core in sys.argv[1].split(",")]
    bind(cores)
    folder, _, options = sys.argv[2].partition("::")
    sprat = Sprat(folder, len(cores), options)
    names = ["facts", "decode", "prefill", "load", "raw_decode", "raw_prefill", "divergence", "room"]
    serve({"memory": memory, **{name: getattr(sprat, name) for name in names}})


if __name__ == "__main__":
    main()

"""The engine alone, in a process of its own: what the server's throughput is held against.

    python -m bench.serving.engine_worker MODEL STREAMS TOKENS

Prints {"tokens", "seconds", "processor"} of ``STREAMS`` greedy answers of ``TOKENS`` tokens each, asked at once.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from bench.serving.prompts import prompts


def main() -> None:
    """Run it twice, and tell of the second time."""
    import torch

    from sprat.engine import Engine, Sampling
    from sprat.formats.load import load
    from sprat.tokens.chat import Message, render

    folder, streams, tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    model, tokenizer = load(folder)
    engine = Engine(model, tokenizer, frozen=True, consume=True)
    settings = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    for number in range(2):
        asked = [render(tokenizer, [Message("user", text)]) for text in prompts(streams, number)]
        wall, processor = time.perf_counter(), time.process_time()
        done = sum(len(answer.token_ids) for answer in engine.generate(asked, settings))
        spent = time.perf_counter() - wall, time.process_time() - processor
    print(json.dumps({"tokens": done, "seconds": spent[0], "processor": spent[1]}))


if __name__ == "__main__":
    main()

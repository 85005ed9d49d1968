"""How fast two models are on this machine: prefill and decode, in turn, so that both meet the same neighbours.

Measured is the back end alone, without scheduler, sampling and text. A round measures one model, then the other; the
ratio is taken within a round, so that a machine that slows down slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from sprat.engine.backend import BLOCK_SIZE, Backend, Batch
from sprat.eval.certificate import Speed
from sprat.eval.intervals import median

ROUNDS = 7  # the fewest whose lowest and highest ratio are a 95 % interval, and one
PREFILL_TOKENS = 256
DECODE_TOKENS = 24  # of each request
BATCHES = (1, 16)  # requests that decode at once


def compare_speed(
    before: Backend, after: Backend, *, vocab: int, context: int, on_progress: Callable[[], None] = lambda: None
) -> tuple[Speed, ...]:
    """Prefill of one prompt, and decoding of 1 and of 16 requests; ``on_progress`` hears of each round.

    Args:
        vocab: random ids are drawn below this.
        context: tokens that both models hold.
    """
    prefill = min(PREFILL_TOKENS, context)
    steps = max(1, min(DECODE_TOKENS, context - 1))
    kinds: dict[str, Callable[[Backend], float]] = {
        f"prefill, a prompt of {prefill} tokens": partial(_prefill, count=prefill, vocab=vocab)
    }
    for requests in BATCHES:
        name = "decode, 1 request" if requests == 1 else f"decode, {requests} requests"
        kinds[name] = partial(_decode, requests=requests, steps=steps, vocab=vocab)
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for number in range(ROUNDS + 1):
        for name, measure in kinds.items():
            pair = measure(before), measure(after)
            if number:  # the first round warms up
                rounds[name].append(pair)
        on_progress()
    return tuple(_speed(name, pairs) for name, pairs in rounds.items())


def _speed(name: str, pairs: list[tuple[float, float]]) -> Speed:
    before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Speed(name, before, after, median([second / first for first, second in pairs]))


def _prefill(backend: Backend, *, count: int, vocab: int) -> float:
    """Tokens a second of a prompt of ``count`` random tokens."""
    ids, positions_T = _random_ids(count, vocab), np.arange(count, dtype=np.int32)
    starts, last = np.array([0, count], np.int32), np.array([count - 1], np.int32)
    batch = Batch(ids, positions_T, starts, _tables(backend, 1, count), last)
    started = time.perf_counter()
    backend.run(batch)
    return count / (time.perf_counter() - started)


def _decode(backend: Backend, *, requests: int, steps: int, vocab: int) -> float:
    """Tokens a second of ``requests`` that decode ``steps`` random tokens each, after one that is not timed."""
    tables = _tables(backend, requests, steps + 1)
    starts, every = np.arange(requests + 1, dtype=np.int32), np.arange(requests, dtype=np.int32)
    ids, started = _random_ids(requests * (steps + 1), vocab), 0.0
    for step in range(steps + 1):
        if step == 1:
            started = time.perf_counter()
        tokens = ids[step * requests : (step + 1) * requests]
        backend.run(Batch(tokens, np.full(requests, step, np.int32), starts, tables, every))
    return requests * steps / (time.perf_counter() - started)


def _random_ids(count: int, vocab: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """``count`` ids, always the same."""
    return np.random.default_rng(0).integers(0, vocab, count, dtype=np.int32)


def _tables(backend: Backend, requests: int, tokens: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """Blocks for ``tokens`` tokens of each request [S, W]."""
    blocks = -(-tokens // BLOCK_SIZE)
    if backend.num_blocks < requests * blocks:
        backend.reserve(requests * blocks)
    return np.arange(requests * blocks, dtype=np.int32).reshape(requests, blocks)

"""A back end whose "model" is a hash of what it reads from its own blocks: one wrong table, another answer."""

from __future__ import annotations

import copy
import zlib
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sprat.engine.backend import BLOCK_SIZE, Batch
from sprat.errors import MachineError

NOTHING = -7


@lru_cache(maxsize=20_000)
def scores(text: bytes, vocab: int) -> NDArray[np.float32]:
    """The logits after the int32 tokens in ``text``."""
    return np.random.default_rng(zlib.crc32(text)).standard_normal(vocab).astype(np.float32) * 4


def oracle(prompt: list[int], count: int, vocab: int, top: int, end: int) -> list[int]:
    """The greedy answer, without any engine."""
    output_ids: list[int] = []
    while len(output_ids) < count and end not in output_ids:
        output_ids.append(int(scores(np.array(prompt + output_ids, np.int32).tobytes(), vocab)[:top].argmax()))
    return output_ids


class Fake:
    """Memory holds the tokens themselves, and for MTP those that its module was fed with.

    Args:
        memory: blocks that there is memory for.
        depth: 1 has an MTP module, which guesses right.
    """

    kv_format, block_bytes, batch_invariant = "f32", 8 * BLOCK_SIZE, True
    adapters = ()

    def __init__(self, vocab: int, *, max_blocks: int = 10**6, num_mtp_modules: int = 0) -> None:
        self.vocab, self.num_mtp_modules, self.num_blocks, self._max_blocks = vocab, num_mtp_modules, 0, max_blocks
        self.text = np.full((2, 0, BLOCK_SIZE), NOTHING, np.int32)
        self.batches: list[Batch] = []
        self.fails: Exception | None = None
        self.drafted = 0

    def reserve(self, blocks: int) -> None:
        if blocks > self._max_blocks:
            raise MachineError("no memory", where="fake", todo="buy some")
        grown = np.full((2, blocks, BLOCK_SIZE), NOTHING, np.int32)
        grown[:, : self.num_blocks] = self.text
        self.text, self.num_blocks = grown, blocks

    def run(self, batch: Batch) -> Tensor:
        if self.fails is not None:
            raise self.fails
        self.batches.append(copy.deepcopy(batch))
        self._honest(batch)
        rows = self._write(0, batch)
        out = [scores(self._read(0, batch, rows, index).tobytes(), self.vocab) for index in batch.logits_index_R]
        return torch.from_numpy(np.stack(out)) if out else torch.empty(0, self.vocab)

    def argmax(self, batch: Batch, vocab: int) -> NDArray[np.int64]:
        logits_RV = self.run(batch)[:, :vocab].numpy()
        tokens_R: NDArray[np.int64] = np.where(np.isfinite(logits_RV).all(1), logits_RV.argmax(1), -1)
        return tokens_R

    def logits(self, batch: Batch, index_R: NDArray[np.int32]) -> Tensor:
        rows = np.repeat(np.arange(len(batch.starts_S) - 1), np.diff(batch.starts_S))
        out = [scores(self._read(0, batch, rows, index).tobytes(), self.vocab) for index in index_R]
        return torch.from_numpy(np.stack(out))

    def hidden(self, batch: Batch, index_R: NDArray[np.int32]) -> Tensor:
        return self.logits(batch, index_R)[:, :9]

    def draft(self, batch: Batch, next_T: NDArray[np.int64], vocab: int) -> NDArray[np.int64]:
        self.drafted += 1
        self._honest(batch)
        assert (batch.positions_T == self.batches[-1].positions_T).all() and len(next_T) == len(batch.tokens_T)
        rows = self._write(1, replace(batch, tokens_T=next_T.astype(np.int32)))
        out = []
        for start, stop in zip(batch.starts_S[:-1], batch.starts_S[1:], strict=True):
            index = start
            while index + 1 < stop and next_T[index] == batch.tokens_T[index + 1]:
                index += 1
            text = self._read(1, batch, rows, index)  # at each place the token that follows it
            begin = self.text[0, batch.block_tables_SW[rows[index], 0], :1]
            out.append([scores(begin.tobytes() + text.tobytes(), self.vocab)[:vocab].argmax()])
        return np.array(out, np.int64)

    def copy(self, source: int, target: int) -> None:
        self.text[:, target] = self.text[:, source]

    def read(self, block: int) -> bytes:
        return self.text[:, block].tobytes()

    def write(self, block: int, data: bytes) -> None:
        if len(data) != self.block_bytes:
            raise ValueError("another length")
        self.text[:, block] = np.frombuffer(data, np.int32).reshape(2, BLOCK_SIZE)

    def _honest(self, batch: Batch) -> None:
        """The form of a batch is what the contract says."""
        assert [a.dtype for a in vars(batch).values() if a is not None] == [np.dtype(np.int32)] * 6
        assert batch.block_tables_SW.flags.c_contiguous and batch.block_tables_SW.max(initial=-1) < self.num_blocks
        counts = np.diff(batch.starts_S)
        assert batch.starts_S[0] == 0 and counts.min() > 0 and batch.starts_S[-1] == len(batch.tokens_T)
        assert (np.diff(batch.logits_index_R) > 0).all() and batch.logits_index_R.max(initial=0) < len(batch.tokens_T)
        inside = np.delete(np.diff(batch.positions_T), batch.starts_S[1:-1] - 1)
        assert (inside == 1).all()

    def _write(self, layer: int, batch: Batch) -> NDArray[np.int64]:
        rows = np.repeat(np.arange(len(batch.starts_S) - 1), np.diff(batch.starts_S))
        blocks = batch.block_tables_SW[rows, batch.positions_T // BLOCK_SIZE]
        assert (blocks >= 0).all()
        self.text[layer, blocks, batch.positions_T % BLOCK_SIZE] = batch.tokens_T
        return rows

    def _read(self, layer: int, batch: Batch, rows: NDArray[np.int64], index: int) -> NDArray[np.int32]:
        last = int(batch.positions_T[index])
        table = batch.block_tables_SW[rows[index], : last // BLOCK_SIZE + 1]
        return self.text[layer, table].reshape(-1)[: last + 1]

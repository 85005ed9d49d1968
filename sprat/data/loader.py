# B batch rows, T time (tokens), R rows of a packed part
"""Batches as a pure function of (seed, step, rank): to resume is to ask for the next step.

There is no iterator whose state could be lost. Part p owes q_p rows to every batch, so before step s it
has given s·q_p rows; the next ones are found by their place in that count: which pass over the part it is
(each has its own permutation) and where in the pass. A run that was killed at step 317 asks for step 318
and gets what it would have got.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sprat.data.pack import PackedDataset
from sprat.errors import DataError

IGNORE_INDEX = -100  # the target of a place that carries no loss


@dataclass(frozen=True)
class Batch:
    """One batch; ``len(batch)`` is B, and ``batch[a:b]`` its rows from a to before b.

    Attributes:
        tokens_BT: int64 inputs.
        targets_BT: int64, the next token of the same segment, or -100 where there is no loss.
        segments_BT: int64, 1, 2, … within a row, 0 where nothing lies.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def __getitem__(self, rows: slice) -> Batch:
        if not isinstance(rows, slice):
            raise TypeError(f"a batch is sliced, batch[a:b]; not batch[{rows!r}]")
        return Batch(self.tokens_BT[rows], self.targets_BT[rows], self.segments_BT[rows])

    def to(self, device: str | torch.device) -> Batch:
        """The same batch on ``device``."""
        return Batch(self.tokens_BT.to(device), self.targets_BT.to(device), self.segments_BT.to(device))


class BatchSource(Protocol):
    """Where a training loop gets its batches: ``batch`` is a pure function of the step, and of who asks."""

    digest: str

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of the batch of ``step`` (from 0) that fall to ``rank`` (from 0) of ``world`` processes.

        The rows of all ranks, one after another, are the batch of a world of one.
        """
        ...


def gather_rows(packed: PackedDataset, index: npt.NDArray[np.int64] | Sequence[int]) -> Batch:
    """The rows ``index`` of ``packed`` as a batch of T = packed.seq_len."""
    return _batch(packed.tokens[index], packed.segments[index], packed.loss_mask[index])


def _batch(tokens: npt.NDArray[np.int32], segments: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8]) -> Batch:
    """Shift rows of T+1 tokens into inputs and targets."""
    learned = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0) & (mask[:, 1:] > 0)
    targets = np.where(learned, tokens[:, 1:], IGNORE_INDEX)
    parts = (tokens[:, :-1], targets, segments[:, :-1])
    return Batch(*(torch.from_numpy(np.ascontiguousarray(part, dtype=np.int64)) for part in parts))


class MixedBatchSource:
    """Several packed parts mixed in fixed shares; implements ``BatchSource``.

    Each batch holds the same number of rows of each part (largest remainder over the weights, at least
    one row of every part that has weight), in a random order.

    Attributes:
        part_rows: rows of each part in one batch.
        digest: SHA-256 (hex) over the parts' digests, the quotas and the seed.
    """

    def __init__(self, parts: Sequence[tuple[PackedDataset, float]], rows: int, seed: int) -> None:
        """Mix ``parts`` (dataset, weight) into batches of ``rows`` rows.

        Raises:
            DataError: no part has weight, parts differ in row length, or there are more parts than rows.
        """
        self.parts = [packed for packed, weight in parts if weight > 0]
        weights = [weight for _, weight in parts if weight > 0]
        if not self.parts:
            raise DataError("no data to draw from", where="mix", todo="give at least one part a positive weight")
        lengths = sorted({packed.seq_len for packed in self.parts})
        if len(lengths) > 1:
            raise DataError(f"parts with rows of {lengths} tokens", where="mix", todo="pack all with one seq_len")
        if rows < len(self.parts):
            what = f"{len(self.parts)} parts cannot share batches of {rows} rows"
            raise DataError(what, where="mix", todo="give larger batches or fewer parts")
        self.seed = seed
        self.part_rows = rows_per_part(weights, rows)
        self._passes: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}
        identity = [[packed.digest for packed in self.parts], self.part_rows, seed]
        self.digest: str = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """See ``BatchSource``; the same for the same seed, whatever was asked before.

        Raises:
            ValueError: there is no such rank.
            DataError: there are fewer rows than processes.
        """
        if not 0 <= rank < world:
            raise ValueError(f"there is no rank {rank} in a world of {world} processes")
        order = np.random.default_rng([self.seed, 1, step]).permutation(sum(self.part_rows))
        if (rows := len(order)) < world:
            what = f"a batch of {rows} rows cannot be shared out over {world} processes"
            raise DataError(what, where="mix", todo="give larger batches or fewer processes")
        arrays_by_part = []
        for number, (packed, count) in enumerate(zip(self.parts, self.part_rows, strict=True)):
            index = self._index(number, packed.num_rows, step * count, count)
            arrays_by_part.append((packed.tokens[index], packed.segments[index], packed.loss_mask[index]))
        own = order[rows * rank // world : rows * (rank + 1) // world]
        tokens, segments, mask = (np.concatenate(arrays)[own] for arrays in zip(*arrays_by_part, strict=True))
        return _batch(tokens, segments, mask)

    def _index(self, number: int, rows: int, start: int, count: int) -> npt.NDArray[np.int64]:
        """The rows number ``start`` to before ``start + count`` of part ``number``'s endless row of passes."""
        pieces = []
        while count:
            epoch, position = divmod(start, rows)
            num_taken = min(count, rows - position)
            pieces.append(self._permutation(number, epoch, rows)[position : position + num_taken])
            start, count = start + num_taken, count - num_taken
        return np.concatenate(pieces)

    def _permutation(self, number: int, epoch: int, rows: int) -> npt.NDArray[np.int64]:
        """The order of part ``number`` in pass ``epoch``; the last one is remembered."""
        cached = self._passes.get(number)
        if cached is None or cached[0] != epoch:
            cached = (epoch, np.random.default_rng([self.seed, 0, number, epoch]).permutation(rows))
            self._passes[number] = cached
        return cached[1]


def rows_per_part(weights: Sequence[float], rows: int) -> list[int]:
    """Share ``rows`` out by ``weights``: largest remainder, but at least one each.

    >>> rows_per_part([0.7, 0.29, 0.01], 10)
    [6, 3, 1]
    """
    spare, total = rows - len(weights), sum(weights)
    exact = [max(0.0, weight / total * rows - 1) for weight in weights]
    scale = spare / sum(exact) if sum(exact) else 0.0
    shares = [share * scale for share in exact]
    result = [1 + int(share) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda part: (int(shares[part]) - shares[part], part))
    for part in by_remainder[: rows - sum(result)]:
        result[part] += 1
    return result

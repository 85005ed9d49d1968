"""Packing: many short sequences share one row, and none can see its neighbour.

A batch is a rectangle, and documents are not. Padding each to the row's length would waste most of the
compute on short problems, so several sequences lie in one row and a segment number tells them apart:
attention stays inside a segment, positions restart with it, and no target crosses it. Training then sees
exactly what it would see one sequence at a time.

Where each sequence goes is best-fit (Ding et al. 2024, "Fewer truncations improve language modeling",
arXiv 2404.10830, section 3): longest first, into the fullest row that still holds it. A row's free space
is a small integer, so the rows wait in one list per free space, and the bits of one integer say which
lists have a row: "the smallest space of at least n" is one shift and one lowest set bit.

A document longer than a row is cut. Neighbouring cuts share one token: it ends the first as a target and
opens the second as an input, so that every token but the document's first is predicted exactly once.
A row holds seq_len + 1 tokens: inputs are all but the last, targets all but the first.

Left out: cutting short documents to fill the last free tokens of a row; it saves under 1 % here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sprat.errors import DataError
from sprat.files import atomic
from sprat.files.json import write_json

Int64Array = npt.NDArray[np.int64]
MaskedSequence = tuple[Sequence[int], Sequence[int] | None]


@dataclass(frozen=True)
class PackedDataset:
    """Packed rows, R rows of T+1 tokens.

    Attributes:
        tokens: [R, T+1] int32, 0 where nothing lies.
        segments: [R, T+1] int32, 1, 2, … within a row, 0 where nothing lies.
        loss_mask: [R, T+1] uint8, 1 on tokens that are to be learned.
    """

    tokens: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]

    @property
    def num_rows(self) -> int:
        """Number of rows R."""
        return int(self.tokens.shape[0])

    @property
    def seq_len(self) -> int:
        """Inputs per row, T."""
        return int(self.tokens.shape[1]) - 1

    @cached_property
    def num_targets(self) -> int:
        """How many tokens are predicted with loss in one pass over all rows."""
        same = (self.segments[:, 1:] == self.segments[:, :-1]) & (self.segments[:, 1:] > 0)
        return int(np.count_nonzero(same & (self.loss_mask[:, 1:] > 0)))

    @property
    def fill_fraction(self) -> float:
        """Share of the places that hold a token."""
        return float(np.count_nonzero(self.segments)) / max(1, self.segments.size)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over the shape and the three arrays."""
        sha256 = hashlib.sha256(repr(self.tokens.shape).encode())
        for array, kind in ((self.tokens, "<i4"), (self.segments, "<i4"), (self.loss_mask, "|u1")):
            sha256.update(np.ascontiguousarray(array, dtype=kind).tobytes())
        return sha256.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write packed.safetensors, then dataset.json (shape, counts, digest), each at once."""
        from safetensors.numpy import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"tokens": self.tokens, "segments": self.segments, "mask": self.loss_mask}
        atomic.write_bytes(folder / "packed.safetensors", save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))
        facts = {"rows": self.num_rows, "seq_len": self.seq_len, "targets": self.num_targets, "digest": self.digest}
        write_json(folder / "dataset.json", facts)

    @classmethod
    def load(cls, folder: str | Path) -> PackedDataset:
        """Read what ``save`` wrote.

        Raises:
            DataError: a file is missing or torn, or the rows are not those that were saved.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = Path(folder)
        try:
            facts: dict[str, Any] = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
            arrays = load_file(folder / "packed.safetensors")
            packed = cls(arrays["tokens"], arrays["segments"], arrays["mask"])
        except FileNotFoundError as error:
            raise DataError("no packed dataset", where=str(error.filename or folder), todo="pack it first") from None
        except (ValueError, KeyError, SafetensorError) as error:
            raise DataError(f"the packed dataset is torn: {error}", where=str(folder), todo="pack it again") from None
        if facts.get("digest") != packed.digest:
            raise DataError("the packed rows do not match their digest", where=str(folder), todo="pack it again")
        return packed


def pack(sequences: Iterable[MaskedSequence], seq_len: int) -> PackedDataset:
    """Lay sequences into rows of ``seq_len + 1`` tokens; see the module's docstring.

    Args:
        sequences: (ids, mask) pairs; mask 1 on tokens to be learned, None for all. Pairs of fewer than
            two tokens predict nothing and are left out.
        seq_len: inputs per row, T.

    Raises:
        DataError: no sequence has two tokens, or a mask is not as long as its ids.

    >>> packed = pack([([7, 8, 9], None), ([4, 5], [0, 1])], seq_len=5)
    >>> packed.tokens.tolist(), packed.segments.tolist()
    ([[7, 8, 9, 4, 5, 0]], [[1, 1, 1, 2, 2, 0]])
    """
    if seq_len < 1:
        raise DataError(f"a row of {seq_len} tokens", where="seq_len", todo="give at least 1")
    ids, mask, starts, lengths = _cut_sequences(sequences, seq_len)
    if not len(lengths):
        raise DataError("nothing to pack", where="sequences", todo="give at least one of two or more tokens")
    width = seq_len + 1
    row, offset, order, rows = _best_fit(lengths, width)
    starts, lengths = starts[order], lengths[order]
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    source = np.repeat(starts, lengths) + within
    target = np.repeat(row * width + offset, lengths) + within
    tokens = np.zeros(rows * width, dtype=np.int32)
    segments = np.zeros(rows * width, dtype=np.int32)
    learned = np.zeros(rows * width, dtype=np.uint8)
    tokens[target], learned[target] = ids[source], mask[source]
    segments[target] = np.repeat(_segment_numbers(row), lengths)
    shape = (rows, width)
    return PackedDataset(tokens.reshape(shape), segments.reshape(shape), learned.reshape(shape))


def document_ids(lengths: Sequence[int], seq_len: int) -> Int64Array:
    """Which sequence each token of packed rows came from, [R, T+1] int64: its index in ``lengths``, -1 for none.

    Where a sequence lies depends on the lengths alone, so this can be asked long after ``pack`` made the rows of
    sequences of ``lengths`` tokens, and nobody has to keep it.

    >>> document_ids([3, 2], seq_len=5).tolist()
    [[0, 0, 0, 1, 1, -1]]
    """
    packed = pack((([number] * length, None) for number, length in enumerate(lengths)), seq_len)
    return np.where(packed.segments > 0, packed.tokens, -1).astype(np.int64)


def _cut_sequences(
    sequences: Iterable[MaskedSequence], seq_len: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], Int64Array, Int64Array]:
    """All ids and masks end to end, and where each piece of at most seq_len + 1 tokens starts and how long it is."""
    long_enough = [(ids, mask) for ids, mask in sequences if len(ids) > 1]
    if any(mask is not None and len(mask) != len(ids) for ids, mask in long_enough):
        raise DataError("a mask is not as long as its ids", where="sequences", todo="give one mask value per token")
    flat = np.fromiter(itertools.chain.from_iterable(ids for ids, _ in long_enough), dtype=np.int32)
    ones = itertools.repeat(1)
    masks = (itertools.islice(ones, len(ids)) if mask is None else mask for ids, mask in long_enough)
    learned = np.fromiter(itertools.chain.from_iterable(masks), dtype=np.uint8)
    sequence_lengths = np.array([len(ids) for ids, _ in long_enough], dtype=np.int64)
    begin = np.cumsum(sequence_lengths) - sequence_lengths
    pieces = -(-(sequence_lengths - 1) // seq_len)
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(begin, pieces) + number * seq_len
    lengths = np.minimum(seq_len + 1, np.repeat(begin + sequence_lengths, pieces) - starts)
    return flat, learned, starts, lengths


def _best_fit(lengths: Int64Array, width: int) -> tuple[Int64Array, Int64Array, Int64Array, int]:
    """Best-fit decreasing: row and offset of each piece in the order of placing, that order, and how many rows."""
    order = np.argsort(-lengths, kind="stable")
    row, offset = np.zeros(len(order), dtype=np.int64), np.zeros(len(order), dtype=np.int64)
    rows_by_space: list[list[int]] = [[] for _ in range(width + 1)]
    open_spaces, rows = 0, 0
    for index, length in enumerate(lengths[order].tolist()):
        fitting = open_spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen_row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                open_spaces &= ~(1 << space)
        else:
            space, chosen_row, rows = width, rows, rows + 1
        row[index], offset[index] = chosen_row, width - space
        space_left = space - length
        if space_left > 1:
            rows_by_space[space_left].append(chosen_row)
            open_spaces |= 1 << space_left
    return row, offset, order, rows


def _segment_numbers(row: Int64Array) -> Int64Array:
    """1, 2, … for the pieces of each row, in the order of placing."""
    order = np.argsort(row, kind="stable")
    ordered = row[order]
    first = np.searchsorted(ordered, ordered, side="left")
    numbers = np.empty(len(row), dtype=np.int64)
    numbers[order] = np.arange(len(row)) - first + 1
    return numbers

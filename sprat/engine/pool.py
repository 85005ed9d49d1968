"""The memory of all rows: one static cache that grows by doubling and is never copied to be read.

Rows 0 … count-1 are in use. A forward pass gets a *view* of a range of rows, so that a step over 300 of 512 rows
costs 300 rows. A row that leaves is overwritten by the last one: one row is copied, not the batch. Lengths
are kept on the host, where the scheduler needs them, and handed to the model with each view. When the last
row has left, a pool that had grown lets its memory go.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sprat.config.model import ModelConfig
from sprat.model import Cache

FIRST_ROWS, FIRST_TOKENS = 8, 64


class Pool:
    """Rows of cached tokens for one model.

    Attributes:
        count: rows in use.
        length: tokens stored per row, int64 [rows], on the host.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self.count = 0
        self.length = np.zeros(0, np.int64)
        self._layers: list[Tensor] = []

    @property
    def rows(self) -> int:
        """Rows that there is memory for."""
        return int(self.length.shape[0])

    @property
    def capacity(self) -> int:
        """Tokens that each row has memory for."""
        return int(self._layers[0].shape[1]) if self._layers else 0

    @property
    def nbytes(self) -> int:
        """Bytes that the pool holds, used or not."""
        return sum(layer.nbytes for layer in self._layers)

    def reserve(self, rows: int, tokens: int) -> None:
        """Have room for ``rows`` rows of ``tokens`` tokens; what is stored stays."""
        if rows <= self.rows and tokens <= self.capacity:
            return
        rows = self.rows if rows <= self.rows else max(rows, 2 * self.rows, FIRST_ROWS)
        wide = self.capacity if tokens <= self.capacity else max(tokens, 2 * self.capacity, FIRST_TOKENS)
        grown = Cache.create(self._config, rows, wide, self._dtype, self._device).layers
        used = int(self.length[: self.count].max(initial=0))
        for new, old in zip(grown, self._layers, strict=False):
            new[: self.count, :used] = old[: self.count, :used]
        length = np.zeros(rows, np.int64)
        length[: self.count] = self.length[: self.count]
        self._layers, self.length = grown, length

    def view(self, start: int, stop: int) -> Cache:
        """Rows ``start`` … ``stop - 1`` as a cache that writes through to the pool."""
        return self._range(start, stop, self.length[start:stop])

    def fresh(self, start: int, stop: int) -> Cache:
        """The same rows as an empty cache, whatever they held; ``open`` them when they are filled."""
        return self._range(start, stop, np.zeros(stop - start, np.int64))

    def _range(self, start: int, stop: int, length: NDArray[np.int64]) -> Cache:
        """Views of the rows, with a copy of their lengths on the model's device."""
        length_B = torch.from_numpy(length.copy()).to(self._device)
        return Cache([layer[start:stop] for layer in self._layers], length_B, int(length.max(initial=0)))

    def open(self, lengths: Rows[int]) -> None:
        """Count new rows, of these lengths, behind those in use."""
        self.length[self.count : self.count + len(lengths)] = lengths
        self.count += len(lengths)

    def copy(self, source: Rows[int], target: Rows[int]) -> None:
        """Copy rows ``source`` over rows ``target``, which must not overlap with them."""
        if not source:
            return
        self.length[target] = self.length[source]
        used = int(self.length[source].max(initial=0))
        from_B, to_B = (torch.tensor(list(rows), device=self._device) for rows in (source, target))
        for layer in self._layers:
            layer[to_B, :used] = layer[from_B, :used]

    def shrink(self, count: int) -> None:
        """Keep the first ``count`` rows; an empty pool that had grown gives its memory back."""
        self.count = count
        if count == 0 and (self.rows > FIRST_ROWS or self.capacity > FIRST_TOKENS):
            self.length, self._layers = np.zeros(0, np.int64), []

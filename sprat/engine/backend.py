"""What the engine asks of whatever computes: one call a step over a paged KV cache.

The engine knows sequences, blocks and tokens; a back end knows weights. Between them stands one ``Batch``: the new
tokens of every sequence of this step, laid one after the other without padding, and for each sequence the table
of blocks in which its keys and values lie. A prompt, a part of a prompt, one decoded token and a few drafted tokens to
be checked are the same thing: so many new tokens at such positions.

Invariants that every back end holds, and a test for each of them:

- Token ``i`` of sequence ``s`` at position ``p`` is written to block ``block_tables[s, p // BLOCK_SIZE]``, slot
  ``p % BLOCK_SIZE``, and sees positions ``0 … p`` of its own sequence, nothing else. Writing a position again
  overwrites it, so a refused draft needs no cleaning up.
- A row's logits depend on its own tokens alone, bit for bit: not on who else is in the batch, nor on how a prompt
  was cut into steps, nor on which blocks hold it (``batch_invariant`` tells whether that is promised).
- A row without an adapter has the bits that a back end without adapters gives it in a batch of such rows alone.
- Blocks that no table names are not touched.
"""

# S sequences, T new tokens of all of them, W blocks of the longest table, R rows whose logits are asked, V vocabulary,
# L MoE layers, K experts of a token in each

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sprat.engine.adapter import Adapter

BLOCK_SIZE = 64  # tokens of one block of the KV cache


@dataclass(frozen=True)
class Batch:
    """One step.

    Attributes:
        tokens_T: int32, the new tokens, sequence after sequence.
        positions_T: int32, their positions; consecutive within a sequence.
        starts_S: int32 [S + 1]; sequence ``s`` has tokens ``starts[s] … starts[s + 1] - 1``, one at least.
        block_tables_SW: int32, C-contiguous; block numbers, -1 where a sequence has fewer than W.
        logits_index_R: int32, ascending; the indices of tokens (of 0 … T-1) whose logits are asked. May be empty.
        adapters_S: int32, which of the back end's adapters each sequence has, -1: none; empty: none has one.
        routes_TLK: int16, C-contiguous; ``run`` and ``argmax`` write there which experts each token took in each of the
            L MoE layers (MTP's not included), in no particular order. None: nobody asks, and it costs nothing.
    """

    tokens_T: NDArray[np.int32]
    positions_T: NDArray[np.int32]
    starts_S: NDArray[np.int32]
    block_tables_SW: NDArray[np.int32]
    logits_index_R: NDArray[np.int32]
    adapters_S: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    routes_TLK: NDArray[np.int16] | None = None


class Backend(Protocol):
    """A model with its paged KV cache.

    Attributes:
        vocab: V, rows of the head.
        num_mtp_modules: how many MTP modules there are for ``draft``; 0 if there are none.
        kv_format: how keys and values are stored: ``f32``, ``f16`` or ``i8``; part of a block's cache key.
        block_bytes: bytes of one block, over all layers.
        batch_invariant: whether rows are bitwise independent of the batch.
        adapters: what a sequence of a batch may have beside the weights, by its place here.
    """

    vocab: int
    num_mtp_modules: int
    kv_format: str
    block_bytes: int
    batch_invariant: bool
    adapters: tuple[Adapter, ...]

    @property
    def num_blocks(self) -> int:
        """Blocks that there is memory for."""
        ...

    def reserve(self, num_blocks: int) -> None:
        """Have memory for ``num_blocks`` blocks; what is stored stays. Never shrinks. MachineError: no memory."""
        ...

    def run(self, batch: Batch) -> Tensor:
        """Compute the batch and store its keys; logits float32 [R, V], valid until the next call."""
        ...

    def argmax(self, batch: Batch, vocab: int) -> NDArray[np.int64]:
        """``run``, but of each wanted row only the likeliest of the first ``vocab`` tokens, int64 [R].

        Of equals the first; -1 where a row's logits are not finite.
        """
        ...

    def logits(self, batch: Batch, index_R: NDArray[np.int32]) -> Tensor:
        """More of the last ``run`` of this ``batch``, before ``draft``: the logits of other tokens, float32 [R, V].

        ``index_R`` is as ``Batch.logits_index_R``. For rows that are too many to have at once.
        """
        ...

    def hidden(self, batch: Batch, index_R: NDArray[np.int32]) -> Tensor:
        """As ``logits``, but what the head is given: the output of the last norm, float32 [R, D]."""
        ...

    def draft(self, batch: Batch, next_T: NDArray[np.int64], vocab: int) -> NDArray[np.int64]:
        """Let the MTP modules follow the last ``run`` or ``argmax`` of this ``batch``.

        Returns their drafts, int64 [S, num_mtp_modules].

        ``next_T`` is the token that came to stand behind each of the batch. A sequence holds up to its first token
        whose follower in the batch is another one (a refused draft), and what is drafted is what follows there: some
        of the first ``vocab`` tokens, -1 where a module's logits are not finite. The first module joins the hidden
        state of ``run`` with the token one place further, the second that of the first with the token two places
        further, and so on, their own drafts included. Keys go to the module's own layer of the same blocks; what it
        stores behind a refused draft means nothing and is overwritten like the draft itself.
        """
        ...

    def copy(self, source: int, target: int) -> None:
        """Copy one block over another."""
        ...

    def read(self, block: int) -> bytes:
        """The ``block_bytes`` bytes of a block."""
        ...

    def write(self, block: int, data: bytes) -> None:
        """Store what ``read`` gave; ValueError if it has another length."""
        ...

"""Who owns which block of memory: tables, references, the prefix index, and what is thrown away first.

Memory is cut into blocks of ``BLOCK`` tokens, and a running request holds a table of them (PagedAttention, Kwon et al.,
arXiv 2309.06180). A block is always in exactly one of three states:

- *free*: it means nothing;
- *held*: so many tables name it, its count of references;
- *idle*: no table names it, but its content is known by a key and may be asked for again.

A full block gets its key when it has been computed (``publish``; see ``prefix``) and keeps it until it is needed for
something else: the block that has been idle longest goes first, and of one request's chain the end goes before the
beginning, since a chain without its beginning is worth nothing. The last block of a request that leaves, though not
full, is kept like the others. Behind the last whole block that two prompts share, the one that goes on in the same way
farthest is copied (``borrow``): a conversation that is continued computes only what is new. A back end's memory grows
by doubling up to the budget, so an engine that could hold much does not take it before it needs it.

Pure book-keeping in Python's own lists; the memory itself belongs to the back end. Tables are rows of one numpy
array, a row for each slot, so that a step's tables are cut out of it and not put together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Rows

import numpy as np
from numpy.typing import NDArray

from sprat.engine.backend import BLOCK, Backend
from sprat.engine.disk import Disk
from sprat.errors import MachineError

FIRST_BLOCKS = 16
FOLLOWING = 8  # blocks behind one block that may be copied in part; the latest


def blocks_for(tokens: int) -> int:
    """Blocks that hold ``tokens`` tokens."""
    return -(-tokens // BLOCK)


class Blocks:
    """The ledger of one back end's memory.

    Args:
        budget: blocks at most.
        slots: requests that run together at most.
        width: blocks of the longest table.
        disk: where evicted blocks go; None forgets them.

    Attributes:
        tables: int32 [slots, width], -1 where there is no block.
        held: int32 [slots], how many blocks each table has.
        version: counts changes of any table.
    """

    def __init__(self, backend: Backend, budget: int, slots: int, width: int, disk: Disk | None = None) -> None:
        self.backend, self.budget, self.disk = backend, max(budget, backend.blocks), disk
        self.tables = np.full((slots, width), -1, np.int32)
        self.held = np.zeros(slots, np.int32)
        self.version = 0
        self._free = list(range(backend.blocks - 1, -1, -1))
        self._references = [0] * backend.blocks
        self._index: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._next: dict[bytes, dict[int, NDArray[np.int32]]] = {}  # by the key before them: blocks and their tokens
        self._before: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be had now: free ones, idle ones, and those that are not made yet."""
        return len(self._free) + len(self._idle) + self.budget - len(self._references)

    @property
    def used(self) -> int:
        """Blocks that tables name."""
        return len(self._references) - len(self._free) - len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that are idle: known by their key, and held by nobody."""
        return len(self._idle)

    def fits(self, tokens: int) -> bool:
        """Whether one request of ``tokens`` tokens can run when it is alone."""
        return blocks_for(tokens) <= self.budget

    def room(self, keys: Rows[bytes], tokens: int) -> bool:
        """Whether a new table of ``tokens`` tokens, of which ``keys`` name the first blocks, can be had now."""
        lacking, spare = blocks_for(tokens), self.available
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            lacking -= 1
            spare -= block in self._idle
        return lacking <= spare

    def adopt(self, slot: int, keys: Rows[bytes]) -> int:
        """Begin the empty table of ``slot`` with as many of ``keys`` as are in memory or on disk; how many."""
        self.version += 1
        for place, key in enumerate(keys):
            block = self._index.get(key)
            if block is None:
                block = self._restore(key)
            if block is None:
                return place
            self._hold(block)
            self.tables[slot, place] = block
            self.held[slot] = place + 1
        return len(keys)

    def extend(self, slot: int, tokens: int) -> bool:
        """Have places for ``tokens`` tokens in the table of ``slot``; False, and nothing done, if there is no room."""
        held, wanted = int(self.held[slot]), blocks_for(tokens)
        if wanted - held > self.available:
            return False
        self.version += wanted > held
        for place in range(held, wanted):
            block = self._take()
            if block is None:
                return False
            self._references[block] = 1
            self.tables[slot, place] = block
            self.held[slot] = place + 1
        return True

    def fork(self, source: int, target: int, tokens: int) -> None:
        """Let ``target``, which holds one block, continue from the first ``tokens`` tokens of ``source``.

        Full blocks are shared; what is begun is copied into the block of ``target``, where its next token goes.
        """
        self.version += 1
        whole, tail = divmod(tokens, BLOCK)
        own = int(self.tables[target, 0])
        for block in self.tables[source, :whole].tolist():
            self._hold(block)
        self.tables[target, :whole] = self.tables[source, :whole]
        self.tables[target, whole] = own
        self.held[target] = whole + 1
        if tail:
            self.backend.copy(int(self.tables[source, whole]), own)

    def release(self, slot: int) -> None:
        """Give the table of ``slot`` back; what has a key stays until its place is needed."""
        self.version += 1
        held = int(self.held[slot])
        for block in self.tables[slot, :held].tolist()[::-1]:
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        self.tables[slot, :held] = -1
        self.held[slot] = 0

    def publish(self, slot: int, place: int, key: bytes, before: bytes, tokens: NDArray[np.int32]) -> None:
        """The block at ``place`` of the table of ``slot`` is computed, and nothing more is written to it.

        ``key`` finds it from now on, and so does ``before``, the key of the block before it, with its tokens.
        """
        block = int(self.tables[slot, place])
        if key not in self._index and block not in self._keys:
            self._index[key] = block
            self._keys[block] = key
            following = self._next.setdefault(before, {})
            if len(following) == FOLLOWING:
                oldest = next(iter(following))
                del self._before[oldest], following[oldest]
            following[block], self._before[block] = tokens, before

    def borrow(self, slot: int, place: int, before: bytes, tokens: NDArray[np.int32]) -> int:
        """Copy into the block at ``place`` the one that begins as ``tokens`` do; how many of them it saves."""
        best, most = -1, 0
        for block, held in self._next.get(before, {}).items():
            length = min(len(held), len(tokens))
            differs = np.flatnonzero(held[:length] != tokens[:length])
            same = int(differs[0]) if len(differs) else length
            if same > most:
                best, most = block, same
        if most:
            self.backend.copy(best, int(self.tables[slot, place]))
        return most

    def forget(self) -> None:
        """Drop every key: what they name is no longer what the model would compute."""
        self._free.extend(self._idle)
        self._idle.clear()
        for table in (self._index, self._keys, self._next, self._before):
            table.clear()

    def spill(self) -> None:
        """Write what is known to the disk tier, if there is one, and wait for it; latest use first."""
        if self.disk is not None:
            for block in [*reversed(self._idle), *(b for b in self._keys if b not in self._idle)]:
                self._save(block, wait=True)
            self.disk.flush()

    def check(self) -> list[str]:
        """Faults of the ledger; none if every block is in exactly one state and every count is right."""
        named: dict[int, int] = {}
        faults = []
        for slot, held in enumerate(self.held.tolist()):
            row = self.tables[slot].tolist()
            if min(row[:held], default=0) < 0 or max(row[held:], default=-1) >= 0:
                faults.append(f"the table of slot {slot} does not have the {held} blocks that it should")
            for block in row[:held]:
                named[block] = named.get(block, 0) + 1
        counted = {block: count for block, count in enumerate(self._references) if count}
        if counted != named:
            faults.append(f"references {counted} are not those of the tables, {named}")
        states = [*self._free, *self._idle, *counted]
        if sorted(states) != list(range(self.backend.blocks)):
            faults.append(f"of {self.backend.blocks} blocks these have a state: {sorted(states)}")
        if {block: key for key, block in self._index.items()} != self._keys or not set(self._idle) <= set(self._keys):
            faults.append("the prefix index and the keys of the blocks differ")
        following = {block: before for before, blocks in self._next.items() for block in blocks}
        if following != self._before or not set(following) <= set(self._keys):
            faults.append("the chains of blocks and the keys of the blocks differ")
        return faults

    def _hold(self, block: int) -> None:
        """One more table names ``block``."""
        if self._references[block] == 0:
            del self._idle[block]
        self._references[block] += 1

    def _take(self) -> int | None:
        """A block that means nothing: a free one, a new one, or the one that was idle longest; None if all are held."""
        if not self._free:
            self._grow()
        if self._free:
            return self._free.pop()
        if not self._idle:
            return None
        block, _ = self._idle.popitem(last=False)
        self._save(block, wait=False)
        del self._index[self._keys.pop(block)]
        before = self._before.pop(block, None)
        if before is not None:
            del self._next[before][block]
            if not self._next[before]:
                del self._next[before]
        return block

    def _grow(self) -> None:
        """Double the back end's memory as far as the budget goes; where there is none to be had, that is the budget."""
        made = len(self._references)
        wanted = min(self.budget, max(FIRST_BLOCKS, 2 * made))
        if wanted <= made:
            return
        try:
            self.backend.reserve(wanted)
        except MachineError:
            self.budget = made
            return
        made, before = self.backend.blocks, made
        self.budget = max(self.budget, made)
        self._references.extend([0] * (made - before))
        self._free.extend(range(made - 1, before - 1, -1))

    def _restore(self, key: bytes) -> int | None:
        """The block of ``key``, read from disk; None if it is not there, or torn, or there is no room."""
        data = self.disk.read(key) if self.disk is not None and self.available else None
        block = self._take() if data is not None else None
        if data is None or block is None:
            return None
        try:
            self.backend.write(block, data)
        except ValueError:
            self._free.append(block)
            return None
        self._index[key], self._keys[block] = block, key
        self._idle[block] = None
        return block

    def _save(self, block: int, *, wait: bool) -> None:
        """Hand the content of ``block`` to the disk tier, unless it has it."""
        key, before = self._keys[block], self._before.get(block)
        whole = before is None or len(self._next[before][block]) == BLOCK
        if self.disk is not None and whole and self.disk.wants(key):
            self.disk.write(key, self.backend.read(block), wait=wait)

# size: one noun: the blocks, how many there may be and who has which
"""Who owns which block of the KV cache: block tables, references, the prefix index, and what is evicted first.

The KV cache is cut into blocks of ``BLOCK_SIZE`` tokens, and a running request holds a table of them
(PagedAttention, Kwon et al., arXiv 2309.06180). A block is always in exactly one of three states:

- *free*: it means nothing;
- *in use*: so many tables name it, its count of references;
- *cached*: no table names it, but its content is known by a key and may be asked for again.

A full block gets its key when it has been computed (``register``; see ``prefix``) and keeps it until it is needed for
something else: the block that has been unused longest goes first, and of one request's chain the end goes before the
beginning, since a chain without its beginning is worth nothing. The last block of a request that leaves, though not
full, is kept like the others. Behind the last full block that two prompts share, the one that goes on in the same way
farthest is copied (``copy_prefix``): a conversation that is continued computes only what is new. A back end's KV cache
grows by doubling up to the budget, so an engine that could hold much does not take it before it needs it.

Pure book-keeping in Python's own lists; keys and values themselves belong to the back end. Tables are rows of one numpy
array, a row for each slot, so that a step's tables are cut out of it and not put together.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sprat.engine.backend import BLOCK_SIZE, Backend
from sprat.engine.cache.disk import DiskCache
from sprat.engine.sequence import EngineLimits
from sprat.errors import EngineError, MachineError
from sprat.machine import available_bytes

FIRST_BLOCKS = 16
FREE_SHARE = 0.5  # of the memory that is free
CONTEXTS = 2  # as many full contexts as can run together, for them and as much again for what may be asked for later
MAX_CHILDREN = 8  # blocks behind one block that may be copied in part; the latest


def blocks_for(tokens: int) -> int:
    """Blocks that hold ``tokens`` tokens."""
    return -(-tokens // BLOCK_SIZE)


class Blocks:
    """The ledger of one back end's KV cache.

    Args:
        disk: where evicted blocks go; None forgets them.

    Attributes:
        max_blocks: blocks at most.
        tables: int32 [max_batch, blocks of the longest table], -1 where there is no block.
        blocks_per_slot: int32 [max_batch], how many blocks each table has.
        version: counts changes of any table.
    """

    def __init__(self, backend: Backend, limits: EngineLimits, disk: DiskCache | None) -> None:
        self.backend, self.max_blocks, self.disk = backend, max(limits.num_blocks, backend.num_blocks), disk
        self.tables = np.full((limits.max_batch, blocks_for(limits.context) + 1), -1, np.int32)
        self.blocks_per_slot = np.zeros(limits.max_batch, np.int32)
        self.version = 0
        self._free = list(range(backend.num_blocks - 1, -1, -1))
        self._references = [0] * backend.num_blocks
        self._index: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._children: dict[bytes, dict[int, NDArray[np.int32]]] = {}  # by parent: blocks, their tokens
        self._parents: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be had now: free ones, cached ones, and those that are not made yet."""
        return len(self._free) + len(self._cached) + self.max_blocks - len(self._references)

    @property
    def used(self) -> int:
        """Blocks that tables name."""
        return len(self._references) - len(self._free) - len(self._cached)

    @property
    def cached(self) -> int:
        """Blocks that are known by their key, and used by nobody."""
        return len(self._cached)

    def fits(self, tokens: int) -> bool:
        """Whether one request of ``tokens`` tokens can run when it is alone."""
        return blocks_for(tokens) <= self.max_blocks

    def can_allocate(self, keys: Sequence[bytes], tokens: int) -> bool:
        """Whether a new table of ``tokens`` tokens, of which ``keys`` name the first blocks, can be had now."""
        missing, available = blocks_for(tokens), self.available
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            missing -= 1
            available -= block in self._cached
        return missing <= available

    def share_prefix(self, slot: int, keys: Sequence[bytes]) -> int:
        """Begin the empty table of ``slot`` with as many of ``keys`` as are cached or on disk; how many."""
        self.version += 1
        for index, key in enumerate(keys):
            block = self._index.get(key)
            if block is None:
                block = self._load_from_disk(key)
            if block is None:
                return index
            self._add_reference(block)
            self.tables[slot, index] = block
            self.blocks_per_slot[slot] = index + 1
        return len(keys)

    def allocate(self, slot: int, tokens: int) -> bool:
        """Have blocks for ``tokens`` tokens in the table of ``slot``; False, and nothing done, if there are too few."""
        count, needed = int(self.blocks_per_slot[slot]), blocks_for(tokens)
        if needed - count > self.available:
            return False
        self.version += needed > count
        for index in range(count, needed):
            block = self._pop_block()
            if block is None:
                return False
            self._references[block] = 1
            self.tables[slot, index] = block
            self.blocks_per_slot[slot] = index + 1
        return True

    def fork(self, source: int, target: int, tokens: int) -> None:
        """Let ``target``, which has one block, continue from the first ``tokens`` tokens of ``source``.

        Full blocks are shared; what is begun is copied into the block of ``target``, where its next token goes.
        """
        self.version += 1
        full, tail = divmod(tokens, BLOCK_SIZE)
        own = int(self.tables[target, 0])
        for block in self.tables[source, :full].tolist():
            self._add_reference(block)
        self.tables[target, :full] = self.tables[source, :full]
        self.tables[target, full] = own
        self.blocks_per_slot[target] = full + 1
        if tail:
            self.backend.copy(int(self.tables[source, full]), own)

    def free(self, slot: int) -> None:
        """Give the table of ``slot`` back; what has a key stays until its block is needed."""
        self.version += 1
        count = int(self.blocks_per_slot[slot])
        for block in self.tables[slot, :count].tolist()[::-1]:
            self._references[block] -= 1
            if self._references[block] == 0 and block in self._keys:
                self._cached[block] = None
            elif self._references[block] == 0:
                self._free.append(block)
        self.tables[slot, :count] = -1
        self.blocks_per_slot[slot] = 0

    def register(self, slot: int, index: int, key: bytes, parent: bytes, tokens: NDArray[np.int32]) -> None:
        """The block at ``index`` of the table of ``slot`` is computed, and nothing more is written to it.

        ``key`` finds it from now on, and so does ``parent``, the key of the block before it, with its tokens.
        """
        block = int(self.tables[slot, index])
        if key not in self._index and block not in self._keys:
            self._index[key] = block
            self._keys[block] = key
            children = self._children.setdefault(parent, {})
            if len(children) == MAX_CHILDREN:
                oldest = next(iter(children))
                del self._parents[oldest], children[oldest]
            children[block], self._parents[block] = tokens, parent

    def copy_prefix(self, slot: int, index: int, parent: bytes, tokens: NDArray[np.int32]) -> int:
        """Copy into the block at ``index`` the one that begins as ``tokens`` do; how many of them it saves."""
        best, most = -1, 0
        for block, child in self._children.get(parent, {}).items():
            length = min(len(child), len(tokens))
            differs = np.flatnonzero(child[:length] != tokens[:length])
            same = int(differs[0]) if len(differs) else length
            if same > most:
                best, most = block, same
        if most:
            self.backend.copy(best, int(self.tables[slot, index]))
        return most

    def clear_prefix_index(self) -> None:
        """Drop every key: what they name is no longer what the model would compute."""
        self._free.extend(self._cached)
        self._cached.clear()
        for table in (self._index, self._keys, self._children, self._parents):
            table.clear()

    def flush(self) -> None:
        """Write what is known to the disk tier, if there is one, and wait for it; latest use first."""
        if self.disk is not None:
            for block in [*reversed(self._cached), *(b for b in self._keys if b not in self._cached)]:
                self._save_to_disk(block, wait=True)
            self.disk.flush()

    def check(self) -> list[str]:
        """Faults of the ledger; none if every block is in exactly one state and every count is right."""
        in_tables: dict[int, int] = {}
        faults = []
        for slot, count in enumerate(self.blocks_per_slot.tolist()):
            row = self.tables[slot].tolist()
            if min(row[:count], default=0) < 0 or max(row[count:], default=-1) >= 0:
                faults.append(f"the table of slot {slot} does not have the {count} blocks that it should")
            for block in row[:count]:
                in_tables[block] = in_tables.get(block, 0) + 1
        counted = {block: count for block, count in enumerate(self._references) if count}
        if counted != in_tables:
            faults.append(f"references {counted} are not those of the tables, {in_tables}")
        states = [*self._free, *self._cached, *counted]
        if sorted(states) != list(range(self.backend.num_blocks)):
            faults.append(f"of {self.backend.num_blocks} blocks these have a state: {sorted(states)}")
        if {block: key for key, block in self._index.items()} != self._keys or not set(self._cached) <= set(self._keys):
            faults.append("the prefix index and the keys of the blocks differ")
        children = {block: parent for parent, blocks in self._children.items() for block in blocks}
        if children != self._parents or not set(children) <= set(self._keys):
            faults.append("the chains of blocks and the keys of the blocks differ")
        return faults

    def _add_reference(self, block: int) -> None:
        """One more table names ``block``."""
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def _pop_block(self) -> int | None:
        """A block that means nothing: a free one, a new one, or the longest unused one; None if all are in use."""
        if not self._free:
            self._grow()
        if self._free:
            return self._free.pop()
        if not self._cached:
            return None
        block, _ = self._cached.popitem(last=False)
        self._save_to_disk(block, wait=False)
        del self._index[self._keys.pop(block)]
        parent = self._parents.pop(block, None)
        if parent is not None:
            del self._children[parent][block]
            if not self._children[parent]:
                del self._children[parent]
        return block

    def _grow(self) -> None:
        """Double the back end's KV cache as far as the budget goes; where there is no memory, that is the budget."""
        made = len(self._references)
        needed = min(self.max_blocks, max(FIRST_BLOCKS, 2 * made))
        if needed <= made:
            return
        try:
            self.backend.reserve(needed)
        except MachineError:
            self.max_blocks = made
            return
        made, old = self.backend.num_blocks, made
        self.max_blocks = max(self.max_blocks, made)
        self._references.extend([0] * (made - old))
        self._free.extend(range(made - 1, old - 1, -1))

    def _load_from_disk(self, key: bytes) -> int | None:
        """The block of ``key``, read from disk; None if it is not there, or torn, or there is no block for it."""
        data = self.disk.read(key) if self.disk is not None and self.available else None
        block = self._pop_block() if data is not None else None
        if data is None or block is None:
            return None
        try:
            self.backend.write(block, data)
        except ValueError:
            self._free.append(block)
            return None
        self._index[key], self._keys[block] = block, key
        self._cached[block] = None
        return block

    def _save_to_disk(self, block: int, *, wait: bool) -> None:
        """Hand the content of ``block`` to the disk tier, unless it has it."""
        key, parent = self._keys[block], self._parents.get(block)
        full = parent is None or len(self._children[parent][block]) == BLOCK_SIZE
        if self.disk is not None and full and self.disk.accepts(key):
            self.disk.write(key, self.backend.read(block), wait=wait)


def determine_num_blocks(
    backend: Backend, context: int, max_batch: int, cache_bytes: int | None, device: torch.device
) -> int:
    """Blocks at most: what ``cache_bytes`` holds; else twice what all slots need, and at most half of what is free.

    It is a bound and is not taken before it is needed.

    Raises:
        EngineError: ``cache_bytes`` holds no block.
    """
    if cache_bytes is not None:
        if cache_bytes < backend.block_bytes:
            fault = f"cache_bytes is {cache_bytes}, and one block needs {backend.block_bytes}"
            raise EngineError(fault, where="cache_bytes", todo="give more")
        return cache_bytes // backend.block_bytes
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_bytes()
    return max(1, min(CONTEXTS * max_batch * blocks_for(context), int(free * FREE_SHARE) // backend.block_bytes))


def _free_bytes() -> int:
    """Memory that this process could have without swapping and within its control groups, in bytes."""
    free = available_bytes()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if free is None else free

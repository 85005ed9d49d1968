# size: one noun: who runs, in which slot, with which blocks
"""Who runs next: continuous batching in a fair order, prompts in pieces, and preemption when the KV cache is short.

A step computes one token of every running answer first, since somebody waits for it, and fills what is left of its
budget with pieces of prompts (Yu et al., "Orca", OSDI 2022; Agrawal et al., "Sarathi-Serve", arXiv 2403.02310).

*Fair.* The next piece of a prompt, and the next free slot, go to the tenant that was served least (``fair_queue``).

*KV cache.* A request is admitted when all blocks of its prompt can be had, so a prompt that has begun never waits for
one. An answer that grows into a new block may find none: then the youngest request of the most served tenant is
preempted: it goes back to the front of its queue and is computed again later. Admission takes nothing from anybody,
every request fits when it is alone, and what was sampled is kept: each preemption follows a token that some request
gained, so it cannot go on for ever.

*Siblings.* Requests of one prompt (``n``, RL groups) wait for the first of them, its owner, then fork its blocks and
its logits.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from sprat.engine.backend import BLOCK_SIZE
from sprat.engine.cache.blocks import Blocks
from sprat.engine.cache.prefix import BlockKeys
from sprat.engine.scheduling.fair_queue import Account, FairQueue
from sprat.engine.sequence import SMALL_BATCH, EngineLimits, PrefillChunk, ScheduledStep, Sequence, SlotIndex


class Scheduler:
    """Queues, slots, and the blocks behind them.

    Attributes:
        slots: the request in each slot, None in a free one.
        num_computed: int32 [max_batch], tokens in the KV cache of decoding requests.
        num_preemptions: how often a request had to make way.
    """

    def __init__(self, blocks: Blocks, keys: BlockKeys, limits: EngineLimits) -> None:
        self.blocks, self.keys, self.limits, max_batch = blocks, keys, limits, limits.max_batch
        self.slots: list[Sequence | None] = [None] * max_batch
        self.num_computed = np.zeros(max_batch, np.int32)
        self.queue, self.num_preemptions = FairQueue(), 0
        self._unschedulable: list[Sequence] = []
        self._num_registered = np.zeros(max_batch, np.int32)  # blocks of each slot that were given their key
        self._free_slots = list(range(max_batch - 1, -1, -1))
        self._steps_until_block_full = 0  # plain steps until an answer may fill a block
        self._prompt_owners: dict[int, Sequence] = {}
        self._decoding: dict[int, Sequence] = {}
        self._decode_rows: tuple[list[Sequence], NDArray[np.int64], SlotIndex] | None = None
        self._repeated_step: ScheduledStep | None = None

    @property
    def running(self) -> list[Sequence]:
        """All requests that hold a slot."""
        return [sequence for sequence in self.slots if sequence is not None]

    def add(self, sequence: Sequence) -> None:
        """Put a request at the end of its tenant's queue."""
        self._repeated_step = None
        self.queue.account(sequence).waiting.append(sequence)

    def schedule(self) -> ScheduledStep:
        """Choose what the next step computes, and get the blocks for it; the same step as long as nothing happens."""
        last = self._repeated_step
        if last and self._decode_rows and last.decoding is self._decode_rows[0] and self._steps_until_block_full > 0:
            return last
        self._allocate_next_tokens()
        decoding, slots_S, slot_index = self._decoding_rows()
        idle = not any(account.prefilling or (account.waiting and self._free_slots) for account in self.queue)
        chunks = [] if idle else self._schedule_prefill(max(self.limits.step_tokens - len(decoding), BLOCK_SIZE))
        if len(self.queue) > 1:
            for sequence in decoding:
                self.queue.account(sequence).served_tokens += 1
        step = ScheduledStep(decoding, slots_S, slot_index, chunks, {})
        self._repeated_step = step if idle and len(self.queue) == 1 else None
        return step

    def commit_chunks(self, chunks: list[PrefillChunk]) -> list[list[Sequence]]:
        """Book pieces of prompts as computed; for each prompt that is whole now, those that sample from its logits."""
        starting = []
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.count
            self._register_blocks(sequence, sequence.num_computed)
            if chunk.is_last:
                starting.append([sequence, *sequence.siblings])
                self._start_decoding(sequence)
        return starting

    def commit(self, slot_index: SlotIndex, *, most: int = 1) -> None:
        """Register the blocks that the answers in these slots have just filled with ``most`` tokens at most."""
        self._steps_until_block_full -= most
        if self._steps_until_block_full > 0:
            return
        full_S = self.num_computed[slot_index] // BLOCK_SIZE > self._num_registered[slot_index]
        for slot in np.arange(len(self.slots))[slot_index][full_S].tolist():
            if (sequence := self.slots[slot]) is not None:
                self._register_blocks(sequence, int(self.num_computed[slot]))

    def allocate_drafts(self, slot: int, drafts: int) -> bool:
        """Have blocks for the next token of the answer in ``slot`` and its drafts; False if there are none."""
        tokens = int(self.num_computed[slot]) + 1 + drafts
        return self._steps_until_block_full > drafts or self.blocks.allocate(slot, tokens)

    def remove(self, sequence: Sequence) -> None:
        """Take a request out, wherever it is; its siblings go back to the queue."""
        if sequence.slot < 0:
            self.queue.account(sequence).waiting.remove(sequence)
        else:
            self._free(sequence)
        self.queue.drop_if_idle(sequence)

    def preempt_all(self) -> None:
        """Send all that runs back to the front of its queue, the oldest first, and forget what is cached of prompts."""
        self._repeated_step = None
        while running := self.running:
            self._requeue(max(running, key=lambda sequence: sequence.id))
        self.blocks.clear_prefix_index()

    def take_unschedulable(self) -> list[Sequence]:
        """Requests that left since the last call because they can never run: there are fewer blocks than it seemed."""
        unschedulable, self._unschedulable = self._unschedulable, []
        for sequence in unschedulable:
            self.queue.drop_if_idle(sequence)
        return unschedulable

    def check(self) -> list[str]:
        """Faults of the books of slots and queues, and of the ledger of blocks; none if all is well."""
        running, waiting, slots = self.running, self.queue.waiting, self.slots
        faults = [f"request {s.id} of slot {s.slot} is in slot {n}" for n, s in enumerate(slots) if s and s.slot != n]
        faults += [f"waiting request {s.id} has slot {s.slot}" for s in waiting if s.slot != -1]
        if sorted(self._free_slots + [s.slot for s in running]) != list(range(len(slots))):
            faults.append(f"slots are lost: {len(running)} held, {len(self._free_slots)} free, {len(slots)} in all")
        begun = sum(len(account.prefilling) for account in self.queue)
        begun += sum(s.prompt_owner is not None for s in running)
        if begun + len(self._decoding) != len(running) or set(self._decoding) - {s.slot for s in running}:
            faults.append("requests that hold a slot neither compute a prompt nor answer")
        for slot, sequence in self._decoding.items():
            if (count := self.num_computed[slot]) != sequence.num_tokens - 1:  # the last token is not computed yet
                faults.append(f"request {sequence.id} of {sequence.num_tokens} tokens has {count} in the KV cache")
        if not running and (self.blocks.blocks_per_slot.any() or (not waiting and len(self.queue))):
            faults.append("nobody runs, and yet blocks are held or a tenant is still there")
        return faults + self.blocks.check()

    def _decoding_rows(self) -> tuple[list[Sequence], NDArray[np.int64], SlotIndex]:
        """The decoding requests and their slots; the same objects until one comes or goes."""
        if self._decode_rows is None:
            slots_S = np.array(slots := list(self._decoding), np.int64)
            self._decode_rows = list(self._decoding.values()), slots_S, slots if len(slots) <= SMALL_BATCH else slots_S
            self._steps_until_block_full = 0
        return self._decode_rows

    def _allocate_next_tokens(self) -> None:
        """Have a block for the next token of every answer; who is preempted for it goes back to the queue."""
        slots_S = self._decoding_rows()[1]
        if self._steps_until_block_full > 0 or not len(slots_S):
            return
        self._steps_until_block_full = BLOCK_SIZE - int((self.num_computed[slots_S] % BLOCK_SIZE).max())
        short = slots_S[self.blocks.blocks_per_slot[slots_S] * BLOCK_SIZE <= self.num_computed[slots_S]]
        if not short.size:
            return
        growing = [self._decoding[slot] for slot in short.tolist()]
        for sequence in sorted(growing, key=self._by_service):
            while sequence.slot >= 0:
                tokens = int(self.num_computed[sequence.slot]) + 1
                if self.blocks.allocate(sequence.slot, tokens):
                    break
                if not self.blocks.fits(tokens):
                    self._unschedulable.append(sequence)
                    self.remove(sequence)
                else:
                    self._preempt()

    def _by_service(self, sequence: Sequence) -> tuple[int, int]:
        """The order of requests: first of the least served tenant, then the oldest."""
        return self.queue.account(sequence).served_tokens, sequence.id

    def _preempt(self) -> None:
        """Send the youngest request of the most served tenant back to the front of its queue."""
        victim = max(self.running, key=self._by_service)
        self._requeue(victim)
        self.num_preemptions += 1

    def _schedule_prefill(self, budget: int) -> list[PrefillChunk]:
        """Pieces of prompts of ``budget`` tokens together at most, tenant by tenant, the least served first."""
        chunks: list[PrefillChunk] = []
        scheduled: set[int] = set()
        active = (account for account in self.queue if account.prefilling or account.waiting)
        order = [(account.served_tokens, account.num_running, n, account) for n, account in enumerate(active)]
        heapq.heapify(order)
        blocked = False  # whoever is next does not fit, and nobody overtakes
        while budget > 0 and order:
            _, _, number, account = order[0]
            sequence = next((s for s in account.prefilling if s.id not in scheduled), None)
            if sequence is None and account.waiting and not blocked:
                blocked = (sequence := self._admit(account)) is None
            if sequence is None:
                heapq.heappop(order)
                continue
            left = len(sequence.pending_ids) - sequence.num_computed
            count = min(budget, left)
            chunks.append(PrefillChunk(sequence, sequence.num_computed, count, count == left))
            scheduled.add(sequence.id)
            budget -= count
            account.served_tokens += count
            heapq.heapreplace(order, (account.served_tokens, account.num_running, number, account))
        if self._prompt_owners:
            for account in self.queue:
                self._attach_siblings(account)
        return chunks

    def _admit(self, account: Account) -> Sequence | None:
        """Give a slot and blocks to the first of the queue that has to compute; None if there is none to be had."""
        self._attach_siblings(account)
        while account.waiting and not self.blocks.fits(account.waiting[0].num_to_hold):
            self._unschedulable.append(account.waiting.popleft())
        if not account.waiting or not self._free_slots:
            return None
        sequence = account.waiting[0]
        self.keys.extend(sequence, tokens := sequence.num_tokens)
        skippable = sequence.num_skippable
        keys = sequence.block_keys[: skippable // BLOCK_SIZE]
        if not self.blocks.can_allocate(keys, sequence.num_to_hold):
            return None
        slot = self._assign_slot(account)
        shared = self.blocks.share_prefix(slot, keys)
        if not self.blocks.allocate(slot, sequence.num_to_hold):
            self._requeue(sequence)
            return None
        sequence.pending_ids = sequence.ids_between(0, tokens)
        rest = sequence.pending_ids[shared * BLOCK_SIZE : skippable]
        copied = self.blocks.copy_prefix(slot, shared, self.keys.parent(sequence, shared), rest)
        sequence.num_computed, self._num_registered[slot] = shared * BLOCK_SIZE + copied, shared
        if sequence.num_cached < 0:
            sequence.num_cached = min(sequence.num_computed, len(sequence.prompt_ids))
        account.prefilling.append(sequence)
        if sequence.prompt_group:
            self._prompt_owners[sequence.prompt_group] = sequence
        return sequence

    def _attach_siblings(self, account: Account) -> None:
        """Let the first of the queue wait for their prompt where it is being computed, with one block of their own."""
        while account.waiting and self._free_slots and self.blocks.available:
            owner = self._prompt_owners.get((sibling := account.waiting[0]).prompt_group)
            if owner is None:
                return
            if not self.blocks.allocate(self._assign_slot(account), 1):
                self._requeue(sibling)
                return
            sibling.prompt_owner, sibling.num_cached = owner, len(sibling.prompt_ids)
            owner.siblings.append(sibling)

    def _assign_slot(self, account: Account) -> int:
        """Take the first of the queue and give it a slot."""
        sequence, slot = account.waiting.popleft(), self._free_slots.pop()
        sequence.slot, self.slots[slot] = slot, sequence
        account.num_running += 1
        return slot

    def _start_decoding(self, sequence: Sequence) -> None:
        """The prompt of ``sequence`` is in the KV cache: it and its siblings answer from now on."""
        tokens = len(sequence.pending_ids)
        self.queue.account(sequence).prefilling.remove(sequence)
        self._prompt_owners.pop(sequence.prompt_group, None)
        for sibling in sequence.siblings:
            self.blocks.fork(sequence.slot, sibling.slot, tokens)
            sibling.prompt_owner, sibling.block_keys = None, sequence.block_keys[:]
            self._num_registered[sibling.slot] = tokens // BLOCK_SIZE
        for started in (sequence, *sequence.siblings):
            self._decoding[started.slot] = started
            self.num_computed[started.slot] = tokens
        sequence.siblings, sequence.pending_ids, self._decode_rows = [], sequence.pending_ids[:0], None

    def _register_blocks(self, sequence: Sequence, computed: int) -> None:
        """Give keys to the full blocks among the first ``computed`` tokens."""
        slot, full = sequence.slot, computed // BLOCK_SIZE
        self.keys.extend(sequence, full * BLOCK_SIZE)
        for index in range(int(self._num_registered[slot]), full):
            tokens = sequence.ids_between(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
            key, parent = sequence.block_keys[index], self.keys.parent(sequence, index)
            self.blocks.register(slot, index, key, parent, tokens)
        self._num_registered[slot] = full

    def _requeue(self, sequence: Sequence) -> None:
        """Take slot and blocks from ``sequence`` and put it back to the front of its queue."""
        self._free(sequence)
        self.queue.requeue(sequence)

    def _free(self, sequence: Sequence) -> None:
        """Take slot and blocks from ``sequence``; siblings that wait for it go back to the queue."""
        account, slot = self.queue.account(sequence), sequence.slot
        computed = int(self.num_computed[slot]) if slot in self._decoding else sequence.num_computed
        if self.limits.frozen and computed % BLOCK_SIZE and sequence.prompt_owner is None:
            self._register_blocks(sequence, computed)
            tokens, index = sequence.ids_between(computed - computed % BLOCK_SIZE, computed), computed // BLOCK_SIZE
            key, parent = self.keys.partial(sequence, computed), self.keys.parent(sequence, index)
            self.blocks.register(slot, index, key, parent, tokens)
        if self._decoding.pop(slot, None) is not None:
            self._decode_rows = None
        elif sequence.prompt_owner is not None:
            sequence.prompt_owner.siblings.remove(sequence)
        elif sequence in account.prefilling:
            account.prefilling.remove(sequence)
            if self._prompt_owners.get(sequence.prompt_group) is sequence:
                del self._prompt_owners[sequence.prompt_group]
        self.blocks.free(slot)
        self._free_slots.append(slot)
        self.slots[slot] = None
        account.num_running -= 1
        sequence.slot, sequence.prompt_owner, sequence.num_computed, sequence.draft_ids = -1, None, 0, []
        siblings, sequence.siblings = sequence.siblings, []
        for sibling in reversed(siblings):
            sibling.prompt_owner = None
            self._requeue(sibling)

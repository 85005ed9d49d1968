"""Who runs next: continuous batching in a fair order, prompts in pieces, and who makes way when memory is short.

A step computes one token of every running answer first, since somebody waits for it, and fills what is left of its
budget with pieces of prompts (Yu et al., "Orca", OSDI 2022; Agrawal et al., "Sarathi-Serve", arXiv 2403.02310).

*Fair.* The next piece of a prompt, and the next free slot, go to the tenant that was served least (``tenants``).

*Memory.* A request is admitted when all blocks of its prompt can be had, so a prompt that has begun never waits for it.
An answer that grows into a new block may find none: then the youngest request of the most served tenant goes back to
the front of its queue and is computed again later. Admission takes nothing from anybody, every request fits when it is
alone, and what was sampled is kept: each retreat follows a token that some request gained, so it cannot go on for ever.

*Twins.* Requests of one prompt (``n``, RL groups) wait for the first of them, then fork its memory and its logits.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from sprat.engine.backend import BLOCK
from sprat.engine.blocks import Blocks
from sprat.engine.plan import FEW, At, Chunk, Plan
from sprat.engine.prefix import Keys
from sprat.engine.sequence import Sequence
from sprat.engine.tenants import Share, Tenants


class Scheduler:
    """Queues, slots, and the blocks behind them.

    Args:
        slots: requests that run together at most.
        step_tokens: tokens of one step, about; pieces of prompts get one block of it at least.
        tails: whether the begun blocks of requests that leave are kept for those that continue them.

    Attributes:
        at: the request in each slot, None in a free one.
        stored: int32 [slots], tokens in memory of decoding requests.
        preempted: how often a request had to make way.
    """

    def __init__(self, blocks: Blocks, keys: Keys, slots: int, step_tokens: int, *, tails: bool = True) -> None:
        self.blocks, self.keys, self.step_tokens, self.tails = blocks, keys, step_tokens, tails
        self.at: list[Sequence | None] = [None] * slots
        self.stored = np.zeros(slots, np.int32)
        self._doomed: list[Sequence] = []
        self._published = np.zeros(slots, np.int32)  # blocks of each slot that were given their key
        self._free = list(range(slots - 1, -1, -1))
        self.tenants, self.preempted, self._calm = Tenants(), 0, 0  # plain steps until an answer may fill a block
        self._leaders: dict[int, Sequence] = {}
        self._decoding: dict[int, Sequence] = {}
        self._rows: tuple[list[Sequence], NDArray[np.int64], At] | None = None
        self._plan: Plan | None = None

    @property
    def running(self) -> list[Sequence]:
        """All requests that hold a slot."""
        return [sequence for sequence in self.at if sequence is not None]

    def add(self, sequence: Sequence) -> None:
        """Put a request at the end of its tenant's queue."""
        self._plan = None
        self.tenants.share(sequence).waiting.append(sequence)

    def plan(self) -> Plan:
        """Choose what the next step computes, and get the blocks for it; the same plan as long as nothing happens."""
        known = self._plan
        if known and self._rows and known.rows is self._rows[0] and self._calm > 0:
            return known
        self._grow()
        rows, slots_S, at = self._answering()
        idle = not any(share.prefilling or (share.waiting and self._free) for share in self.tenants)
        chunks = [] if idle else self._prefill(max(self.step_tokens - len(rows), BLOCK))
        if len(self.tenants) > 1:
            for sequence in rows:
                self.tenants.share(sequence).served += 1
        plan = Plan(rows, slots_S, at, chunks, {})
        self._plan = plan if idle and len(self.tenants) == 1 else None
        return plan

    def computed(self, chunks: list[Chunk]) -> list[list[Sequence]]:
        """Book pieces of prompts as computed; for each prompt that is whole now, those that sample from its logits."""
        starting = []
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.stored += chunk.count
            self._publish(sequence, sequence.stored)
            if chunk.last:
                starting.append([sequence, *sequence.twins])
                self._start(sequence)
        return starting

    def gained(self, at: At, *, most: int = 1) -> None:
        """Give a key to the blocks that the answers in slots ``at`` have just filled with ``most`` tokens at most."""
        self._calm -= most
        if self._calm > 0:
            return
        for slot in np.arange(len(self.at))[at][self.stored[at] // BLOCK > self._published[at]].tolist():
            if (sequence := self.at[slot]) is not None:
                self._publish(sequence, int(self.stored[slot]))

    def extends(self, slot: int, drafts: int) -> bool:
        """Have places for the next token of the answer in ``slot`` and its drafts; False if there is no room."""
        return self._calm > drafts or self.blocks.extend(slot, int(self.stored[slot]) + 1 + drafts)

    def remove(self, sequence: Sequence) -> None:
        """Take a request out, wherever it is; its twins go back to the queue."""
        if sequence.slot < 0:
            self.tenants.share(sequence).waiting.remove(sequence)
        else:
            self._vacate(sequence)
        self.tenants.close(sequence)

    def doomed(self) -> list[Sequence]:
        """Requests that left since the last call because they can never run: there is less memory than it seemed."""
        doomed, self._doomed = self._doomed, []
        for sequence in doomed:
            self.tenants.close(sequence)
        return doomed

    def check(self) -> list[str]:
        """Faults of the books of slots and queues, and of the ledger of blocks; none if all is well."""
        running, waiting = self.running, self.tenants.waiting
        faults = [f"request {s.id} of slot {s.slot} is in slot {n}" for n, s in enumerate(self.at) if s and s.slot != n]
        faults += [f"waiting request {s.id} has slot {s.slot}" for s in waiting if s.slot != -1]
        if sorted(self._free + [s.slot for s in running]) != list(range(len(self.at))):
            faults.append(f"slots are lost: {len(running)} held, {len(self._free)} free, {len(self.at)} in all")
        begun = sum(len(share.prefilling) for share in self.tenants) + sum(s.leader is not None for s in running)
        if begun + len(self._decoding) != len(running) or set(self._decoding) - {s.slot for s in running}:
            faults.append("requests that hold a slot neither compute a prompt nor answer")
        for slot, sequence in self._decoding.items():
            if self.stored[slot] != sequence.length - 1:  # the token sampled last is not in memory yet
                faults.append(f"request {sequence.id} of {sequence.length} tokens has {self.stored[slot]} in memory")
        if not running and (self.blocks.held.any() or (not waiting and len(self.tenants))):
            faults.append("nobody runs, and yet blocks are held or a tenant is still there")
        return faults + self.blocks.check()

    def _answering(self) -> tuple[list[Sequence], NDArray[np.int64], At]:
        """The decoding requests and their slots; the same objects until one comes or goes."""
        if self._rows is None:
            slots_S = np.array(slots := list(self._decoding), np.int64)
            self._rows = list(self._decoding.values()), slots_S, slots if len(slots) <= FEW else slots_S
            self._calm = 0
        return self._rows

    def _grow(self) -> None:
        """Have a place for the next token of every answer; who must make way goes back to the queue."""
        slots_S = self._answering()[1]
        if self._calm > 0 or not len(slots_S):
            return
        self._calm = BLOCK - int((self.stored[slots_S] % BLOCK).max())
        short = slots_S[self.blocks.held[slots_S] * BLOCK <= self.stored[slots_S]]
        if not short.size:
            return
        growing = [self._decoding[slot] for slot in short.tolist()]
        for sequence in sorted(growing, key=lambda one: (self.tenants.share(one).served, one.id)):
            while sequence.slot >= 0 and not self.blocks.extend(sequence.slot, int(self.stored[sequence.slot]) + 1):
                if not self.blocks.fits(int(self.stored[sequence.slot]) + 1):
                    self._doomed.append(sequence)
                    self.remove(sequence)
                else:
                    self._preempt()

    def _preempt(self) -> None:
        """Send the youngest request of the most served tenant back to the front of its queue."""
        victim = max(self.running, key=lambda one: (self.tenants.share(one).served, one.id))
        self._vacate(victim)
        self.tenants.requeue(victim)
        self.preempted += 1

    def _prefill(self, budget: int) -> list[Chunk]:
        """Pieces of prompts of ``budget`` tokens together at most, tenant by tenant, the least served first."""
        chunks: list[Chunk] = []
        taken: set[int] = set()
        active = (share for share in self.tenants if share.prefilling or share.waiting)
        order = [(share.served, share.running, number, share) for number, share in enumerate(active)]
        heapq.heapify(order)
        blocked = False  # whoever is next does not fit, and nobody overtakes
        while budget > 0 and order:
            _, _, number, share = order[0]
            sequence = next((one for one in share.prefilling if one.id not in taken), None)
            if sequence is None and share.waiting and not blocked:
                blocked = (sequence := self._admit(share)) is None
            if sequence is None:
                heapq.heappop(order)
                continue
            left = len(sequence.known) - sequence.stored
            count = min(budget, left)
            chunks.append(Chunk(sequence, sequence.stored, count, count == left))
            taken.add(sequence.id)
            budget -= count
            share.served += count
            heapq.heapreplace(order, (share.served, share.running, number, share))
        if self._leaders:
            for share in self.tenants:
                self._join(share)
        return chunks

    def _admit(self, share: Share) -> Sequence | None:
        """Give a slot and blocks to the first of the queue that has to compute; None if there is none to be had."""
        self._join(share)
        while share.waiting and not self.blocks.fits(share.waiting[0].length + 1):
            self._doomed.append(share.waiting.popleft())
        if not share.waiting or not self._free:
            return None
        sequence = share.waiting[0]
        self.keys.extend(sequence, tokens := sequence.length)
        keys = sequence.keys[: (tokens - 1) // BLOCK]  # the last token is always computed: its logits are needed
        if not self.blocks.room(keys, tokens + 1):
            return None
        slot = self._enter(share)
        found = self.blocks.adopt(slot, keys)
        if not self.blocks.extend(slot, tokens + 1):
            self._vacate(sequence)
            self.tenants.requeue(sequence)
            return None
        sequence.known = sequence.span(0, tokens)
        rest = sequence.known[found * BLOCK : tokens - 1]
        more = self.blocks.borrow(slot, found, self.keys.before(sequence, found), rest)
        sequence.stored, self._published[slot] = found * BLOCK + more, found
        if sequence.hit < 0:
            sequence.hit = min(sequence.stored, len(sequence.prompt))
        share.prefilling.append(sequence)
        if sequence.share:
            self._leaders[sequence.share] = sequence
        return sequence

    def _join(self, share: Share) -> None:
        """Let the first of the queue wait for their prompt where it is being computed, with one block of their own."""
        while share.waiting and self._free and self.blocks.available:
            leader = self._leaders.get((twin := share.waiting[0]).share)
            if leader is None:
                return
            if not self.blocks.extend(self._enter(share), 1):
                self._vacate(twin)
                self.tenants.requeue(twin)
                return
            twin.leader, twin.hit = leader, len(twin.prompt)
            leader.twins.append(twin)

    def _enter(self, share: Share) -> int:
        """Take the first of the queue and give it a slot."""
        sequence, slot = share.waiting.popleft(), self._free.pop()
        sequence.slot, self.at[slot] = slot, sequence
        share.running += 1
        return slot

    def _start(self, sequence: Sequence) -> None:
        """The prompt of ``sequence`` is in memory: it and its twins answer from now on."""
        tokens = len(sequence.known)
        self.tenants.share(sequence).prefilling.remove(sequence)
        self._leaders.pop(sequence.share, None)
        for twin in sequence.twins:
            self.blocks.fork(sequence.slot, twin.slot, tokens)
            twin.leader, twin.keys = None, sequence.keys[:]
            self._published[twin.slot] = tokens // BLOCK
        for one in (sequence, *sequence.twins):
            self._decoding[one.slot] = one
            self.stored[one.slot] = tokens
        sequence.twins, sequence.known, self._rows = [], sequence.known[:0], None

    def _publish(self, sequence: Sequence, stored: int) -> None:
        """Give keys to the full blocks among the first ``stored`` tokens."""
        slot, full = sequence.slot, stored // BLOCK
        self.keys.extend(sequence, full * BLOCK)
        for place in range(int(self._published[slot]), full):
            tokens = sequence.span(place * BLOCK, (place + 1) * BLOCK)
            self.blocks.publish(slot, place, sequence.keys[place], self.keys.before(sequence, place), tokens)
        self._published[slot] = full

    def _vacate(self, sequence: Sequence) -> None:
        """Take slot and blocks from ``sequence``; twins that wait for it go back to the queue."""
        share, slot = self.tenants.share(sequence), sequence.slot
        stored = int(self.stored[slot]) if slot in self._decoding else sequence.stored
        if self.tails and stored % BLOCK and sequence.leader is None:
            self._publish(sequence, stored)
            tokens, place = sequence.span(stored - stored % BLOCK, stored), stored // BLOCK
            last, before = self.keys.last(sequence, stored), self.keys.before(sequence, place)
            self.blocks.publish(slot, place, last, before, tokens)
        if self._decoding.pop(slot, None) is not None:
            self._rows = None
        elif sequence.leader is not None:
            sequence.leader.twins.remove(sequence)
        elif sequence in share.prefilling:
            share.prefilling.remove(sequence)
            if self._leaders.get(sequence.share) is sequence:
                del self._leaders[sequence.share]
        self.blocks.release(slot)
        self._free.append(slot)
        self.at[slot] = None
        share.running -= 1
        sequence.slot, sequence.leader, sequence.stored, sequence.drafts = -1, None, 0, []
        twins, sequence.twins = sequence.twins, []
        for twin in reversed(twins):
            twin.leader = None
            self._vacate(twin)
            self.tenants.requeue(twin)

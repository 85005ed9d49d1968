"""Those who wait for a place: whose turn it is, and who gives way where there are too many.

Every tenant has a queue and a counter of the tokens that it was served, and who has the lowest is next (the virtual
token counter of Sheng et al., arXiv 2401.00588). ``level`` is the counter of the last whose turn it was, at its turn;
whoever starts to wait is raised to it, so absence earns nothing, and no correction brings a counter below it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(eq=False, slots=True)
class Account:
    """One tenant.

    Attributes:
        served_tokens: its counter.
        num_waiting, waiting_tokens, waiting_seqs: its requests that wait, their estimated tokens, their answers.
        running_seqs: places that it holds.
        next_slot: when its next refused caller may come again, by the clock of the admission.
    """

    name: str
    served_tokens: float = 0.0
    num_waiting: int = 0
    waiting_tokens: int = 0
    waiting_seqs: int = 0
    running_seqs: int = 0
    next_slot: float = 0.0


class Waiter:
    """A request in a queue: ``tokens`` (estimated) and ``seqs`` answers; ``number`` says when it arrived."""

    def __init__(self, account: Account, tokens: int, seqs: int, number: int) -> None:
        self.account, self.tokens, self.seqs, self.number = account, tokens, seqs, number
        self.waits = False


W = TypeVar("W", bound=Waiter)


class FairQueue(Generic[W]):
    """The tenants' accounts and queues; at most ``max_reqs`` requests and ``max_tokens`` tokens shall wait.

    A request that waits alone may have more tokens than that.
    """

    def __init__(self, max_reqs: int, max_tokens: int) -> None:
        self.max_reqs, self.max_tokens = max_reqs, max_tokens
        self.num_reqs = self.num_tokens = 0
        self.level = 0.0
        self._accounts: dict[str, Account] = {}
        self._queues: dict[str, deque[W]] = {}  # each in order of arrival; none is empty
        self._sweep_at = 64

    @property
    def num_tenants(self) -> int:
        """How many tenants wait."""
        return len(self._queues)

    @property
    def waiting(self) -> list[W]:
        """All who wait."""
        return [waiter for queue in self._queues.values() for waiter in queue]

    def account(self, name: str, now: float) -> Account:
        """The account of a tenant. Those that are as good as new are dropped now and then."""
        if name not in self._accounts:
            if len(self._accounts) >= self._sweep_at:
                self._accounts = {
                    account.name: account for account in self._accounts.values() if self._used(account, now)
                }
                self._sweep_at = max(64, 2 * len(self._accounts))
            self._accounts[name] = Account(name)
        return self._accounts[name]

    def _used(self, account: Account, now: float) -> bool:
        present = account.num_waiting > 0 or account.running_seqs > 0
        return present or account.served_tokens > self.level or account.next_slot > now

    def append(self, waiter: W) -> None:
        """Let a request wait as the last of its tenant."""
        account = waiter.account
        if not account.num_waiting:
            account.served_tokens = max(account.served_tokens, self.level)
            self._queues[account.name] = deque()
        self._queues[account.name].append(waiter)
        self._count(waiter, 1)

    def remove(self, waiter: W) -> None:
        """Take out a request that waits."""
        account = waiter.account
        queue = self._queues[account.name]
        if queue[-1] is waiter:
            queue.pop()
        else:
            queue.remove(waiter)
        if not queue:
            del self._queues[account.name]
        self._count(waiter, -1)

    def _count(self, waiter: W, sign: int) -> None:
        account = waiter.account
        waiter.waits = sign > 0
        self.num_reqs += sign
        self.num_tokens += sign * waiter.tokens
        account.num_waiting += sign
        account.waiting_tokens += sign * waiter.tokens
        account.waiting_seqs += sign * waiter.seqs

    def first(self, max_running_seqs: int) -> W | None:
        """Whose turn it is: the first of the least served tenant, of those who stay within ``max_running_seqs``.

        A tenant that holds no place may have its turn with more of them, too.
        """
        heads = [queue[0] for queue in self._queues.values()]
        turns = [
            head
            for head in heads
            if not head.account.running_seqs or head.account.running_seqs + head.seqs <= max_running_seqs
        ]
        return min(turns, key=lambda head: (head.account.served_tokens, head.number), default=None)

    def crowded_out(self, arrival: W) -> list[W]:
        """Who has to leave so that the rest, the ``arrival`` among them, keep to the bounds: it alone, or others.

        The tenant that has most of what is short gives up its newest, of equals the one of the ``arrival``. A tenant's
        only request is safe from the tokens of others, unless it takes more than half of what there is for all.
        """
        if self.num_reqs > self.max_reqs and arrival.account.num_waiting >= max(map(len, self._queues.values())):
            return [arrival]  # what the rest comes to as well: most refusals are made here, at once
        going: list[W] = []
        own = arrival.account.name
        reqs, tokens = self.num_reqs, self.num_tokens
        left = {name: (len(queue), queue[0].account.waiting_tokens) for name, queue in self._queues.items()}
        while reqs > self.max_reqs or (tokens > self.max_tokens and reqs > 1):
            if reqs > self.max_reqs:
                shares = {name: num for name, (num, _) in left.items()}
            else:
                half = self.max_tokens / 2
                shares = {name: sum_ for name, (num, sum_) in left.items() if name == own or num > 1 or sum_ > half}
            largest = max(shares, key=lambda name: (shares[name], name == own))
            if largest == own:
                return [arrival]
            num, sum_ = left[largest]
            newest = self._queues[largest][num - 1]
            left[largest] = (num - 1, sum_ - newest.tokens)
            reqs, tokens = reqs - 1, tokens - newest.tokens
            going.append(newest)
        return going

    def start(self, waiter: W) -> None:
        """It is the turn of ``waiter``: out of the queue, and its tokens on the counter."""
        account = waiter.account
        self.level = max(self.level, account.served_tokens)
        account.served_tokens += waiter.tokens
        account.running_seqs += waiter.seqs
        self.remove(waiter)

    def finish(self, waiter: W, excess_tokens: int) -> None:
        """``waiter``, which had started, has left; ``excess_tokens`` are on the counter that it was not served."""
        account = waiter.account
        account.running_seqs -= waiter.seqs
        if excess_tokens > 0:
            settled = max(account.served_tokens - excess_tokens, self.level)
            account.served_tokens = min(account.served_tokens, settled)

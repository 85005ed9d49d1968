"""Whose turn it is: a queue and a counter for every tenant.

The counter holds the tokens that were computed for a tenant, and who has the lowest is next (the virtual token counter
of Sheng et al., arXiv 2401.00588). Who comes back after a pause starts at the lowest counter of those who are
there: absence earns nothing. A thousand requests of one tenant thus delay the single one of another by one turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from sprat.engine.sequence import Sequence


@dataclass
class Account:
    """One tenant: tokens computed for it, who waits, and who computes a prompt, each in order of arrival."""

    served_tokens: int
    waiting: deque[Sequence] = field(default_factory=deque)
    prefilling: list[Sequence] = field(default_factory=list)
    num_running: int = 0  # requests that hold a slot, prefilling ones and waiting siblings included


class FairQueue:
    """The tenants that have any request here, by name."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._accounts)

    def __iter__(self) -> Iterator[Account]:
        """Their accounts, in order of arrival."""
        return iter(self._accounts.values())

    @property
    def waiting(self) -> list[Sequence]:
        """All requests that wait for a slot."""
        return [sequence for account in self for sequence in account.waiting]

    def account(self, sequence: Sequence) -> Account:
        """The account of the tenant of ``sequence``."""
        name = sequence.tenant.name
        if name not in self._accounts:
            self._accounts[name] = Account(min((account.served_tokens for account in self), default=0))
        return self._accounts[name]

    def requeue(self, sequence: Sequence) -> None:
        """Put a request back to the front of its queue; its output makes its text its own."""
        if sequence.output_ids:
            sequence.prompt_group = 0
        self.account(sequence).waiting.appendleft(sequence)

    def drop_if_idle(self, sequence: Sequence) -> None:
        """Drop the account of the tenant of ``sequence`` if it has nothing left."""
        account = self._accounts.get(sequence.tenant.name)
        if account is not None and not account.num_running and not account.waiting:
            del self._accounts[sequence.tenant.name]

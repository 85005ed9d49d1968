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
class Share:
    """One tenant's part: tokens computed for it, who waits, and who computes a prompt, each in order of arrival."""

    served: int
    waiting: deque[Sequence] = field(default_factory=deque)
    prefilling: list[Sequence] = field(default_factory=list)
    running: int = 0  # requests that hold a slot, prefilling ones and twins included


class Tenants:
    """The tenants that have any request here, by name."""

    def __init__(self) -> None:
        self._shares: dict[str, Share] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._shares)

    def __iter__(self) -> Iterator[Share]:
        """Their parts, in order of arrival."""
        return iter(self._shares.values())

    @property
    def waiting(self) -> list[Sequence]:
        """All requests that wait for a slot."""
        return [sequence for share in self for sequence in share.waiting]

    def share(self, sequence: Sequence) -> Share:
        """The part of the tenant of ``sequence``."""
        name = sequence.tenant.name
        if name not in self._shares:
            self._shares[name] = Share(min((share.served for share in self), default=0))
        return self._shares[name]

    def requeue(self, sequence: Sequence) -> None:
        """Put a request back to the front of its queue; what it has said makes its text its own."""
        if sequence.token_ids:
            sequence.share = 0
        self.share(sequence).waiting.appendleft(sequence)

    def close(self, sequence: Sequence) -> None:
        """Forget the tenant of ``sequence`` if it has nothing left."""
        share = self._shares.get(sequence.tenant.name)
        if share is not None and not share.running and not share.waiting:
            del self._shares[sequence.tenant.name]

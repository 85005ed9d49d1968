"""What a bar gives: rows of a figure and its limit, and how thorough a run is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How thorough a run is.

    Attributes:
        leavers: clients that leave in one wave, and ``waves`` of them.
        half_open: connections that are opened and left so; ``healthy`` of those that ask beside them.
        overload_seconds: of ten times the load that the server can bear.
        schemas: requests with a schema that takes ``schema_seconds`` to compile.
        tokens: of each stream where speed is measured; ``rounds`` of it.
        trials: guesses of what another tenant asked.
    """

    leavers: int
    waves: int
    half_open: int
    healthy: int
    overload_seconds: float
    schemas: int
    schema_seconds: float
    tokens: int
    rounds: int
    trials: int


FULL = Plan(250, 4, 900, 100, 60.0, 200, 3.0, 128, 3, 64)
QUICK = Plan(120, 1, 300, 40, 12.0, 200, 1.0, 32, 1, 24)


@dataclass(frozen=True)
class Row:
    """One line of the report; without ``limit`` it is shown and not judged."""

    bar: str
    what: str
    figure: float
    limit: float | None = None
    kind: Literal["at least", "at most"] = "at most"
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of its limit."""
        if self.limit is None:
            return True
        return self.figure >= self.limit if self.kind == "at least" else self.figure <= self.limit

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "met": self.met}

    def __str__(self) -> str:
        verdict = "shown" if self.limit is None else f"{self.kind} {self.limit:g}: {'met' if self.met else 'MISSED'}"
        note = f"  ({self.note})" if self.note else ""
        return f"{self.bar:9} {self.what:58} {self.figure:10.4g} {self.unit:9} {verdict}{note}"

"""RL of any model on the user's questions: what differs from the quickstart's station.

``RLRunConfig`` holds every key of ``sprat rl MODEL``. The station's own classes (``GRPOConfig``, ``RLConfig``) get no
key more, for each would change the digest of every recipe; the station converts its config (``from_station``), and
whatever a key that is here alone does not leave as it was there stands in ``_STATION``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from sprat.config.recipe import RLConfig


class RLRunConfig(RLConfig):
    """One run of RL: GRPO's keys, and those of ``sprat rl MODEL``."""

    _STATION: ClassVar[dict[str, Any]] = {"seeding": "step"}  # what the station's runs do otherwise than the defaults

    # What a group's question and its noise are drawn by: its own number, so that any process can draw it alone, or its
    # step, all of whose groups are then drawn together.
    seeding: Literal["group", "step"] = "group"

    @classmethod
    def from_station(cls, config: RLConfig) -> Self:
        """The run that the quickstart's station makes of its own ``config``."""
        return cls(**config.model_dump(), **cls._STATION)

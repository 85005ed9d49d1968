"""RL of any model on the user's questions: what differs from the quickstart's station.

``RLRunConfig`` holds every key of ``sprat rl MODEL``. The station's own classes (``GRPOConfig``, ``RLConfig``) get no
key more, for each would change the digest of every recipe; the station converts its config (``from_station``), and
whatever a key that is here alone does not leave as it was there stands in ``_STATION``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sprat.config.recipe import RLConfig


class RLRunConfig(RLConfig):
    """One run of RL: GRPO's keys, and those of ``sprat rl MODEL``."""

    _STATION: ClassVar[dict[str, Any]] = {
        "seeding": "step",
        "loss": "bnpo",
    }  # what the station's runs do otherwise than the defaults

    # What a group's question and its noise are drawn by: its own number, so that any process can draw it alone, or its
    # step, all of whose groups are then drawn together.
    seeding: Literal["group", "step"] = "group"
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"] = "dapo"  # see post.rl.losses
    sample_std: bool = False  # divide by the deviation of a sample (over G - 1), not of the group as a population
    std_epsilon: float = Field(0.0, ge=0, le=1e9)  # added to that deviation (TRL: 1e-4)
    off_policy_limit: float | None = Field(None, gt=0, le=1e9)  # nats a token: bad answers further off are masked
    overlong_buffer: int = Field(0, ge=0, lt=2**31)  # last tokens before max_tokens over which the reward falls by 1
    mask_truncated: bool = False  # answers cut off at max_tokens abstain (DAPO's overlong filtering)

    @model_validator(mode="after")
    def _check_buffer(self) -> Self:
        if self.overlong_buffer > self.max_tokens:
            raise ValueError(f"overlong_buffer ({self.overlong_buffer}) is longer than max_tokens ({self.max_tokens})")
        return self

    @classmethod
    def from_station(cls, config: RLConfig) -> Self:
        """The run that the quickstart's station makes of its own ``config``."""
        return cls(**config.model_dump(), **cls._STATION)

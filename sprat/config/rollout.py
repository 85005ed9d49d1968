"""Who samples the answers of a run of RL: this process, or workers of their own, here or on other machines."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sprat.config.base import Config


class RolloutConfig(Config):
    """The three roles; with ``workers = 0`` one process samples and trains in turn."""

    workers: int = Field(0, ge=0, le=4096)  # processes that sample
    staleness: int = Field(0, ge=0, le=10**6)  # steps by which sampling may run ahead of training; 0: synchronous
    batch: int = Field(0, ge=0, lt=2**31)  # groups that a worker samples at once; 0: a step's, shared out evenly
    placement: Literal["local", "ray", "listen"] = "local"  # ray: as its actors; listen: whoever comes with the key
    listen: str = "127.0.0.1:0"  # HOST:PORT where workers of other machines find the run; port 0: any
    # Of the weights that answers are sampled with; less than float32 is another policy, which importance_cap corrects.
    precision: Literal["float32", "bfloat16", "int4"] = "float32"

    in_flight: bool = False  # workers take newer weights between two tokens of an answer, not only between answers

    @model_validator(mode="after")
    def _check_in_flight(self) -> Self:
        if self.in_flight and not self.staleness:
            raise ValueError("in_flight takes weights while answers run ahead of training: set rollout.staleness")
        if self.in_flight and self.precision == "int4":
            raise ValueError("codes of int4 are made between two batches: set in_flight=false or precision=bfloat16")
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if not self.workers and (self.staleness or self.placement != "local"):
            raise ValueError("staleness and placement are of workers, and there are none: set rollout.workers")
        return self

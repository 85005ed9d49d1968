"""A model asked a user's questions and judged by the user's verifier, outside of RL: scores, and rejection sampling."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from sprat.config.base import Config
from sprat.config.recipe import Count


class SplitConfig(Config):
    """Which questions of a file are held out where it does not say; the same two numbers as those of ``sprat rl``."""

    share: float = Field(0.2, ge=0, lt=1)  # by a hash of the question; 0: none
    problems: Count = 100  # at most


class HeldOutOfConfig(SplitConfig):
    """A file of questions whose held-out part must not be learned."""

    data: str = ""


class WorkersConfig(Config):
    """How the user's verifier is run."""

    workers: int = Field(4, ge=1, le=1024)  # answers that are judged at once, each in a process of its own
    keep_alive: bool = False  # of a command: it stays and answers line for line


class AskConfig(Config):
    """How questions are asked and answers judged."""

    samples: int = Field(1, ge=1, le=10_000)  # answers to each question
    temperature: float = Field(1.0, ge=0, le=100)  # of a held-out score that of several answers; one is the likeliest
    max_tokens: Count = 128  # of an answer, thinking included
    seed: int = Field(0, ge=0, lt=2**63)
    reward_timeout: float = Field(10.0, gt=0, le=1e9)  # seconds for one answer
    verifier: WorkersConfig = WorkersConfig()
    held_out: SplitConfig = SplitConfig()

    @model_validator(mode="after")
    def _check_temperature(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples at temperature 0 are all alike: raise temperature")
        return self


class SampleConfig(AskConfig):
    """Rejection sampling: the training questions are asked, and what the verifier pays becomes examples for SFT."""

    samples: int = Field(4, ge=1, le=10_000)
    problems: int = Field(0, ge=0, lt=2**31)  # questions asked at most; 0: all of a file, 100 of a generator
    thinking: bool = False  # open the think tag, of models whose chat format can be told to think and not to
    instruction: str = ""  # said behind the question to all other models, and not learned
    min_reward: float = Field(1.0, ge=-1e9, le=1e9)  # what an answer must be paid to be kept
    keep: int = Field(0, ge=0, lt=2**31)  # answers kept of each question, the first ones; 0: all that differ
    mix_share: float = Field(0.25, gt=0, lt=1)  # of the examples that general ones fill at most, where there are some
    batch: Count = 32  # questions answered between two writes

"""RL of any model on the user's questions: what differs from the quickstart's station.

``RLRunConfig`` holds every key of ``sprat rl MODEL``. The station's own classes (``GRPOConfig``, ``RLConfig``) get no
key more, for each would change the digest of every recipe; the station converts its config (``from_station``), and
whatever a key that is here alone does not leave as it was there stands in ``_STATION``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sprat.config.base import Config
from sprat.config.finetune import load_with_rank
from sprat.config.model import LoRAConfig
from sprat.config.recipe import Count, RLConfig
from sprat.config.rollout import RolloutConfig


class VerifierConfig(Config):
    """How the user's verifier is run; its time limit for an answer is ``reward_timeout``."""

    workers: int = Field(4, ge=1, le=1024)  # answers that are judged at once, each in a process of its own
    keep_alive: bool = False  # of a command: it stays and answers line for line, instead of one process for each answer
    repeat: int = Field(32, ge=0, lt=2**31)  # answers that the gate has judged twice; 0: none
    min_agreement: float = Field(0.5, ge=0, le=1)  # of the two judgements; less is chance, and no verifier


class HeldOutConfig(Config):
    """Problems that are kept from training, by a hash of the question, and asked before, during and after."""

    share: float = Field(0.2, ge=0, lt=1)  # of a file that does not say which of its rows are held out; 0: none
    problems: Count = 100  # at most
    every: int = Field(10, ge=0, lt=2**31)  # steps between two evaluations; 0: only before and after
    samples: int = Field(1, ge=1, le=1000)  # answers of each problem; more than one are drawn at rl's temperature
    kept_answers: int = Field(4, ge=0, le=1000)  # problems whose answers are kept, to be read


class TripWiresConfig(Config):
    """What ends a run that goes wrong, and what then happens; 0 leaves a wire out."""

    action: Literal["rollback", "stop", "off"] = "rollback"  # rollback: once, with a lower rate; the next time it stops
    lr_factor: float = Field(0.5, gt=0, le=1)  # of the rate after a rollback
    window: int = Field(5, ge=1, lt=2**31)  # steps over which a wire takes the mean
    min_entropy: float = Field(0.002, ge=0, le=100)  # nats a token: below, the policy has stopped exploring
    max_kl: float = Field(2.0, ge=0, le=1e9)  # nats a token from the start
    max_length_growth: float = Field(4.0, ge=0, le=1e9)  # times the length of the first steps' answers
    max_cut_share: float = Field(0.5, ge=0, le=1)  # of answers that end at max_tokens, where they did not at the start
    min_z: float = Field(3.3, ge=0, le=1e9)  # standard errors by which reward rises and the second judge's falls
    held_out_p: float = Field(0.01, ge=0, le=1)  # of the paired test by which the held-out score has fallen
    no_spread: int = Field(5, ge=0, lt=2**31)  # steps in a row in which every group was paid alike
    # Trainer against sampler, where both have the same weights: nats of a token's log-probability.
    max_logprob_gap: float = Field(0.0, ge=0, le=1e9)  # of the furthest token of a step
    max_logprob_gap_mean: float = Field(0.0, ge=0, le=1e9)  # rl.max_mismatch stops before a weight moves
    max_logprob_gap_p99: float = Field(1.0, ge=0, le=1e9)
    max_route_flips: float = Field(0.5, ge=0, le=1)  # share of experts that the trainer would choose otherwise


class EnvironmentConfig(Config):
    """Episodes of an environment (``--environment``), and their limits."""

    max_turns: Count = 8  # of the model in an episode
    max_tokens: int = Field(0, ge=0, lt=2**31)  # of an episode behind its question; 0: what the context holds
    step_timeout: float = Field(10.0, gt=0, le=1e6)  # seconds of one reset or step
    cpu_seconds: float = Field(10.0, gt=0, le=1e6)  # CPU seconds of one
    workers: int = Field(4, ge=1, le=1024)  # environments that compute at once


class RLRunConfig(RLConfig):
    """One run of RL: GRPO's keys, and those of ``sprat rl MODEL``."""

    # What the station's runs do otherwise than the defaults here.
    _STATION: ClassVar[dict[str, Any]] = {
        "seeding": "step",
        "loss": "bnpo",
        "held_out": HeldOutConfig(share=0, every=0, kept_answers=0),
        "trip_wires": TripWiresConfig(action="off"),
        "fire_drill": "off",
        "hack_monitor": "off",
        "replay_routes": False,
    }
    lora_lr: ClassVar[float] = 1e-4  # of adapters where nobody says: several times that of whole weights
    # max_mismatch where nobody says and answers are sampled in fewer bits: several times what rounding makes of it.
    rounded_mismatch: ClassVar[dict[str, float]] = {"bfloat16": 0.05, "int4": 0.5}

    steps: Count = 60
    prompts_per_step: Count = 8
    group_size: int = Field(8, ge=2, lt=2**31)
    max_tokens: Count = 128
    lr: float = Field(1e-5, gt=0, le=1e9)
    minibatch: Count = 64
    format_weight: float = Field(0.0, ge=0, le=1e9)
    gate_pass_at_8: float = Field(0.1, ge=0, le=1)
    checkpoint_every: Count = 10

    lora: LoRAConfig | None = None  # train adapters instead of all weights
    verifier: VerifierConfig = VerifierConfig()
    held_out: HeldOutConfig = HeldOutConfig()
    trip_wires: TripWiresConfig = TripWiresConfig()
    gate_problems: Count = 32  # that the gate asks eight times each
    init_state: Literal["fresh", "continue"] = (
        "fresh"  # with init_from: the weights alone, or optimizer and step as well
    )
    keep_checkpoint: bool = False  # the artefact holds weights and optimizer to start from; adapters' always
    # What a group's question and its noise are drawn by: its own number, so that any process can draw it alone, or its
    # step, all of whose groups are then drawn together.
    seeding: Literal["group", "step"] = "group"
    rollout: RolloutConfig = RolloutConfig()
    replay_routes: bool = True  # mixtures of experts are trained with the experts that sampled, see post.rl.batch
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"] = "dapo"  # see post.rl.losses
    sample_std: bool = False  # divide by the deviation of a sample (over G - 1), not of the group as a population
    std_epsilon: float = Field(0.0, ge=0, le=1e9)  # added to that deviation (TRL: 1e-4)
    off_policy_limit: float | None = Field(None, gt=0, le=1e9)  # nats a token: bad answers further off are masked
    overlong_buffer: int = Field(0, ge=0, lt=2**31)  # last tokens before max_tokens over which the reward falls by 1
    environment: EnvironmentConfig = EnvironmentConfig()  # of --environment
    mask_truncated: bool = False  # answers cut off at max_tokens abstain (DAPO's overlong filtering)
    # Further groups are asked until prompts_per_step have spread, at most so many times prompts_per_step; 0: none.
    dynamic_sampling: int = Field(0, ge=0, le=1000)

    fire_drill: Literal["refuse", "accept", "off"] = "refuse"  # a verifier that pays known hacks, before the start
    hack_monitor: Literal["say", "rollback", "stop", "off"] = "say"  # what an alarm does, beside being told

    @model_validator(mode="after")
    def _check_seeding(self) -> Self:
        if self.rollout.workers and self.seeding != "group":
            raise ValueError("rollout.workers draw each group alone: set seeding=group")
        return self

    @model_validator(mode="after")
    def _check_precision(self) -> Self:
        precision = self.rollout.precision
        if precision != "float32" and self.importance_cap is None:
            what = f"rollout.precision={precision} samples from another policy than the one that is trained"
            raise ValueError(f"{what}: correct for it by importance_cap=2, or sample in float32")
        return self

    @model_validator(mode="before")
    @classmethod
    def _set_mismatch(cls, table: Any) -> Any:
        """Let rounded weights differ by what rounding makes of them."""
        rollout = table.get("rollout") if isinstance(table, dict) else None
        precision = rollout.get("precision") if isinstance(rollout, dict) else getattr(rollout, "precision", None)
        if not isinstance(precision, str) or precision not in cls.rounded_mismatch:
            return table
        return {"max_mismatch": cls.rounded_mismatch[precision]} | table

    @model_validator(mode="after")
    def _check_buffer(self) -> Self:
        if self.overlong_buffer > self.max_tokens:
            raise ValueError(f"overlong_buffer ({self.overlong_buffer}) is longer than max_tokens ({self.max_tokens})")
        return self

    @model_validator(mode="after")
    def _check_dynamic_sampling(self) -> Self:
        if self.dynamic_sampling and self.rollout.staleness:
            what = f"dynamic_sampling = {self.dynamic_sampling} and rollout.staleness = {self.rollout.staleness}"
            raise ValueError(
                f"{what}: which groups a step trains is known once its answers are paid, so no later step can be "
                "sampled before; set one of them to 0"
            )
        if self.dynamic_sampling and self.seeding != "group":
            raise ValueError("dynamic_sampling asks groups one by one: set seeding=group")
        return self

    @classmethod
    def from_station(cls, config: RLConfig) -> Self:
        """The run that the quickstart's station makes of its own ``config``."""
        return cls(**config.model_dump(), **cls._STATION)

    @model_validator(mode="before")
    @classmethod
    def _set_lora_rate(cls, table: Any) -> Any:
        """Give adapters their own rate, however they were asked for."""
        if not isinstance(table, dict) or table.get("lora") is None:
            return table
        return {"lr": cls.lora_lr} | table


def load_rl_config(
    *,
    lora: int | None = None,
    recipe: str | Path | None = None,
    table: dict[str, Any] | None = None,
    overrides: Iterable[str] = (),
    where: str = "rl",
) -> RLRunConfig:
    """The config of one run of ``sprat rl MODEL``.

    Args:
        lora: rank of adapters.
        recipe: a TOML file.
        table: keys as a recipe has them, instead of one.
        overrides: ``a.b=value``.
        where: what a fault in ``table`` is said to be in.

    Raises:
        ConfigError: the file is missing, a key is unknown, or a value does not fit.
    """
    return load_with_rank(RLRunConfig, lora, recipe, table, overrides, where)


class RewardInput(Config):
    """How a reward is called, as a run names it among its inputs: the function in its file, or a command's words."""

    call: list[str]


class EnvironmentInput(Config):
    """A built-in environment, as a run names it among its inputs."""

    name: str


class TasksInput(Config):
    """The tasks that are not files, as a run names them among its inputs."""

    names: list[str]

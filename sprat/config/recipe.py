"""What a run is: one frozen config for each station of the pipeline.

Units are in the names or the comments; a rate without a unit is per step. Defaults are those that
the quickstart measured (docs/log.md), so that an empty recipe already works.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sprat.config.base import Config

Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what TOML and the generators hold


class OptimConfig(Config):
    """Muon for hidden matrices, AdamW for the rest (Jordan et al. 2024; Loshchilov and Hutter 2019)."""

    name: Literal["muon", "adamw"] = "muon"
    muon_lr: float = Field(0.012, gt=0, le=1e9)
    adam_lr: float = Field(0.003, gt=0, le=1e9)
    weight_decay: float = Field(0.0, ge=0, le=1e9)
    momentum: float = Field(0.95, ge=0, lt=1)
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    grad_clip: float = Field(1.0, gt=0, le=1e9)
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = Field(20, ge=0, lt=2**31)
    decay_fraction: float = Field(0.3, ge=0, le=1)
    final_lr_fraction: float = Field(0.0, ge=0, le=1)


class LoopConfig(Config):
    """One training loop: ``steps`` batches of ``batch_rows`` rows; how long a row is, its source decides."""

    removed_keys: ClassVar[Mapping[str, str]] = {
        "compile": "it never did anything",
        "seq_len": "rows are as long as the data's (data.seq_len)",
        "seed": "the seed of the whole recipe counts (seed)",
    }

    steps: Count = 400
    batch_rows: Count = 32
    micro_batches: Count = 1
    optim: OptimConfig = OptimConfig()
    init_from: str = ""  # RUN or RUN@STEP: start from that run's checkpoint instead of fresh weights at step 0
    checkpoint_every: Count = 100
    log_every: Count = 10
    mtp_weight: float = Field(0.1, ge=0, le=1e9)
    balance_weight: float = Field(1e-4, ge=0, le=1e9)
    bias_update_speed: float = Field(0.001, ge=0, le=1e9)


class TrainConfig(LoopConfig):
    """A training loop that makes its rows itself: ``seq_len`` tokens each, in an order by ``seed``."""

    removed_keys: ClassVar[Mapping[str, str]] = {"compile": "it never did anything"}

    seq_len: int = Field(128, ge=8, lt=2**31)
    seed: Seed = 0


class SFTConfig(TrainConfig):
    """Supervised fine-tuning: only the assistant's tokens carry loss."""

    demonstrations: Count = 4000
    terse_fraction: float = Field(0.0, ge=0, le=1)  # share of demonstrations with an empty think
    bias_update_speed: float = Field(0.0, ge=0, le=0)  # a narrow mix must not move what pre-training has balanced


class RFTConfig(TrainConfig):
    """Rejection-sampling fine-tuning: SFT on the model's own right answers (RAFT, arXiv 2304.06767)."""

    problems: Count = 4000
    samples: Count = 4  # answers of each problem
    temperature: float = Field(1.0, ge=0.01, le=100)
    thinking: bool = False  # the think tag is opened for every answer; else the model decides
    max_tokens: Count = 96
    bias_update_speed: float = Field(0.0, ge=0, le=0)  # as in SFT


class GRPOConfig(Config):
    """GRPO with rule rewards (DeepSeekMath, arXiv 2402.03300, section 4.1), whatever the seed."""

    removed_keys: ClassVar[Mapping[str, str]] = {"seed": "each of rl.seeds is a run of its own (rl.seeds)"}

    steps: Count = 20
    prompts_per_step: Count = 32
    group_size: int = Field(16, ge=2, lt=2**31)
    max_tokens: Count = 96
    temperature: float = Field(1.0, ge=0.01, le=100)
    lr: float = Field(2e-4, gt=0, le=1e9)
    decay_fraction: float = Field(0.0, ge=0, le=1)  # share of the steps over which the rate falls to 0, at the end
    optim: Literal["adamw", "muon"] = "adamw"
    clip_low: float = Field(0.2, gt=0, le=1e9)
    clip_high: float = Field(0.28, gt=0, le=1e9)
    kl_weight: float = Field(0.0, ge=0, le=1e9)
    kl_bias_correction: bool = False  # weigh k3 by the ratio, so that its gradient is that of KL(policy || start)
    max_mismatch: float = Field(1e-3, gt=0, le=1e9)  # nats: mean gap of trainer and sampler that stops RL
    importance_cap: float | None = Field(None, gt=0, le=1e9)  # truncated importance weights for that gap (2 is usual)
    epochs: Count = 1
    minibatch: Count = 256  # sequences per optimiser step
    format_weight: float = Field(0.1, ge=0, le=1e9)
    reward: str = ""  # the user's own verifier, "module:function" or "file.py:function", paid instead of the judges
    reward_timeout: float = Field(10.0, gt=0, le=1e6)  # seconds for one answer
    normalize_std: bool = True
    init_from: str = ""  # RUN or RUN@STEP: go on from that run's checkpoint
    checkpoint_every: Count = 5
    grad_clip: float = Field(1.0, gt=0, le=1e9)
    gate: bool = True  # check that the policy is ready for RL before it starts
    gate_pass_at_8: float = Field(0.5, ge=0, le=1)


class RLConfig(GRPOConfig):
    """GRPO with its seed."""

    removed_keys: ClassVar[Mapping[str, str]] = {}

    seed: Seed = 0


class DistillConfig(LoopConfig):
    """Teacher to student: ``traces`` (cross-entropy on sampled text), ``logits`` (KL), or both."""

    mode: Literal["traces", "logits", "both"] = "both"
    logits_weight: float = Field(0.5, ge=0, le=1)
    temperature: float = Field(1.0, ge=0.01, le=100)
    problems: Count = 8000
    qat_fraction: float = Field(0.0, ge=0, le=1)  # share of the steps, at the end, with weights rounded as [quant] does


Rounding = Literal["nearest", "gptq"]


class QuantConfig(Config):
    """INT4 or INT8, symmetric, one f16 scale per ``group`` input channels."""

    rounding: Rounding = "nearest"  # "gptq" fits the codes to calibration text (arXiv 2210.17323)
    bits: Literal[4, 8] = 4
    group: Literal[32, 64, 128] = 32
    head_bits: Literal[4, 8, 16] = 8  # embedding and head


class TaskConfig(Config):
    """One task: ``source:name`` with its generator's settings."""

    removed_keys: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("weight", "distinct"), "a task that is only tested has no share of what is trained (data.tasks)"
    )

    name: str  # e.g. "sums" (own) or "reasoning-gym/chain_sum"
    title: str = ""  # unique label in reports; the name when empty
    settings: dict[str, int | float | str | bool | list[str] | list[float]] = {}
    test_problems: Count | None = None  # held-out problems, where they differ from the mix's number


class MixTaskConfig(TaskConfig):
    """One task of the mix that is trained."""

    removed_keys: ClassVar[Mapping[str, str]] = {}

    weight: float = Field(1.0, ge=0, le=1e9)
    distinct: Count | None = None  # worked examples drawn before they repeat; for slow generators


class MoneyConfig(Config):
    """What a core-hour costs and draws. Both are statements of the user's, not measurements."""

    yuan_per_core_hour: float = Field(0.1, ge=0, le=1e9)
    watts_per_core: float = Field(10.0, ge=0, le=1e9)

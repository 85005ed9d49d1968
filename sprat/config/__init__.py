"""What is this model, this run? Frozen, typed, validated configs."""

from sprat.config.base import Config, load, override, parse
from sprat.config.model import LoRAConfig, ModelConfig
from sprat.config.parallel import ParallelPlan
from sprat.config.recipe import (
    DistillConfig,
    GRPOConfig,
    LoopConfig,
    MixTaskConfig,
    MoneyConfig,
    OptimConfig,
    QuantConfig,
    RFTConfig,
    RLConfig,
    Rounding,
    SFTConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "Config",
    "DistillConfig",
    "GRPOConfig",
    "LoRAConfig",
    "LoopConfig",
    "MixTaskConfig",
    "ModelConfig",
    "MoneyConfig",
    "OptimConfig",
    "ParallelPlan",
    "QuantConfig",
    "RFTConfig",
    "RLConfig",
    "Rounding",
    "SFTConfig",
    "TaskConfig",
    "TrainConfig",
    "load",
    "override",
    "parse",
]

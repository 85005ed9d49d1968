"""How does it learn? One step, one loop; optimizers, schedules, router balance, checkpoints, metrics."""

from sprat.train.loop import TrainResult, train
from sprat.train.losses import Loss, LossFn, next_token_loss
from sprat.train.machine import tune_allocator
from sprat.train.parallel import Parallel, ThreadDataParallel

__all__ = [
    "Loss",
    "LossFn",
    "Parallel",
    "ThreadDataParallel",
    "TrainResult",
    "next_token_loss",
    "train",
    "tune_allocator",
]

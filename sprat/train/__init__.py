"""How does it learn? One step, one loop; optimizers, schedules, router balance, checkpoints, metrics."""

from sprat.train.evaluate import bits_per_byte, bits_per_byte_by_domain
from sprat.train.loop import TrainResult, train
from sprat.train.machine import tune_allocator
from sprat.train.objective import Loss, LossFn, next_token_loss
from sprat.train.thread_data_parallel import ThreadDataParallel

__all__ = [
    "Loss",
    "LossFn",
    "ThreadDataParallel",
    "TrainResult",
    "bits_per_byte",
    "bits_per_byte_by_domain",
    "next_token_loss",
    "train",
    "tune_allocator",
]

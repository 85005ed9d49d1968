"""How does it learn? One step, one loop; optimisers, schedules, router balance, checkpoints, metrics."""

from sprat.train.evaluate import bits_per_byte, by_domain
from sprat.train.loop import TrainResult, train
from sprat.train.machine import tune
from sprat.train.objective import Loss, LossFn, next_token
from sprat.train.team import Team

__all__ = ["Loss", "LossFn", "Team", "TrainResult", "bits_per_byte", "by_domain", "next_token", "train", "tune"]

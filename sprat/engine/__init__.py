"""How does it answer? Sequences, scheduler, pool, runner, sampler; ``step`` = schedule → run → settle."""

from sprat.engine.engine import Engine
from sprat.engine.handle import Handle
from sprat.engine.load import load, save
from sprat.engine.sequence import Delta, Output, Sampling, Usage

__all__ = ["Delta", "Engine", "Handle", "Output", "Sampling", "Usage", "load", "save"]

"""How does it answer? Sequences, blocks, scheduler, runner, sampler; ``step`` = schedule → run → settle."""

from sprat.engine.engine import Engine
from sprat.engine.handle import Handle
from sprat.engine.load import load, save
from sprat.engine.sampling import Response, Sampling
from sprat.engine.sequence import Delta, Output, Tenant, Usage
from sprat.engine.stats import Stats

__all__ = [
    "Delta",
    "Engine",
    "Handle",
    "Output",
    "Response",
    "Sampling",
    "Stats",
    "Tenant",
    "Usage",
    "load",
    "save",
]

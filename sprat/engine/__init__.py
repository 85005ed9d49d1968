"""How does it answer? Sequences, blocks, scheduler, runner, sampler; ``step`` = schedule → run → postprocess."""

from sprat.engine.core import Stats
from sprat.engine.engine import Engine
from sprat.engine.request import RequestHandle
from sprat.engine.sampling_params import Response, Sampling
from sprat.engine.sequence import Delta, Output, Tenant, Usage

__all__ = ["Delta", "Engine", "Output", "RequestHandle", "Response", "Sampling", "Stats", "Tenant", "Usage"]

"""How does it answer? Sequences, blocks, scheduler, runner, sampler; ``step`` = schedule → run → postprocess.

The engine itself is looked up on first use (PEP 562): who only writes down what to ask (``Sampling``) needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sprat.engine.sampling_params import Response, Sampling
from sprat.engine.sequence import Delta, Output, Tenant, Usage
from sprat.engine.stats import Stats

if TYPE_CHECKING:
    from sprat.engine.engine import Engine
    from sprat.engine.request import RequestHandle

__all__ = ["Delta", "Engine", "Output", "RequestHandle", "Response", "Sampling", "Stats", "Tenant", "Usage"]


def __getattr__(name: str) -> Any:
    """Import the engine when somebody first asks for it.

    Raises:
        AttributeError: there is no such name.
    """
    if name not in ("Engine", "RequestHandle"):
        raise AttributeError(f"module 'sprat.engine' has no attribute {name!r}")
    from sprat.engine import engine, request

    value = engine.Engine if name == "Engine" else request.RequestHandle
    globals()[name] = value
    return value

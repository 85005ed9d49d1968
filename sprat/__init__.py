"""Sprat: a complete low-cost LLM system in one package.

The stable Python face is ``load``, ``save``, ``Engine`` and ``Sampling``. What else the documents show
(``sprat.quant``, ``sprat.train``, ``sprat.serve.ServeConfig``, ``sprat.model.layers.replace_linears``, the engine's
``Processor``) may be used, and may move between two versions: CHANGELOG.md then says where to. All else is internal.

The four are looked up on first use (PEP 562), so that ``import sprat`` costs nothing and ``sprat --help`` never pays
for torch:

    model, tokenizer = sprat.load("runs/quickstart/quantize")
    engine = sprat.Engine(model, tokenizer)
    print(engine.generate(["3+4+5="], sprat.Sampling(temperature=0))[0].text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sprat.engine import Engine, Sampling
    from sprat.formats.load import load, save

__version__ = "0.1.0"
__all__ = ["Engine", "Sampling", "__version__", "load", "save"]

_HOME = {
    "Engine": "sprat.engine",
    "Sampling": "sprat.engine",
    "load": "sprat.formats.load",
    "save": "sprat.formats.load",
}


def __getattr__(name: str) -> Any:
    """Import the module that holds ``name`` when somebody first asks for it (PEP 562).

    Raises:
        AttributeError: ``name`` is not part of the public face.
    """
    if name not in _HOME:
        raise AttributeError(f"module 'sprat' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public face, for completion."""
    return sorted([*globals(), *_HOME])

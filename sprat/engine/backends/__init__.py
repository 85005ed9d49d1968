"""What computes: the compiled step or torch, and which of them runs a model."""

from __future__ import annotations

from collections.abc import Sequence

from sprat.engine.adapter import Adapter
from sprat.engine.backend import Backend
from sprat.engine.backends.native import FORMATS, NativeBackend
from sprat.engine.backends.torch import TorchBackend
from sprat.errors import EngineError
from sprat.model import Transformer


def select_backend(
    model: Transformer, kv_format: str | None = None, *, consume: bool = False, adapters: Sequence[Adapter] = ()
) -> Backend:
    """The native back end where it is built and takes the model, else torch.

    Args:
        kv_format: how keys and values are stored (see ``Backend``); None leaves it to the back end.
        consume: the native back end may take quantised weights out of the model.
        adapters: see ``Backend``.

    Raises:
        EngineError: no such format, or one that the back end does not have.
    """
    if kv_format is not None and kv_format not in FORMATS:
        raise EngineError(f"no memory format {kv_format!r}", where="kv_format", todo=f"use {', '.join(FORMATS)}")
    reason = NativeBackend.accepts(model)
    if reason is None:
        return NativeBackend(model, kv_format=kv_format, consume=consume, adapters=adapters)
    backend = TorchBackend(model, adapters)
    if kv_format not in (None, backend.kv_format):
        fault = f"torch keeps {backend.kv_format}, not {kv_format}, and the native engine does not run this: {reason}"
        raise EngineError(fault, where="kv_format", todo="leave it out")
    return backend

"""How much memory the cache may take when nobody says."""

from __future__ import annotations

import os

import torch

from sprat.engine.backend import Backend
from sprat.engine.blocks import blocks_for
from sprat.errors import EngineError
from sprat.machine import available_bytes

SHARE = 0.5  # of the memory that is free
CONTEXTS = 2  # as many full contexts as can run together, for them and as much again for what may be asked for later


def choose(backend: Backend, context: int, slots: int, cache_bytes: int | None, device: torch.device) -> int:
    """Blocks at most: what ``cache_bytes`` holds; else twice what all slots need, and at most half of what is free.

    It is a bound and is not taken before it is needed.

    Raises:
        EngineError: ``cache_bytes`` holds no block.
    """
    if cache_bytes is not None:
        if cache_bytes < backend.block_bytes:
            fault = f"cache_bytes is {cache_bytes}, and one block needs {backend.block_bytes}"
            raise EngineError(fault, where="cache_bytes", todo="give more")
        return cache_bytes // backend.block_bytes
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_bytes()
    return max(1, min(CONTEXTS * slots * blocks_for(context), int(free * SHARE) // backend.block_bytes))


def _free_bytes() -> int:
    """Memory that this process could have without swapping and within its control groups, in bytes."""
    free = available_bytes()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if free is None else free

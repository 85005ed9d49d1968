"""How fast? Native CPU kernels in C++ (``src``), without torch's headers, and a torch reference beside each.

``native()`` is the compiled module for this processor, or None: then torch computes everything. The package is built
once for each instruction set that the compiler knew, and the best that the processor runs is loaded; ``SPRAT_ISA``
asks for one by name, and ``SPRAT_NATIVE=0`` for none.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import platform
from pathlib import Path
from typing import Any

from sprat.errors import MachineError

# From the best to the plainest: the module's ending, and the processor's features that it needs (as Linux names them).
_INSTRUCTION_SETS = (
    ("avx512", ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd", "avx512_vnni", "f16c", "fma")),
    ("avx2", ("avx2", "fma", "f16c", "bmi2", "movbe")),
    ("neon", ("asimd", "asimddp")),
    ("portable", ()),
)


@functools.cache
def native() -> Any:
    """The compiled kernels (see ``src/module.cpp``), or None.

    Raises:
        MachineError: ``SPRAT_ISA`` names what was not built or what the processor cannot run.
    """
    if os.environ.get("SPRAT_NATIVE") == "0":
        return None
    wanted = os.environ.get("SPRAT_ISA")
    features = _features()
    for name, required in _INSTRUCTION_SETS:
        if wanted not in (None, name) or not features.issuperset(required):
            continue
        try:
            return importlib.import_module(f"sprat.kernels._native_{name}")
        except ImportError:
            continue
    if wanted:
        todo = f"choose among {', '.join(name for name, _ in _INSTRUCTION_SETS)}, or unset SPRAT_ISA"
        raise MachineError(f"kernels for {wanted!r} are not built or do not run here", where="SPRAT_ISA", todo=todo)
    return None


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The same module as a plain library: what training calls with addresses (see ``ops.py``), or None."""
    module = native()
    if module is None:
        return None
    library = ctypes.CDLL(module.__file__)
    library.cross_entropy.restype = ctypes.c_double
    return library


def unavailable_reason() -> str:
    """One line on why ``native()`` is None."""
    if os.environ.get("SPRAT_NATIVE") == "0":
        return "SPRAT_NATIVE=0 switches the native kernels off"
    return "the native kernels were not built: install a C++17 compiler, then install Sprat again"


def _features() -> set[str]:
    """What the processor can do, as ``/proc/cpuinfo`` names it; empty where that cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        # Apple's processors all have the dot products; others get the portable kernels.
        return {"asimd", "asimddp"} if platform.machine() == "arm64" else set()
    known = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(known.partition(":")[2].split())

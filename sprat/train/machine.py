"""What this machine does to a training step, and how to ask it to do otherwise.

glibc gives every large tensor (above 128 KB at first, above 32 MB once its threshold has adapted) fresh pages from
the kernel and hands them back when it is freed, so each temporary of a step is paid for in page faults: a
[4096, 2048] float tensor cost 40 ms to fill here. ``tune_allocator`` tells the allocator to keep what it has.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path

import torch

from sprat.errors import MachineError

_BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}  # of x86 and ARM, as Linux names them

# Names and numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_KEEP_BYTES = 1 << 30
_PAD_BYTES = 64 << 20


def tune_allocator(threads: int | None = None) -> int:
    """Prepare this process for training; safe to call again. Returns the number of threads that torch will use.

    Args:
        threads: how many; None keeps torch's choice (which follows OMP_NUM_THREADS and the cores we may use).
            Results are bit-same only for equal numbers.
    """
    raise_malloc_thresholds()
    if threads is not None and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return torch.get_num_threads()


@cache
def raise_malloc_thresholds() -> bool:
    """Make glibc serve tensors up to 1 GB from pages that the process keeps; False where there is no glibc.

    Does nothing when the user set ``MALLOC_*`` variables or loaded another allocator.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc" or os.environ.get("LD_PRELOAD"):
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    wanted = ((_M_MMAP_THRESHOLD, _KEEP_BYTES), (_M_TRIM_THRESHOLD, _KEEP_BYTES), (_M_TOP_PAD, _PAD_BYTES))
    return all([mallopt(name, value) == 1 for name, value in (*wanted, (_M_ARENA_MAX, 1))])


def check_device(name: str) -> torch.device:
    """The device ``name`` (``cpu``, ``cuda``, ``cuda:1``), if it is there.

    Raises:
        MachineError: it is not.
    """
    device = torch.device(name)
    count = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        what = f"torch sees {count or 'no'} CUDA device{'' if count == 1 else 's'} here"
        todo = "leave --device out to train on the CPU, or install torch for your GPU"
        raise MachineError(what, where=f"device {name}", todo=todo)
    return device


def resolve_dtype(name: str, device: str) -> str:
    """``name`` (``auto``, ``float32``, ``bfloat16``) with ``auto`` as what ``device`` multiplies fastest.

    Raises:
        MachineError: the device is not there.
    """
    if name != "auto":
        return name
    native = torch.cuda.is_bf16_supported() if check_device(device).type == "cuda" else has_bfloat16()
    return "bfloat16" if native else "float32"


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor multiplies bfloat16 itself."""
    try:
        return not _BFLOAT16_FLAGS.isdisjoint(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False

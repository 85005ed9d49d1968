"""The machine is tuned where that is known to help, and left alone elsewhere."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from sprat.train import machine

_COUNT_FAULTS = """
import resource, torch
from sprat.train import machine
torch.set_num_threads(1)
def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(9 << 20)  # 36 MB: above the most that glibc adapts to
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = fill()
assert machine.raise_malloc_thresholds()
fill()
print(plain, min(fill() for _ in range(3)))  # a small allocation in between may cost one tensor's pages once
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc's allocator only")
def test_large_temporaries_stop_costing_page_faults() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", _COUNT_FAULTS], capture_output=True, text=True, check=True, env=environ
    )
    plain, tuned = map(int, done.stdout.split())
    assert plain > 30000
    assert tuned < 0.1 * plain


def test_the_users_own_allocator_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert machine.raise_malloc_thresholds.__wrapped__() is False


def test_threads_are_set_and_told() -> None:
    assert machine.tune_allocator(1) == 1 == torch.get_num_threads()

"""How much memory the cache may take: what is free, here and within a container's bounds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sprat.engine.cache import blocks
from sprat.machine import available_bytes, total_bytes

MIB = 1 << 20


def machine(root: Path, groups: str) -> Path:
    """A machine with 4,000 MiB free, and this in ``/proc/self/cgroup``."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9000000 kB\nMemAvailable: {4000 * 1024} kB\n")
    (root / "proc/self/cgroup").write_text(groups + "\n")
    return root


def group(root: Path, folder: str, names: tuple[str, str, str], bound: str, used: int, files: int) -> None:
    place = root / "sys/fs/cgroup" / folder
    place.mkdir(parents=True, exist_ok=True)
    (place / names[0]).write_text(bound + "\n")
    (place / names[1]).write_text(f"{used}\n")
    (place / "memory.stat").write_text(f"anon 5\n{names[2]} {files}\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_without_bounds_it_is_what_the_kernel_says(tmp_path: Path) -> None:
    machine(tmp_path, "0::/")
    group(tmp_path, "", V2, "max", 7 * MIB, 0)
    assert available_bytes(tmp_path) == 4000 * MIB
    assert available_bytes(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "line,folder,names",
    [
        ("0::/user/job", "user/job", V2),  # own group
        ("0::/user/job", "user", V2),  # the bound is on a group above
        ("0::/", "", V2),  # a container's name space
        ("4:memory:/box/one\n0::/", "memory/box/one", V1),
        ("4:cpu,memory:/box/one", "memory", V1),  # version 1 in a container: the path is the host's
    ],
)
def test_a_bound_counts_wherever_it_is(tmp_path: Path, line: str, folder: str, names: tuple[str, str, str]) -> None:
    """1,000 MiB allowed, 300 in use, 100 of them pages of files that can go: 800 are left."""
    machine(tmp_path, line)
    group(tmp_path, folder, names, str(1000 * MIB), 300 * MIB, 100 * MIB)
    assert available_bytes(tmp_path) == 800 * MIB
    assert total_bytes(tmp_path) == 1000 * MIB  # what `sprat doctor` shows


def test_a_wide_bound_changes_nothing_and_a_full_group_has_nothing(tmp_path: Path) -> None:
    machine(tmp_path, "3:memory:/a")
    group(tmp_path, "memory/a", V1, str(2**63 - 4096), 5 * MIB, 0)
    assert available_bytes(tmp_path) == 4000 * MIB and total_bytes(tmp_path) == 9_000_000 << 10
    group(tmp_path, "memory", V1, str(10 * MIB), 11 * MIB, 0)
    assert available_bytes(tmp_path) == 0


def test_the_cache_takes_half_of_what_the_bound_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "available_bytes", lambda: 100 * MIB)
    backend = cast(Any, SimpleNamespace(block_bytes=MIB))
    assert blocks.determine_num_blocks(backend, 64 * 4096, 8, None, torch.device("cpu")) == 50

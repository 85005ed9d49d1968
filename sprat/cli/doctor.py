"""``sprat doctor``: what this machine has, what it lacks, and what is lost without it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sprat import __version__
from sprat.cli.verb import Result
from sprat.errors import MachineError
from sprat.kernels import native, unavailable_reason
from sprat.machine import available_bytes, processor_name, total_bytes

GIB = 1 << 30
NEEDED_MEMORY = 3 * GIB  # peak RSS of the quickstart
NEEDED_DISK = 2 * GIB

# What each CPU flag (Linux names) would speed up.
CPU_FLAGS = {
    "avx2": "float32 matrix products",
    "avx512f": "float32 matrix products, twice as wide",
    "avx512_vnni": "INT8 products",
    "avx_vnni": "INT8 products",
    "avx512_bf16": "BF16 products",
    "amx_bf16": "BF16 matrix tiles",
    "amx_int8": "INT8 matrix tiles",
}

# Package -> what is lost without it.
OPTIONAL_PACKAGES = {
    "reasoning-gym": "its procedural tasks (chain_sum, simple_equations, ...)",
    "pycosat": "reasoning-gym's logic puzzles; it compiles C",
    "pyarrow": "reading Parquet",
    "math-verify": "the judge of formulas",
    "huggingface-hub": "models by hub id; local folders still load",
    "transformers": "the parity tests against the Hugging Face models",
    "playwright": "the browser tests",
}

# Back end -> (how torch says that it is there, where Sprat's tests have run on it).
BACKEND_TESTS = {
    "cpu": "x86-64 Linux: every test of every release",
    **dict.fromkeys(("cuda", "rocm", "xpu", "mps", "npu", "tpu"), "untested"),
}


def cpu_facts() -> dict[str, Any]:
    """Model, cores that this process may use, and the flags that matter."""
    flags = set[str]()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = {"model": processor_name(), "machine": platform.machine(), "cores": cores}
    return {**facts, "flags": {name: name in flags for name in CPU_FLAGS}}


def memory_facts() -> dict[str, int]:
    """Bytes of memory in all and free to take, within every bound of a container or a job; 0 where unknown."""
    total = total_bytes() or 0
    available = available_bytes()
    return {"total_bytes": total, "available_bytes": total if available is None else available}


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def torch_facts() -> dict[str, Any]:
    """torch's version, threads, and each back end: present here? tested by us?"""
    import torch

    def present(check: Callable[[], bool]) -> bool:
        try:
            return bool(check())
        except (AttributeError, ImportError, RuntimeError):
            return False

    rocm = getattr(torch.version, "hip", None) is not None
    available = {
        "cpu": True,
        "cuda": not rocm and present(torch.cuda.is_available),
        "rocm": rocm and present(torch.cuda.is_available),
        "xpu": present(lambda: torch.xpu.is_available()),
        "mps": present(lambda: torch.backends.mps.is_available()),
        "npu": installed("torch-npu") is not None,
        "tpu": installed("torch-xla") is not None,
    }
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "backends": {name: {"present": available[name], "tested": BACKEND_TESTS[name]} for name in BACKEND_TESTS},
    }


def collect_facts() -> dict[str, Any]:
    """All facts as one JSON-able object; ``problems`` stop the road, ``losses`` only narrow it."""
    python_ok = sys.version_info >= (3, 11)
    memory = memory_facts()
    free = shutil.disk_usage(Path.cwd()).free
    kernels = native()
    browser = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
    from sprat.tasks.sandbox import sandbox_facts

    packages = {name: installed(name) for name in OPTIONAL_PACKAGES}
    facts: dict[str, Any] = {
        "sprat": __version__,
        "system": platform.platform(),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "torch": torch_facts() if installed("torch") else None,
        "cpu": cpu_facts(),
        "memory": memory,
        "disk": {"path": str(Path.cwd()), "free_bytes": free},
        "kernels": None if kernels is None else kernels.isa,
        "packages": packages,
        "chromium": browser,
        "sandbox": sandbox_facts(),
        "apt": shutil.which("apt-get"),
    }
    problems, losses = [], []
    if not python_ok:
        problems.append(f"Python {platform.python_version()} is too old; 3.11 or newer is needed")
    if facts["torch"] is None:
        problems.append("torch is not installed; pip install torch==2.13.0")
    if 0 < memory["available_bytes"] < NEEDED_MEMORY:
        problems.append(f"{memory['available_bytes'] / GIB:.1f} GiB of memory are free; the quickstart needs up to 3")
    if free < NEEDED_DISK:
        problems.append(f"{free / GIB:.1f} GiB of disk are free here; the quickstart needs 2")
    losses += [f"no {name}: {consequence}" for name, consequence in OPTIONAL_PACKAGES.items() if packages[name] is None]
    if kernels is None:
        consequence = "torch computes answers, several times slower, and trains at about three quarters of the speed"
        losses.append(f"no native kernels ({unavailable_reason()}): {consequence}")
    if browser is None:
        losses.append("no chromium: the browser tests skip")
    if not facts["sandbox"]["ready"]:
        losses.append(f"no sandbox ({facts['sandbox']['problem']}): the judge of code refuses to run it")
    if facts["apt"] is None:
        losses.append("no apt-get: the default text is Python's own library alone; --text DIR takes yours")
    return {**facts, "problems": problems, "losses": losses, "ok": not problems}


def _sandbox_line(facts: dict[str, Any]) -> str:
    """What holds code that is judged, in words."""
    if not facts["ready"]:
        return "none"
    landlock = f"Landlock {facts['landlock']}" if facts["landlock"] else "no Landlock"
    user = f"user {facts['uid']}" if facts["uid"] else "a user namespace"
    return f"bubblewrap, {user}, seccomp, {landlock}"


def facts_table(facts: dict[str, Any]) -> Any:
    """The facts as a rich table for a person."""
    from rich.table import Table

    grid = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    torch, cpu, memory = facts["torch"], facts["cpu"], facts["memory"]
    grid.add_row("sprat", f"{facts['sprat']} on Python {facts['python']['version']}, {facts['system']}")
    if torch:
        grid.add_row("torch", f"{torch['version']}, {torch['threads']} threads, {torch['cpu_capability']}")
    grid.add_row("processor", f"{cpu['model']}, {cpu['cores']} cores")
    grid.add_row("flags", ", ".join(f"{name} {'yes' if on else 'no'}" for name, on in cpu["flags"].items()))
    grid.add_row("memory", f"{memory['available_bytes'] / GIB:.1f} of {memory['total_bytes'] / GIB:.1f} GiB free")
    grid.add_row("disk", f"{facts['disk']['free_bytes'] / GIB:.1f} GiB free in {facts['disk']['path']}")
    grid.add_row("kernels", facts["kernels"] or "none")
    grid.add_row("chromium", facts["chromium"] or "none")
    grid.add_row("sandbox", _sandbox_line(facts["sandbox"]))
    grid.add_row("apt-get", facts["apt"] or "none")
    for name, row in (torch or {"backends": {}})["backends"].items():
        grid.add_row(f"back end {name}", f"{'here' if row['present'] else 'not here'}; {row['tested']}")
    for loss in facts["losses"]:
        grid.add_row("without", loss)
    for problem in facts["problems"]:
        grid.add_row("[red]problem[/red]", problem)
    grid.add_row("verdict", "ready" if facts["ok"] else "not ready")
    return grid


def doctor() -> Result:
    """Show what this machine has and lacks; exit code 9 if the quickstart could not run."""
    facts = collect_facts()
    return Result(facts, facts_table(facts), 0 if facts["ok"] else MachineError.exit_code)

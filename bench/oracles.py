"""Make the foreign engines that `bench/` measures against, each in a virtual environment of its own beside this folder:
`.oracles/llama`, with llama.cpp compiled here for this very processor, and `.oracles/trl`, with Hugging Face's TRL.

`llama-cpp-python` comes from the registry as source and is compiled with native flags (about five minutes on two
cores); a wheel would be built for some other machine and llama.cpp would look slower than it is. Nothing of it enters
Sprat's own environment. transformers, the other oracle, is in the development environment already.

    python -m bench.oracles [--only llama|trl] [--jobs 2] [--where .oracles]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHERE = ROOT / ".oracles"
BINDING = "llama-cpp-python==0.3.36"
BESIDE = ("numpy", "gguf==0.19.0", "tokenizers")
TORCH, TORCH_INDEX = (
    "torch==2.13.0",
    "https://download.pytorch.org/whl/cpu",
)  # the very torch that Sprat is measured with
TRL = ("trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0")
FLAGS = "-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release -DLLAVA_BUILD=OFF"


def python_of(name: str, where: Path = WHERE) -> Path:
    """The interpreter of oracle ``name``."""
    return where / name / "bin" / "python"


def make_llama(where: Path = WHERE, jobs: int = 2) -> Path:
    """The interpreter that can import ``llama_cpp``; builds it if it is not there.

    Raises:
        subprocess.CalledProcessError: no compiler, no registry, or the build failed; pip has said why.
    """
    python = python_of("llama", where)
    if python.is_file() and _imports(python, "llama_cpp", "gguf"):
        return python
    venv.create(where / "llama", with_pip=True, clear=True)
    environment = {**os.environ, "CMAKE_ARGS": FLAGS, "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}
    pip = ["nice", "-n", "15", str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *BESIDE], check=True, env=environment)
    subprocess.run([*pip, "--no-binary", "llama-cpp-python", BINDING], check=True, env=environment)
    return python


def make_trl(where: Path = WHERE) -> Path:
    """The interpreter that can import ``trl`` and what it needs, torch for CPUs included; makes it if it is not there.

    Raises:
        subprocess.CalledProcessError: no registry, or pip found no way; it has said why.
    """
    python = python_of("trl", where)
    if python.is_file() and _imports(python, "trl", "peft", "datasets"):
        return python
    venv.create(where / "trl", with_pip=True, clear=True)
    pip = ["nice", "-n", "15", str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--extra-index-url", TORCH_INDEX, TORCH + "+cpu"], check=True)
    subprocess.run([*pip, TORCH, *TRL], check=True)
    return python


def _imports(python: Path, *modules: str) -> bool:
    """Whether ``python`` can import all ``modules``."""
    done = subprocess.run([str(python), "-c", f"import {', '.join(modules)}"], capture_output=True, check=False)
    return done.returncode == 0


def main() -> int:
    """Make what is missing and say where it is."""
    parser = argparse.ArgumentParser(description="build the engines that the benchmarks measure against")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="parallel compiler runs")
    parser.add_argument("--where", type=Path, default=WHERE)
    parser.add_argument("--only", choices=("llama", "trl"), help="make this one and no other")
    given = parser.parse_args()
    if given.only != "trl":
        print(make_llama(given.where, given.jobs))
    if given.only != "llama":
        print(make_trl(given.where))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Make the foreign engines that `bench/` measures against: `.oracles/llama` beside this folder, a virtual environment
of its own with llama.cpp compiled here for this very processor.

`llama-cpp-python` comes from the registry as source and is compiled with native flags (about five minutes on two
cores); a wheel would be built for some other machine and llama.cpp would look slower than it is. Nothing of it enters
Sprat's own environment. transformers, the other oracle, is in the development environment already.

`.oracles/llmcompressor` holds llm-compressor without what it depends on (it asks for an older transformers): torch and
the rest are those of the environment that makes it, so both round with the very same products.

    python -m bench.oracles [--jobs 2] [--where .oracles]
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
COMPRESSOR = ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "loguru==0.7.3", "psutil")
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


def make_llmcompressor(where: Path = WHERE) -> Path:
    """The interpreter that can import ``compressed_tensors`` and holds llm-compressor; installs them if need be.

    Raises:
        subprocess.CalledProcessError: no registry; pip has said why.
    """
    python = python_of("llmcompressor", where)
    if python.is_file() and _imports(python, "torch", "compressed_tensors.quantization"):
        return python
    venv.create(where / "llmcompressor", with_pip=True, clear=True)
    pip = ["nice", "-n", "15", str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, *COMPRESSOR], check=True)
    [site] = (where / "llmcompressor" / "lib").glob("python*/site-packages")
    own = [path for path in sys.path if path.endswith("site-packages")]
    (site / "sprat-development.pth").write_text("\n".join(own) + "\n", encoding="utf-8")
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
    given = parser.parse_args()
    print(make_llmcompressor(given.where))
    print(make_llama(given.where, given.jobs))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Make the foreign engines that `bench/` and `tests/parity` measure against, each an environment of its own beside this
folder: `.oracles/llama` with llama.cpp compiled here for this very processor, `.oracles/lm-eval` with the harness.

`llama-cpp-python` comes from the registry as source and is compiled with native flags (about five minutes on two
cores); a wheel would be built for some other machine and llama.cpp would look slower than it is. Nothing of it enters
Sprat's own environment. transformers, the other oracle, is in the development environment already. lm-eval sees that
environment behind its own packages, so that both of its models compute with the same torch.

    python -m bench.oracles [llama] [lm-eval] [--jobs 2] [--where .oracles]
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
HARNESS = ("lm-eval[api,hf]>=0.4.11,<0.5",)
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


def make_lm_eval(where: Path = WHERE) -> Path:
    """The interpreter that can import ``lm_eval`` and ``sprat``; makes it if it is not there.

    Raises:
        subprocess.CalledProcessError: no registry, or the installation failed; pip has said why.
    """
    python = python_of("lm-eval", where)
    if python.is_file() and _imports(python, "lm_eval.models.huggingface", "sprat"):
        return python
    venv.create(where / "lm-eval", with_pip=True, clear=True)
    [site] = (where / "lm-eval").glob("lib/python*/site-packages")
    # Behind its own packages, so that pip finds torch there and does not fetch another.
    behind = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
    (site / "zz-development.pth").write_text("\n".join(behind) + "\n", encoding="utf-8")
    subprocess.run(["nice", "-n", "15", str(python), "-m", "pip", "install", "--quiet", *HARNESS], check=True)
    return python


def _imports(python: Path, *modules: str) -> bool:
    """Whether ``python`` can import all ``modules``."""
    done = subprocess.run([str(python), "-c", f"import {', '.join(modules)}"], capture_output=True, check=False)
    return done.returncode == 0


def main() -> int:
    """Make what is missing and say where it is."""
    parser = argparse.ArgumentParser(description="build the engines that the benchmarks measure against")
    parser.add_argument("names", nargs="*", choices=("llama", "lm-eval"), help="which; all if left out")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="parallel compiler runs")
    parser.add_argument("--where", type=Path, default=WHERE)
    given = parser.parse_args()
    if not given.names or "llama" in given.names:
        print(make_llama(given.where, given.jobs))
    if not given.names or "lm-eval" in given.names:
        print(make_lm_eval(given.where))
    return 0


if __name__ == "__main__":
    sys.exit(main())

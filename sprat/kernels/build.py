"""The C++ beside this file as a shared library: compiled on first use, for this very processor, and kept.

Two seconds once, then nothing. A compiler is optional: without one (or with ``SPRAT_NATIVE=0``) ``library`` is None
and callers use torch. The file's name is a digest of source, flags, compiler and processor, so that a home that two
kinds of machines share serves both. Fast-math is taken only as far as NaN and infinity survive, since the trainer
must see them, and without the start-up code that would flush denormals in the whole process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = [Path(__file__).with_name(name) for name in ("fused.cpp", "attention.cpp", "exponential.h")]
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-fPIC", "-shared"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"]
WIDE = ["-mprefer-vector-width=512"]  # GCC's and Clang's name; compilers that lack it are asked without
SECONDS = 60  # that a compiler may take


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no compiler, or it fails, or ``SPRAT_NATIVE=0``."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None or os.environ.get("SPRAT_NATIVE") == "0":
        return None
    parts = (*(source.read_bytes() for source in SOURCES), " ".join(FLAGS).encode(), compiler.encode(), _processor())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    for folder in (_cache(), _shared()):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                continue  # somebody else's folder under our name: nothing is loaded from there
            found = folder / f"{name}.so"
            if found.exists() or _compile(compiler, found):
                return ctypes.CDLL(str(found))
        except OSError:
            continue
    return None


def _compile(compiler: str, target: Path) -> bool:
    """Compile to ``target``, which appears whole or not at all."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        for flags in (FLAGS + WIDE, FLAGS):
            sources = [str(source) for source in SOURCES if source.suffix == ".cpp"]
            command = [compiler, *flags, *sources, "-o", temporary]
            done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
            if done.returncode == 0:
                os.replace(temporary, target)
                return True
    except subprocess.TimeoutExpired:
        pass
    finally:
        Path(temporary).unlink(missing_ok=True)
    return False


def _cache() -> Path:
    """Where the user's caches are; a user without a home has none but the temporary folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sprat"
    except RuntimeError:
        return _shared()


def _shared() -> Path:
    """A folder of this user's among everybody's temporary ones."""
    return Path(tempfile.gettempdir()) / f"sprat-{os.getuid()}"


def _processor() -> bytes:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    known = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {known}".encode()

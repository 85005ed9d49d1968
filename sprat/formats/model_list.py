"""Which models are on this disk: those in the caches, and models and runs under a folder; what they are and take up.

Only headers are read: config.json, the headers of safetensors and GGUF files. A file that cannot be read is listed with
the reason. Only what lies in a cache can be removed (``remove_model``), by the name under which it is listed, and not
while a process has it loaded.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError, MachineError, SpratError
from sprat.files.lock import is_held
from sprat.formats import fetch, gguf, hf, hub, quantized
from sprat.formats.gguf.header import read_header
from sprat.formats.safetensors import Shards, read_json_object
from sprat.model import count_parameters

_REPOSITORY = "models--"
_DEPTH = 4  # folders below the one that is given


@dataclass(frozen=True)
class ModelEntry:
    """One model.

    Attributes:
        name: what ``sprat run`` takes: a name of the catalogue, a hub's id, or a path.
        path: the file or folder that is loaded.
        architecture: as its file says.
        parameters: all of them, MTP modules left out.
        kind: of most weights: ``float32``, ``bfloat16``, ``int4``, ``q4_0`` …
        size: bytes on disk, of a hub's repository those of all its revisions.
        last_used: seconds since 1970: of a model in a cache when it was loaded last, else as the file system knows it.
        cached: whether it lies in a cache, from which it can be removed.
        fault: why it cannot be read; empty where it can.
    """

    name: str
    path: Path
    architecture: str
    parameters: int
    kind: str
    size: int
    last_used: float
    cached: bool
    fault: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "path": str(self.path)}


def list_models(*folders: str | Path) -> list[ModelEntry]:
    """What is in the caches, by name, then the models, GGUF files and finished runs under each of ``folders``.

    Raises:
        CheckpointError: there is no such folder.
    """
    entries = [_entry(name, path, _disk_usage(place), cached=True) for name, path, place in _cached_models()]
    for folder in map(Path, folders):
        if not folder.exists():
            raise CheckpointError("no such folder", where=str(folder), todo="give a folder of models or runs")
        entries += [_entry(str(path), path, _disk_usage(path), cached=False) for path in _find_models(folder, _DEPTH)]
    return entries


def remove_model(name: str, *, confirm: Callable[[ModelEntry], bool] = lambda entry: True) -> ModelEntry | None:
    """Remove what is cached under ``name``, of a hub's repository every revision; None where ``confirm`` says no.

    Raises:
        CheckpointError: no model of that name is in a cache.
        MachineError: a process uses it, or the disk is closed to us.
    """
    cached = {cached_name: (path, place) for cached_name, path, place in _cached_models()}
    if name not in cached:
        there = f"there is {', '.join(cached)}" if cached else "the cache is empty"
        raise CheckpointError("no model of this name is in the cache", where=name, todo=there)
    path, place = cached[name]
    entry = _entry(name, path, _disk_usage(place), cached=True)
    files = [place] if place.is_file() else sorted(place.glob("snapshots/*/config.json"))
    if any(is_held(file) for file in files):
        raise MachineError("a process uses this model", where=name, todo="end it first")
    if not confirm(entry):
        return None
    try:
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()
            place.with_name(f"{place.name}.checked").unlink(missing_ok=True)
    except OSError as error:
        raise MachineError(f"cannot remove it: {error.strerror}", where=str(place), todo="check its rights") from None
    return entry


def _cached_models() -> Iterator[tuple[str, Path, Path]]:
    """(name, what is loaded, what takes up the disk) of each model in a cache; links are never followed out of it."""
    for name in fetch.CATALOG:
        path = fetch.cached_model_path(name)
        if path.is_file() and not path.is_symlink():
            yield name, path, path
    for repository in sorted(hub.cache_folder().glob(f"{_REPOSITORY}*")):
        snapshots = [path for path in repository.glob("snapshots/*") if (path / "config.json").is_file()]
        if snapshots and not repository.is_symlink():
            newest = max(snapshots, key=lambda path: (path / "config.json").stat().st_atime)
            yield repository.name.removeprefix(_REPOSITORY).replace("--", "/"), newest, repository


def _find_models(folder: Path, depth: int) -> Iterator[Path]:
    """Models and finished runs at or below ``folder``, of a run its own folder; set-aside runs are left out."""
    if folder.is_file():
        if gguf.is_gguf(folder):
            yield folder
    elif (folder / "config.json").is_file() or (folder / "artefact" / "config.json").is_file():
        yield folder
    elif depth:
        for path in sorted(folder.iterdir()):
            if not path.name.startswith(".") and ".old-" not in path.name and not path.is_symlink():
                yield from _find_models(path, depth - 1)


def _entry(name: str, path: Path, size: int, *, cached: bool) -> ModelEntry:
    """The model at ``path``, a GGUF file or a folder."""
    architecture, parameters, kind, fault = "", 0, "", ""
    folder = path if path.is_file() or (path / "config.json").is_file() else path / "artefact"
    marker = path if path.is_file() else folder / "config.json"
    used = marker.stat()
    try:
        architecture, parameters, kind = _describe_gguf(path) if path.is_file() else _describe_folder(folder)
    except SpratError as error:
        fault = error.what
    with suppress(OSError):  # to be listed is no use
        os.utime(marker, ns=(used.st_atime_ns, used.st_mtime_ns))
    return ModelEntry(name, path, architecture, parameters, kind, size, used.st_atime, cached, fault)


def _describe_gguf(path: Path) -> tuple[str, int, str]:
    header = read_header(path)
    kinds = Counter[str]()
    for info in header.tensors.values():
        kinds[info.kind.name.lower()] += math.prod(info.shape)
    return str(header.metadata.get("general.architecture", "")), kinds.total(), _most(kinds)


def _describe_folder(folder: Path) -> tuple[str, int, str]:
    table = read_json_object(folder / "config.json")
    architecture = str(table.get("model_type", ""))
    shapes = Counter[str]()
    for name in hf.weight_files(folder):
        for info in Shards([name]).entries.values():
            shapes[str(info.dtype).removeprefix("torch.")] += math.prod(info.shape)
    kind, parameters = _most(shapes), shapes.total()
    if quantized.is_quantized(folder):
        kind = quantized.describe(folder)
    table.pop("quantization_config", None)
    try:
        parameters = count_parameters(ModelConfig.from_hf(table, where=str(folder))).total
    except SpratError:
        if quantized.is_quantized(folder):
            raise
    return architecture, parameters, kind


def _most(kinds: Counter[str]) -> str:
    """The kind of most weights."""
    return kinds.most_common(1)[0][0] if kinds else ""


def _disk_usage(path: Path) -> int:
    """Bytes of the files at ``path``, each link counted as itself."""
    if path.is_file():
        return path.stat().st_size
    return sum(Path(parent, name).lstat().st_size for parent, _, names in os.walk(path) for name in names)

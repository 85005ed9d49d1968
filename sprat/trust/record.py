"""What ``run.json`` and the ledger say of a run, and how to read it back."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from sprat.config import Config, MoneyConfig
from sprat.errors import TrustError
from sprat.trust import digest

RECORDS = ("recipe.toml", "metrics.jsonl")
Input = Path | str | Config  # a run folder, another folder, a file; a bare SHA-256 in hex; settings


def describe(path: Input, road: Path) -> dict[str, Any]:
    """An input as it is written in ``run.json``: its digest, and its path from the road folder or the settings.

    A path outside the road folder is not written down (it says more about the machine than about the run);
    its last part is, as ``outside``.

    Raises:
        TrustError: it is missing, or a run that is not finished or whose artefact was altered.
    """
    if isinstance(path, Config):
        return {"digest": path.digest(), "settings": path.model_dump(mode="json")}
    if isinstance(path, str) and len(path) == 64 and set(path) <= set("0123456789abcdef"):
        return {"digest": path}
    path = Path(path)
    if (path / "run.json").is_file():
        found = digest.tree(path / "artefact")
        if (read_json(path / "run.json") or {}).get("artefact_digest") != found:
            raise TrustError("this input was altered after it was made", where=str(path), todo="make it again")
    elif (path / "open.json").is_file():
        raise TrustError("this input is not finished", where=str(path), todo="finish that run first")
    else:
        found = digest.tree(path, follow=True) if path.is_dir() else digest.file(path)
    if path.resolve().is_relative_to(road.resolve()):
        return {"digest": found, "path": path.resolve().relative_to(road.resolve()).as_posix()}
    return {"digest": found, "outside": path.name}


def pulse(folder: Path) -> tuple[int, int]:
    """How far the open run in ``folder`` is: steps done and steps in all; (0, 0) where there is nothing to tell."""
    spent = read_json(folder / "spent.json") or {}
    return int(spent.get("step", 0)), int(spent.get("steps", 0))


def entry_body(folder: Path, road: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What the ledger says of a finished run; ``record`` is the content of its ``run.json``."""
    return {
        "run": name_of(folder, road),
        "stage": record["stage"],
        "artefact_digest": record["artefact_digest"],
        "recipe_digest": record["recipe_digest"],
        "inputs_digest": digest.value({name: item["digest"] for name, item in record["inputs"].items()}),
        "record_digest": digest.file(folder / "run.json"),
        "device_seconds": record["device_seconds"],
        "nano_yuan": record["nano_yuan"],
    }


def name_of(folder: Path, road: Path) -> str:
    """The path of a run's folder from the road's."""
    return Path(os.path.relpath(folder.resolve(), road.resolve())).as_posix()


def content_of(folder: Path) -> str:
    """The digest of all that lies in a run's folder; empty where it holds what cannot be digested."""
    try:
        return digest.tree(folder)
    except TrustError:
        return ""


def find(road: str | Path) -> list[Path]:
    """The folders of finished runs under ``road`` in the order of their finish; set-aside ones left out."""
    found: list[tuple[str, str, Path]] = []
    waiting = [Path(road)]
    while waiting:
        folder = waiting.pop()
        if (folder / "run.json").is_file():
            record = read_json(folder / "run.json") or {}
            found.append((str(record.get("finished")), str(folder), folder))
        elif not (folder / "open.json").is_file():
            waiting += [p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and ".old-" not in p.name]
    return [path for _, _, path in sorted(found)]


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``; a torn last line is left out."""
    try:
        with digest.plain(Path(folder) / "metrics.jsonl") as stream:
            content = stream.read()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def energy(device_seconds: float, money: MoneyConfig) -> float:
    """Joules, estimated as CPU seconds times the stated watts of a core."""
    return round(device_seconds * money.watts_per_core, 3)


def price(device_seconds: float, money: MoneyConfig) -> int:
    """Nano-yuan for CPU seconds at the stated price of a core-hour.

    >>> price(3600.0, MoneyConfig(yuan_per_core_hour=0.1))
    100000000
    """
    return round(device_seconds * money.yuan_per_core_hour * 1e9 / 3600)


def versions() -> dict[str, str]:
    """The versions of what computed the run, and its machine's kind and number of threads."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}
    for name in ("sprat", "torch", "numpy", "tokenizers", "safetensors", "reasoning-gym"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "torch" in sys.modules:
        found["threads"] = str(sys.modules["torch"].get_num_threads())
    return found


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object at ``path``; None where there is none or it cannot be read, or says a key twice."""
    try:
        with digest.plain(path) as stream:
            content = json.loads(stream.read(), object_pairs_hook=_once)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, TrustError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different: of two alike, readers would choose differently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def plain(value: Any) -> Any:
    """``value`` as JSON has it: keys as text, tuples as lists, array scalars as numbers, no NaN."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

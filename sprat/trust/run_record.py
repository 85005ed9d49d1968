"""What ``run.json`` and the ledger say of a run, and how to read it back."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from sprat.config import Config, MoneyConfig
from sprat.errors import TrustError
from sprat.files import digest
from sprat.files.json import read_json
from sprat.files.regular_file import read_bytes

RECORD_FILES = ("recipe.toml", "metrics.jsonl")
Input = Path | str | Config  # a run folder, another folder, a file; a bare SHA-256 in hex; settings


def describe_input(path: Input, pipeline_folder: Path) -> dict[str, Any]:
    """An input as it is written in ``run.json``: its digest, and its path from the pipeline folder or the settings.

    A path outside the pipeline folder is not written down (it says more about the machine than about the run);
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
        input_digest = digest.of_folder(path / "artefact")
        if (read_json(path / "run.json") or {}).get("artefact_digest") != input_digest:
            raise TrustError("this input was altered after it was made", where=str(path), todo="make it again")
    elif (path / "open.json").is_file():
        raise TrustError("this input is not finished", where=str(path), todo="finish that run first")
    else:
        input_digest = digest.of_folder(path, follow=True) if path.is_dir() else digest.of_file(path)
    if path.resolve().is_relative_to(pipeline_folder.resolve()):
        return {"digest": input_digest, "path": path.resolve().relative_to(pipeline_folder.resolve()).as_posix()}
    return {"digest": input_digest, "outside": path.name}


def read_progress(folder: Path) -> tuple[int, int]:
    """How far the open run in ``folder`` is: steps done and steps in all; (0, 0) where there is nothing to tell."""
    spent = read_json(folder / "spent.json") or {}
    return int(spent.get("step", 0)), int(spent.get("steps", 0))


def ledger_entry(folder: Path, pipeline_folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What the ledger says of a finished run; ``record`` is the content of its ``run.json``."""
    return {
        "run": run_name(folder, pipeline_folder),
        "stage": record["stage"],
        "artefact_digest": record["artefact_digest"],
        "recipe_digest": record["recipe_digest"],
        "inputs_digest": digest.of_json({name: item["digest"] for name, item in record["inputs"].items()}),
        "record_digest": digest.of_file(folder / "run.json"),
        "device_seconds": record["device_seconds"],
        "nano_yuan": record["nano_yuan"],
    }


def run_name(folder: Path, pipeline_folder: Path) -> str:
    """The path of a run's folder from the pipeline's."""
    return Path(os.path.relpath(folder.resolve(), pipeline_folder.resolve())).as_posix()


def run_folder_digest(folder: Path) -> str:
    """The digest of all that lies in a run's folder; empty where it holds what cannot be digested."""
    try:
        return digest.of_folder(folder)
    except TrustError:
        return ""


def find_runs(pipeline_folder: str | Path) -> list[Path]:
    """The folders of finished runs under ``pipeline_folder`` in the order of their finish; set-aside ones left out."""
    runs: list[Path] = []
    pending = [Path(pipeline_folder)]
    while pending:
        folder = pending.pop()
        if (folder / "run.json").is_file():
            runs.append(folder)
        elif not (folder / "open.json").is_file():
            pending += [p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and ".old-" not in p.name]
    return sorted(runs, key=finish_order)


def finish_order(folder: Path) -> tuple[str, str]:
    """By what finished runs are sorted: the time of their finish, then the folder."""
    return str((read_json(folder / "run.json") or {}).get("finished")), str(folder)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``; a torn last line is left out."""
    return [json.loads(line) for line in read_bytes(Path(folder) / "metrics.jsonl").split(b"\n")[:-1]]


def energy_joules(device_seconds: float, money: MoneyConfig) -> float:
    """Joules, estimated as CPU seconds times the stated watts of a core."""
    return round(device_seconds * money.watts_per_core, 3)


def price_nano_yuan(device_seconds: float, money: MoneyConfig) -> int:
    """Nano-yuan for CPU seconds at the stated price of a core-hour.

    >>> price_nano_yuan(3600.0, MoneyConfig(yuan_per_core_hour=0.1))
    100000000
    """
    return round(device_seconds * money.yuan_per_core_hour * 1e9 / 3600)


def versions() -> dict[str, str]:
    """The versions of what computed the run, and its machine's kind and number of threads."""
    result = {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}
    for name in ("sprat", "torch", "numpy", "tokenizers", "safetensors", "reasoning-gym"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "torch" in sys.modules:
        result["threads"] = str(sys.modules["torch"].get_num_threads())
    return result

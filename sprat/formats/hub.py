"""A model of a hub by its id, ``org/name`` or ``org/name@revision``: safetensors, JSON and templates, nothing else.

``huggingface_hub`` (the extra ``hub``) downloads into the cache that it shares with other programs. What is asked for
is listed here, so no pickle and no code ever comes along, and nothing of a repository's folders (exports, checkpoints).

What lies whole in the cache is taken as it is, and the network is not asked: a model does not change under a run. A
snapshot's folder is called by its commit, which runs note of their input; ``@commit`` asks for that very one. Nothing
here needs torch.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sprat.errors import CheckpointError, MachineError
from sprat.files.json import read_json

INDEX = "model.safetensors.index.json"
ALLOWED_FILES = ["*.json", "*.jinja", "*.safetensors"]
_IN_FOLDERS = ["*/*"]
_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_MAX_REASON_CHARS = 200


def parse_id(text: str) -> tuple[str, str | None] | None:
    """(``org/name``, revision) of a hub's id; None where ``text`` is none.

    >>> parse_id("org/fish@v1"), parse_id("org/fish"), parse_id("/org/fish")
    (('org/fish', 'v1'), ('org/fish', None), None)
    """
    match = _ID.fullmatch(text)
    return None if match is None else (match[1], match[2])


def resolve(id_or_path: str | Path) -> Path:
    """A local folder: ``id_or_path`` itself, or the hub's snapshot of that id (see ``download_snapshot``).

    Raises:
        CheckpointError: no such folder, and no such id.
        MachineError: the hub cannot be asked.
    """
    path = Path(id_or_path).expanduser()
    if path.is_dir():
        return path
    hub_id = parse_id(str(id_or_path))
    if hub_id is None or path.parent.is_dir():
        raise CheckpointError("no such model folder", where=str(id_or_path), todo="give a folder with a config.json")
    return download_snapshot(*hub_id)


def cache_folder() -> Path:
    """Where ``huggingface_hub`` keeps repositories: ``$HF_HUB_CACHE``, ``$HF_HOME/hub``, or below ``~/.cache``."""
    if place := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(place).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{base}/huggingface").expanduser() / "hub"


def download_snapshot(repo_id: str, revision: str | None = None) -> Path:
    """The folder of ``repo_id`` at ``revision`` (its main branch): from the cache, else downloaded into it.

    Raises:
        CheckpointError: the hub has no such repository or revision, or it holds no model that we read.
        MachineError: ``huggingface_hub`` is not installed, or nothing is cached and the hub cannot be reached.
    """
    name = repo_id if revision is None else f"{repo_id}@{revision}"
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        todo = "pip install 'sprat[hub]', or give a local folder"
        raise MachineError("a hub's id needs the package huggingface_hub", where=name, todo=todo) from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    patterns = {"allow_patterns": ALLOWED_FILES, "ignore_patterns": _IN_FOLDERS}
    snapshot: Callable[..., str]
    snapshot = partial(hub.snapshot_download, repo_id, revision=revision, cache_dir=cache_folder(), **patterns)
    try:
        folder = Path(snapshot(local_files_only=True))
        if not missing_files(folder):
            return folder
    except (OSError, ValueError):  # not there, or not all of it
        pass
    try:
        folder = Path(snapshot())
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        todo = "check the id, and for a gated model that you may read it (HF_TOKEN)"
        raise CheckpointError(f"the hub does not give it: {_reason(error)}", where=name, todo=todo) from None
    except Exception as error:  # of the network, by many names
        todo = "check the network, or give a local folder"
        raise MachineError(
            f"not in the cache, and the hub cannot be reached: {_reason(error)}", where=name, todo=todo
        ) from None
    if missing := missing_files(folder):
        todo = "name a repository in Hugging Face's layout with safetensors"
        raise CheckpointError(f"the repository has no {missing[0]}", where=name, todo=todo)
    return folder


def missing_files(folder: Path) -> list[str]:
    """What ``folder`` lacks of a model: config.json, or the one file of weights (else those that its index names)."""
    weights = ["model.safetensors"]
    if (folder / INDEX).is_file() and not (folder / weights[0]).is_file():
        table = (read_json(folder / INDEX) or {}).get("weight_map")
        weights = sorted({str(file) for file in table.values()}) if isinstance(table, dict) else weights
    return [name for name in ("config.json", *weights) if not (folder / name).is_file()]


def _reason(error: Exception) -> str:
    """The first line of what a foreign error says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:_MAX_REASON_CHARS].rstrip(".")

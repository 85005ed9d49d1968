# size: to write, find, check and restore checkpoints are one noun
"""Checkpoints that are whole or absent, and from which training goes on to the same bits.

    checkpoints/step-00000100/
      model.safetensors        parameters that are trained, and buffers (router biases)
      optimiser.safetensors    momenta, moments, counts
      state.json               step, what the loop needs, the digests of the two files and of what is frozen

Parameters that want no gradient (the base under adapters) are what they were at the start, so they are not written a
second time: a checkpoint goes on over the same base alone, which its digest tells.

A checkpoint is written into a hidden folder beside its place, synced, and renamed: a kill at any moment leaves
either all of it or a hidden folder that the next save sweeps away. A folder that is torn all the same (a dying
disk, a careless copy) does not match its digests and is passed over for the one before, which is why the last
two are kept. Data needs no state, since batches are a function of the step.

The last checkpoint at the full learning rate is saved a second time, in ``checkpoints/stable``, and a finished run
keeps it in ``artefact/checkpoint``: from there more steps, or another rate, go on (``init_from``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sprat.errors import CheckpointError, MachineError, TrustError
from sprat.files import atomic, digest
from sprat.files.json import read_json
from sprat.train.optim import OptimizersContainer

MAX_CHECKPOINTS = 2
STABLE = "stable"  # in the run's checkpoints
ARTEFACT_FOLDER = "checkpoint"  # in the artefact
_FILES = ("model.safetensors", "optimiser.safetensors")
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that matches its digests: its folder, the number of finished steps, and the loop's own facts.

    ``frozen`` is the digest of the parameters that it does not hold; empty where it holds all.
    """

    folder: Path
    step: int
    extra: dict[str, Any]
    frozen: str = ""


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: OptimizersContainer,
    extra: Mapping[str, Any],
    *,
    protected_step: int | None = None,
) -> Path:
    """Write the checkpoint of ``step`` finished steps, then remove all but the last two.

    Args:
        folder: the run's ``checkpoints`` folder; made if missing.
        extra: JSON values that come back with the checkpoint (floats come back to the bit).
        protected_step: a step whose checkpoint stays as well.

    Raises:
        MachineError: the disk is full or closed to us; earlier checkpoints are untouched, nothing is left behind.
    """
    folder = Path(folder)
    target, hidden = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_partial(folder)
        hidden.mkdir()
        _check_disk_space(folder, _size(model, optimizer))
        save_file(trained_tensors(model), hidden / _FILES[0])
        save_file({name: value.contiguous() for name, value in optimizer.state_dict().items()}, hidden / _FILES[1])
        digests = {name: digest.of_file(hidden / name) for name in _FILES}
        state = {"format": _FORMAT, "step": step, "files": digests, "extra": dict(extra)}
        if frozen := frozen_digest(model):
            state["frozen"] = frozen
        (hidden / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True, allow_nan=False) + "\n")
        for path in (*hidden.iterdir(), hidden):
            atomic.fsync(path)
        if target.exists():
            shutil.rmtree(target)
        os.replace(hidden, target)
        atomic.fsync(folder)
    except BaseException as error:
        shutil.rmtree(hidden, ignore_errors=True)
        mended = atomic.as_machine_error(error, folder)
        if mended is None and isinstance(error, SafetensorError):
            mended = MachineError(f"a checkpoint cannot be written: {error}", where=str(folder), todo="check the disk")
        if mended is not None:
            raise mended from None
        raise
    for old in _folders(folder)[MAX_CHECKPOINTS:]:
        if old.name != f"step-{protected_step or 0:08d}":
            shutil.rmtree(old, ignore_errors=True)
    return target


def latest(folder: str | Path) -> Checkpoint | None:
    """The newest checkpoint in ``folder`` that is whole; None where there is none."""
    return next(_valid_checkpoints(Path(folder)), None)


def at_step(folder: str | Path, step: int) -> Checkpoint | None:
    """The checkpoint of ``step`` in ``folder``; None where there is none that is whole."""
    return next((each for each in _valid_checkpoints(Path(folder)) if each.step == step), None)


def _valid_checkpoints(*folders: Path) -> Iterator[Checkpoint]:
    """The whole checkpoints in ``folders``, of each the newest first."""
    for candidate in (path for folder in folders for path in _folders(folder)):
        try:
            state = json.loads((candidate / "state.json").read_text())
            if state["format"] == _FORMAT and state["files"] == {
                name: digest.of_file(candidate / name) for name in _FILES
            }:
                yield Checkpoint(candidate, int(state["step"]), dict(state["extra"]), str(state.get("frozen", "")))
        except (OSError, ValueError, KeyError, TypeError, TrustError):
            continue


def parse_init_from(init_from: str) -> tuple[Path, int | None]:
    """The run's folder and the step of ``RUN@STEP``; None for a step that is not said.

    >>> parse_init_from("runs/mine/pretrain@500"), parse_init_from("a@b")
    ((PosixPath('runs/mine/pretrain'), 500), (PosixPath('a@b'), None))
    """
    folder, sign, step = init_from.rpartition("@")
    return (Path(folder), int(step)) if sign and step.isdecimal() else (Path(init_from), None)


def find_start(init_from: str, run: Path, expected_digest: str = "") -> Checkpoint:
    """The checkpoint that ``init_from`` (``RUN`` or ``RUN@STEP``) names.

    Without a step it is the last one at the full learning rate, or the newest where a run was not that far.

    Args:
        run: the folder of the run that starts; where it is RUN itself, what was set aside from there is looked at too.
        expected_digest: the digest that its folder must have (``sprat.files.digest.of_folder``); empty for any.

    Raises:
        CheckpointError: there is none.
    """
    folder, step = parse_init_from(init_from)
    run_folders = [folder]
    if folder.resolve() == run.resolve():
        aside = {
            int(n): old
            for old in folder.parent.glob(f"{folder.name}.old-*")
            if (n := old.name[len(folder.name) + 5 :]).isdecimal()
        }
        run_folders += [aside[number] for number in sorted(aside, reverse=True)]
    seen = set[int]()
    for run_folder in run_folders:
        checkpoints = run_folder / "checkpoints"
        finished = run_folder / "artefact" / ARTEFACT_FOLDER
        for candidate in _valid_checkpoints(finished, checkpoints / STABLE, checkpoints):
            if step in (None, candidate.step) and expected_digest in ("", digest.of_folder(candidate.folder)):
                return candidate
            seen.add(candidate.step)
    what = f"no checkpoint to start from; there is {sorted(seen)}" if seen else "no checkpoint to start from"
    todo = "name a training run as RUN or RUN@STEP; one that finished keeps one step (sft and dpo: keep_checkpoint)"
    raise CheckpointError(what, where=f"init_from {init_from}", todo=todo)


def start_input(init_from: str, run: Path, recipe_digest: str) -> dict[str, Path | str]:
    """The checkpoint to start from as an input of ``run``, a folder; none where the run starts afresh.

    A run may start from the one that lies in its own folder, which is then set aside; from then on its own record
    knows by digest what it started from, also where that is gone.

    Raises:
        CheckpointError: there is none.
    """
    if not init_from:
        return {}
    for record in (read_json(run / "run.json"), read_json(run / "open.json")):
        recorded = (record or {}).get("inputs", {}).get("init_from")
        is_same = record is not None and record.get("recipe_digest") == recipe_digest
        if is_same and recorded and parse_init_from(init_from)[0].resolve() == run.resolve():
            try:
                return {"init_from": find_start(init_from, run, recorded["digest"]).folder}
            except CheckpointError:
                return {"init_from": str(recorded["digest"])}
    return {"init_from": find_start(init_from, run).folder}


def copy_to_artefact(checkpoint: Checkpoint | None, artefact: Path) -> None:
    """Copy ``checkpoint`` into ``artefact``, without what ties it to one recipe.

    Raises:
        MachineError: the disk is full.
    """
    if checkpoint is None:
        return
    target = artefact / ARTEFACT_FOLDER / checkpoint.folder.name
    try:
        shutil.copytree(checkpoint.folder, target)
        state = json.loads((target / "state.json").read_text())
        state["extra"] = {
            name: value for name, value in checkpoint.extra.items() if name not in ("config", "data", "monitor")
        }
        (target / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True, allow_nan=False) + "\n")
    except (OSError, shutil.Error) as error:
        raise (atomic.as_machine_error(error, target) or error) from None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: OptimizersContainer) -> None:
    """Put weights, buffers and optimizer state back, in place.

    Raises:
        CheckpointError: the checkpoint is of another model or optimizer or over other frozen weights, or cannot be
            read. Nothing is changed.
    """
    try:
        weights, state = (load_file(checkpoint.folder / name) for name in _FILES)
    except (OSError, SafetensorError) as error:
        what, todo = f"a checkpoint cannot be read: {error}", "remove that folder to start from the checkpoint before"
        raise CheckpointError(what, where=str(checkpoint.folder), todo=todo) from None
    check_compatible(checkpoint, model, optimizer)
    _check_frozen(checkpoint, model)
    optimizer.load_state_dict(state)
    _copy(weights, model)


def restore_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Put weights and buffers back, in place, and no optimizer state.

    Raises:
        CheckpointError: the checkpoint is of another model or over other frozen weights, or cannot be read. Nothing is
            changed.
    """
    check_compatible(checkpoint, model)
    _check_frozen(checkpoint, model)
    _copy(load_file(checkpoint.folder / _FILES[0]), model)


def _check_frozen(checkpoint: Checkpoint, model: nn.Module) -> None:
    if checkpoint.frozen and checkpoint.frozen != frozen_digest(model):
        what, todo = "the checkpoint is over other frozen weights", "load the base model that its run started from"
        raise CheckpointError(what, where=str(checkpoint.folder), todo=todo)


def _copy(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    own = _tensors(model)
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def check_compatible(checkpoint: Checkpoint, model: nn.Module, optimizer: OptimizersContainer | None = None) -> None:
    """Refuse a checkpoint of another model or optimizer (None: whatever that is); only names and shapes are read.

    Raises:
        CheckpointError: it is of another one, or cannot be read.
    """
    todo = "keep the model and the optimiser of that run, or leave init_from out and start afresh"
    models = [trained_tensors(model)] if checkpoint.frozen else [_tensors(model)]
    parts = ((models, "model"), (optimizer.layouts(), "optimiser")) if optimizer else ((models, "model"),)
    for name, (layouts, part) in zip(_FILES, parts, strict=False):
        try:
            with safe_open(checkpoint.folder / name, framework="pt") as file:
                stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            fault = f"a checkpoint cannot be read: {error}"
            raise CheckpointError(fault, where=str(checkpoint.folder), todo="name another one") from None
        if stored not in [{key: tuple(value.shape) for key, value in layout.items()} for layout in layouts]:
            raise CheckpointError(f"the checkpoint is of another {part}", where=str(checkpoint.folder), todo=todo)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied weight once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen or value.numel() == 0:
            tensors[name] = value if value.is_contiguous() else value.contiguous()
            seen.add(value.data_ptr())
    return tensors


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training moves, by name: parameters that want a gradient, and persistent buffers; a tied weight once."""
    frozen = {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad}
    return {name: value for name, value in _tensors(model).items() if value.data_ptr() not in frozen}


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of tensors in the order of their names; names, dtypes and shapes included."""
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def frozen_digest(model: nn.Module) -> str:
    """The digest of the parameters that want no gradient; empty where there is none."""
    trained = trained_tensors(model)
    frozen = {name: value for name, value in _tensors(model).items() if name not in trained}
    return digest_tensors(frozen) if frozen else ""


def _size(model: nn.Module, optimizer: OptimizersContainer) -> int:
    """Bytes that a checkpoint takes, nearly."""
    return sum(value.nbytes for value in (*trained_tensors(model).values(), *optimizer.state_dict().values()))


def _check_disk_space(folder: Path, needed: int) -> None:
    """Refuse before writing what cannot fit."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        what = f"the disk is full: a checkpoint needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free"
        raise MachineError(what, where=str(folder), todo="free some space and start again")


def _folders(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first."""
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def _remove_partial(folder: Path) -> None:
    """Remove what killed saves left behind."""
    for partial in folder.glob(".step-*.tmp-*"):
        shutil.rmtree(partial, ignore_errors=True)

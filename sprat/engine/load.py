"""``sprat.load`` and ``sprat.save``: any model folder in, a Hugging Face (or quantised) folder out."""

from __future__ import annotations

from pathlib import Path

import torch

from sprat import quant
from sprat.errors import CheckpointError
from sprat.model import Transformer, hf
from sprat.tokens import Tokenizer


def load(path: str | Path) -> tuple[Transformer, Tokenizer]:
    """The model (float32, or quantised as saved) and its tokenizer.

    Args:
        path: a Hugging Face folder, a folder that ``save`` wrote, a run folder (its artefact is taken), or a hub id
            where ``huggingface_hub`` is installed.

    Raises:
        CheckpointError: no such folder; a file is missing or torn; a weight is not finite; the tokenizer has more
            ids than the model.
        ConfigError: config.json asks for what this code does not compute.
        DataError: there is no tokenizer, or none that can be read.
    """
    folder = hf.resolve(path)
    if not (folder / "config.json").is_file() and (folder / "artefact").is_dir():
        folder = folder / "artefact"
    if not (folder / "config.json").is_file():
        todo = "give a folder with config.json, or the folder of a finished run"
        raise CheckpointError("no model in this folder", where=str(folder), todo=todo)
    if quant.is_quantised(folder):
        model = quant.load(folder)
    else:
        model, _ = hf.load_folder(folder)
        _refuse_nan(model, folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        fault = f"the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}"
        raise CheckpointError(fault, where=str(folder), todo="use the tokenizer that the model was trained with")
    return model, tokenizer


def save(model: Transformer, tokenizer: Tokenizer, path: str | Path) -> None:
    """Write model and tokenizer to one folder: Hugging Face's layout, or ours for a quantised model.

    Raises:
        CheckpointError: the folder cannot be written.
        MachineError: the disk is full or closed to us.
    """
    if quant.recipe_of(model) is not None:
        quant.save(model, path)
    else:
        hf.save_folder(model, path)
    tokenizer.save(path)


def _refuse_nan(model: Transformer, folder: Path) -> None:
    """Raise CheckpointError at the first tensor that is not finite."""
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            todo = "use a checkpoint whose training did not diverge"
            raise CheckpointError(f"tensor {name!r} is not finite", where=str(folder), todo=todo)

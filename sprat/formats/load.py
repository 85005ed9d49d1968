"""``sprat.load`` and ``sprat.save``: any model in, a Hugging Face (or quantised) folder out.

What needs torch is imported when a model is loaded or saved: a server's front process looks for a model and takes its
tokenizer here, and torch would cost it a second of its start and 180 MB.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from sprat.errors import CheckpointError, ConfigError
from sprat.files import digest, lock
from sprat.formats import fetch, gguf, hub
from sprat.tokens import Tokenizer
from sprat.tokens.hf_files import GENERATION_CONFIG_FILE

if TYPE_CHECKING:
    from sprat.model import Transformer

GGUF_FILE = "model.gguf"  # in the artefact of a run that exports
DtypeName = Literal["float32", "bfloat16", "auto"]


def load(path: str | Path, *, dtype: DtypeName = "float32", dequantize: bool = False) -> tuple[Transformer, Tokenizer]:
    """The model and its tokenizer; what is quantised in the file stays so.

    Args:
        path: a Hugging Face folder, a folder that ``save`` wrote, a run folder (its artefact is taken), a GGUF file,
            a name that ``sprat fetch`` knows (fetched if need be), or a hub's id: ``org/name``, ``org/name@revision``.
        dtype: of weights that are not quantised; "auto" is bfloat16 for checkpoints in bfloat16 or FP8, else float32.
        dequantize: make float32 weights of quantised ones, so that the model can be trained (four to eight times the
            memory).

    Raises:
        CheckpointError: no such model; a file is missing or torn; a weight is not finite; the tokenizer has more
            ids than the model; there is no memory for it; no such dtype.
        ConfigError: config.json asks for what this code does not compute.
        DataError: there is no tokenizer, or none that can be read.
        MachineError: a name was to be fetched and could not be.
    """
    if dtype not in get_args(DtypeName):
        raise CheckpointError(f"no dtype {dtype!r}", where="dtype", todo=f"use one of {', '.join(get_args(DtypeName))}")
    import torch

    from sprat.formats import compressed_tensors, hf, quantized
    from sprat.quant import dequantize_model

    weights_dtype: hf.Dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    folder = find_model(path)
    if folder.suffix == ".gguf" or gguf.is_gguf(folder):
        model, tokenizer = gguf.load(folder, dtype=weights_dtype)
    else:
        if quantized.is_quantized(folder):
            model = quantized.load(folder)
        elif compressed_tensors.is_compressed(folder):
            model = compressed_tensors.load(folder, dtype=weights_dtype)
            _refuse_nan(model, folder)
        else:
            model, _ = hf.load_folder(folder, dtype=weights_dtype)
            _refuse_nan(model, folder)
        tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        fault = f"the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}"
        raise CheckpointError(fault, where=str(folder), todo="use the tokenizer that the model was trained with")
    return dequantize_model(model) if dequantize else model, tokenizer


def load_dense(path: str | Path, *, dequantize: bool = False) -> tuple[Transformer, Tokenizer]:
    """What ``load`` gives, with float32 weights that can be trained.

    A GGUF file's quantised weights are multiplied out, since that is all a GGUF of a small model ever is; other
    quantised models only where that is asked for, because there a dense original exists that would be the better start.

    Raises:
        ConfigError: the model is quantised, and ``dequantize`` was not given.
        SpratError: see ``load``.
    """
    from sprat.quant import quantized_weights

    path = _gguf_of_run(locate(path))
    model, tokenizer = load(path, dequantize=dequantize or gguf.is_gguf(path))
    if packed := quantized_weights(model):
        what = f"{len(packed)} matrices of the model are quantised, and codes cannot be trained"
        todo = "start from the model that was quantised, or train what the codes stand for: --dequantize"
        raise ConfigError(what, where=str(path), todo=todo)
    return model, tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of what ``load`` takes, or of a folder with a tokenizer.json, without the model and without torch.

    Raises:
        CheckpointError, DataError, MachineError: see ``load``.
    """
    path = _gguf_of_run(locate(path))
    if gguf.is_gguf(path):
        return gguf.load_tokenizer(path)
    return Tokenizer.load(path if not path.is_dir() or (path / "tokenizer.json").is_file() else _folder(path))


def locate(path: str | Path) -> Path:
    """The file or folder that ``path`` means: itself, what ``sprat fetch`` has under that name, or a hub's snapshot.

    What lies in a cache cannot be removed from it (``sprat models rm``) while this process lives.

    Raises:
        CheckpointError: no such folder, and no such id of a hub.
        MachineError: a name or an id was to be fetched and could not be.
    """
    if Path(path).exists():
        return Path(path)
    cached = fetch.download_model(str(path)) if str(path) in fetch.CATALOG else hub.resolve(path)
    _mark_used(cached if cached.is_file() else cached / "config.json")
    return cached


def _mark_used(file: Path) -> None:
    """Of a model in a cache: hold it, lest it be removed while this process lives, and note that it was used now."""
    lock.hold_file(file)
    with suppress(OSError):  # a cache that is not ours to write to
        os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))


def _gguf_of_run(path: Path) -> Path:
    """The GGUF file that the run in the folder ``path`` exported; else ``path`` itself."""
    file = path / "artefact" / GGUF_FILE
    return file if file.is_file() else path


def find_model(path: str | Path) -> Path:
    """The GGUF file, or the folder with config.json, that ``path`` means.

    Raises:
        CheckpointError: there is none, and the hub cannot help.
        MachineError: a name was to be fetched and could not be.
    """
    path = _gguf_of_run(locate(path))
    return path if path.suffix == ".gguf" or gguf.is_gguf(path) else _folder(path)


def fingerprint(path: str | Path) -> tuple[int, str]:
    """Bytes of the weight files that ``load`` reads the model at ``path`` from; SHA-256 (hex) of these and config.json.

    Raises:
        CheckpointError, MachineError: see ``find_model``.
    """
    from sprat.formats import hf

    place = find_model(path)
    weights = [place] if place.is_file() else hf.weight_files(place)
    files = weights if place.is_file() else [*weights, place / "config.json"]
    listing = {file.name: digest.of_file(file.resolve()) for file in files}
    return sum(file.stat().st_size for file in weights), digest.of_listing(listing)


def _folder(path: Path) -> Path:
    """The folder with config.json that ``path`` means."""
    folder = hub.resolve(path)
    if not (folder / "config.json").is_file() and (folder / "artefact").is_dir():
        folder = folder / "artefact"
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            todo = "put it into its base, and give that folder: sprat merge BASE ADAPTER --out DIR"
            raise CheckpointError("an adapter, and no model by itself", where=str(folder), todo=todo)
        todo = "give a folder with config.json, a GGUF file, or the folder of a finished run"
        raise CheckpointError("no model in this folder", where=str(folder), todo=todo)
    return folder


def save(model: Transformer, tokenizer: Tokenizer, path: str | Path) -> None:
    """Write model and tokenizer to one folder: Hugging Face's layout, or ours for a quantised model.

    Raises:
        CheckpointError: the model holds what its config does not say (an adapter), or its weights were consumed;
            ``load`` could not make it again, so nothing is written.
        MachineError: the disk is full or closed to us; no file is half-written.
    """
    from sprat.formats import hf, quantized
    from sprat.quant import quantized_weights

    _refuse_unloadable(model)
    if quantized_weights(model):
        quantized.save(model, path)
        (Path(path) / GENERATION_CONFIG_FILE).unlink(
            missing_ok=True
        )  # an earlier model's; the tokenizer writes its own
    else:
        hf.save_folder(model, path)
    tokenizer.save(path)


def _refuse_unloadable(model: Transformer) -> None:
    """Raise CheckpointError at the first tensor that a model of this config does not have, or has in another shape."""
    import torch

    from sprat.model import Transformer
    from sprat.quant import quantized_weights

    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Transformer(model.config, seed=None).state_dict().items()}
    packed = quantized_weights(model)
    inside = {id(tensor) for each in packed.values() for tensor in each.buffers()}
    shapes = {name: t.shape for name, t in model.state_dict(keep_vars=True).items() if id(t) not in inside}
    shapes |= {name: torch.Size((*each.codes.shape[:-1], each.width)) for name, each in packed.items()}
    tied = {"head.weight"} if model.config.tie_word_embeddings else set()
    if differing := {name for name, _ in shapes.items() ^ expected.items()} - tied:
        fault = f"{min(differing)} is not as config.json would say, so what is saved could not be loaded"
        todo = "merge first (merge_lora): put a Linear in each adapter's place whose weight is its dense_weight()"
        raise CheckpointError(fault, where="save", todo=todo)


def _refuse_nan(model: Transformer, folder: Path) -> None:
    """Raise CheckpointError at the first tensor that is not finite."""
    import torch

    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            todo = "use a checkpoint whose training did not diverge"
            raise CheckpointError(f"tensor {name!r} is not finite", where=str(folder), todo=todo)

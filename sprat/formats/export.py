"""A model taken away: a folder or a file that other programs load, there whole or not at all, with its manifest.

A folder is written under a hidden name beside its place and renamed when all of it is on the disk, so what a kill or
a full disk leaves is never taken for a model; the next export to that place clears it away. A GGUF file is renamed in
the same way.

The manifest (``export.json`` in a folder, ``<file>.export.json`` beside a GGUF file) holds the form, the digest of what
was exported, and the digest of every file and every tensor; ``verify_export`` holds the files against it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sprat.config.model import ModelConfig
from sprat.errors import ConfigError, MachineError, SpratError
from sprat.files import atomic, digest
from sprat.files.json import read_json, write_json
from sprat.formats import compressed_tensors, fp8, gguf, hf
from sprat.formats.gguf.export import Kind
from sprat.formats.load import find_model, load
from sprat.formats.safetensors import Shards
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from sprat.tokens.hf_files import GENERATION_CONFIG_FILE

Format = Literal["dense", "pack-quantized", "fp8", "gguf"]
MANIFEST, VERSION = "export.json", 1
_TAKEN = "something is there already"


@dataclass(frozen=True)
class Form:
    """What is written: ``format``, and of a GGUF file the ``kind`` of its matrices and the cut of its tokenizer."""

    format: Format = "dense"
    kind: Kind | None = None
    pre: str | None = None


def export_model(source: str | Path, out: str | Path, form: Form) -> None:
    """Write the model at ``source`` to the folder (or, as GGUF, the file) ``out``, with its manifest.

    Args:
        source: what ``load`` takes.

    Raises:
        ConfigError: something is at ``out`` already; nothing is overwritten.
        CheckpointError: there is no model at ``source``, or ``form`` cannot hold it; see ``gguf.save`` and
            ``compressed_tensors.encode_model``.
        MachineError: the disk is full or closed to us; nothing is left.
    """
    out = Path(os.path.abspath(out))
    if form.format == "gguf":
        _refuse_existing_file(out)
    else:
        refuse_existing_folder(out)
    path = find_model(source)
    model, tokenizer = load(path, dequantize=form.format in ("dense", "fp8"))
    facts = {"source": digest.of_folder(path, follow=True) if path.is_dir() else digest.of_file(path)}
    if form.format == "gguf":
        write_form(model, tokenizer, out, form)
        write_manifest(out, form, facts)
    else:
        with new_folder(out) as folder:
            write_form(model, tokenizer, folder, form, where=out)
            write_manifest(folder, form, facts)


def write_form(model: Transformer, tokenizer: Tokenizer, out: Path, form: Form, *, where: Path | None = None) -> None:
    """Write what ``form`` says to the folder or file ``out``, without a manifest.

    Args:
        where: what warnings and errors name, if ``out`` is a name for the time being.

    Raises:
        CheckpointError, MachineError: see ``export_model``.
    """
    if form.format == "gguf":
        gguf.save(model, tokenizer, out, kind=form.kind or "q8_0", pre=form.pre)
        return
    config, quantization = _with_token_ids(model.config, tokenizer), None
    if form.format == "pack-quantized":
        tensors, quantization = compressed_tensors.encode_model(model)
    else:
        tensors = hf.disk_tensors(config, model.state_dict())
    if form.format == "fp8":
        tensors, quantization = fp8.encode_tensors(tensors, str(where or out))
    hf.write_folder(config, tensors, out, quantization=quantization)
    generation = read_json(out / GENERATION_CONFIG_FILE) or {}
    tokenizer.save(out)
    write_json(out / GENERATION_CONFIG_FILE, {**generation, **tokenizer.generation_config.raw})


def _with_token_ids(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """``config`` with the ids that the tokenizer knows where it names none: runtimes end an answer by them."""
    own, ends = tokenizer.special_ids, sorted(tokenizer.eos_token_ids)
    known = {
        "bos_token_id": own.bos if own.bos >= 0 else None,
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
        "pad_token_id": own.pad if own.pad >= 0 else None,
    }
    return config.replace(**{key: value for key, value in known.items() if getattr(config, key) is None})


def manifest_path(out: Path) -> Path:
    """Where the manifest of the export ``out`` is."""
    return out / MANIFEST if out.is_dir() else out.with_name(f"{out.name}.{MANIFEST}")


def write_manifest(out: Path, form: Form, facts: dict[str, Any]) -> None:
    """Write the manifest of ``out``, which is there whole.

    Raises:
        MachineError: the disk is full or closed to us.
    """
    names = {name: out / name for name in digest.of_files(out)} if out.is_dir() else {out.name: out}
    tensors: dict[str, str] = {}
    for file in names.values():
        tensors |= tensor_digests(file)
    table = {
        "version": VERSION,
        **{key: value for key, value in asdict(form).items() if value is not None},
        **facts,
        "files": {name: digest.of_file(file) for name, file in names.items()},
        "tensors": tensors,
    }
    write_json(manifest_path(out), {**table, "digest": digest.of_json(table)})


def tensor_digests(file: Path) -> dict[str, str]:
    """SHA-256 of each tensor's type, shape and bytes, by name; empty where ``file`` is no file of weights.

    Raises:
        CheckpointError: its header does not hold.
    """
    if file.suffix == ".safetensors":
        shards = Shards([file])
        return {
            name: _of_tensor(f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}", shards, name)
            for name, entry in shards.entries.items()
        }
    if not gguf.is_gguf(file):
        return {}
    from sprat.formats.gguf.header import read_header

    digests = {}
    with open(file, "rb") as stream:
        for name, tensor in read_header(file).tensors.items():
            stream.seek(tensor.offset)
            content = hashlib.sha256(f"{tensor.kind.name} {list(tensor.shape)}".encode())
            for start in range(0, tensor.nbytes, 1 << 24):
                content.update(stream.read(min(1 << 24, tensor.nbytes - start)))
            digests[name] = content.hexdigest()
    return digests


def _of_tensor(kind: str, shards: Shards, name: str) -> str:
    content = hashlib.sha256(kind.encode())
    tensor = shards.read(name)
    if tensor.numel():
        content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def _refuse_existing_file(out: Path) -> None:
    """Raise ConfigError where something is at ``out``, or beside it where the manifest goes; see ``_check_place``."""
    manifest = out.with_name(f"{out.name}.{MANIFEST}") if out.name else out
    if taken := next((path for path in (out, manifest) if os.path.exists(path)), None):
        what = "this is a folder" if taken.is_dir() else _TAKEN
        raise ConfigError(what, where=str(taken), todo="give another path")
    _check_place(out)


def refuse_existing_folder(out: Path) -> None:
    """Raise ConfigError where something is at ``out`` that is no empty folder, MachineError where none can be made."""
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise ConfigError(_TAKEN, where=str(out), todo="give another path")
    _check_place(out)


def _check_place(out: Path) -> None:
    """Raise MachineError where nothing can be made beside ``out``: before the work is done, and not after it."""
    try:
        out = Path(os.path.abspath(out))
        parent = out.parent
        while not parent.exists():
            parent = parent.parent
        probe = _temporary(parent / out.name)
        shutil.rmtree(probe, ignore_errors=True)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        machine_error = atomic.as_machine_error(error, out)
        if machine_error is None:
            what = f"nothing can be written there: {error.strerror or error}"
            machine_error = MachineError(what, where=str(out), todo="give another path")
        raise machine_error from None


def _temporary(out: Path) -> Path:
    """The hidden name under which ``out`` is written."""
    return out.with_name(f".{out.name}.tmp-{os.getpid()}")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that takes its place when the block ends well, and is gone when it does not.

    Raises:
        MachineError: the disk is full or closed to us.
    """
    temporary = _temporary(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in out.parent.iterdir():
            owner = re.fullmatch(rf"\.{re.escape(out.name)}\.tmp-(\d+)", path.name)
            if owner and not _is_running(int(owner[1])):
                shutil.rmtree(path, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        atomic.fsync(temporary)
        os.rename(temporary, out)  # an empty folder gives way, any other does not
        atomic.fsync(out.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        machine_error = atomic.as_machine_error(error, out)
        if machine_error is None and isinstance(error, OSError):
            what = f"the folder cannot be put in its place: {error.strerror or error}"
            machine_error = MachineError(what, where=str(out), todo="give another folder")
        if machine_error is not None:
            raise machine_error from None
        if isinstance(error, SpratError) and str(temporary) in error.where:
            where = error.where.replace(str(temporary), str(out))  # the name that the user gave
            raise type(error)(error.what, where=where, todo=error.todo) from None
        raise


def _is_running(pid: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True

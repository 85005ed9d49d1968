"""Hugging Face folders in and out: ``config.json``, safetensors, ``generation_config.json``.

Names on disk are exactly those of the published checkpoints. Inside, two things differ: the experts of a layer
are stacked into three tensors, and MTP modules (``model.layers.{n}`` and up, on disk) stand apart from the
decoder layers. ``disk_names`` is the whole mapping; loading and saving both walk it. The copies of embedding
and head that published MTP layers carry are written, since ours are shared.

What a file holds and the model does not need is compared with what it repeats (``redundant_tensors``): a head beside
a config that ties it, copies in MTP layers, rotary frequencies of old checkpoints. A head that differs is used, as
transformers does, and each difference is named in a warning.

DeepSeek-V3 and R1 are published in FP8 (see ``fp8``): those matrices are multiplied out as they are read.

Weights are read tensor by tensor: a load never holds two copies of a model. No pickle is read, no foreign code is run.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError, MachineError
from sprat.formats import fp8, hub
from sprat.formats.safetensors import Shards, read_json_object, remove_other_weights
from sprat.formats.state_dict import EMBEDDING, HEAD, StateDictReader, redundant_tensors
from sprat.model.transformer import Transformer, meta_model

Dtype = torch.dtype | Literal["auto"]
_FULL = ("No space left on device", "File too large", "Disk quota exceeded")
WEIGHTS, INDEX = "model.safetensors", hub.INDEX
_EXPERT = {"w_gate_EFD": "gate_proj", "w_up_EFD": "up_proj", "w_down_EDF": "down_proj"}


def disk_names(name: str, config: ModelConfig) -> list[str]:
    """The tensors on disk that make up our tensor ``name``: one, or one for each expert.

    >>> from sprat.config.sizes import size
    >>> disk_names("layers.1.mlp.experts.w_up_EFD", size("pico"))[7]
    'model.layers.1.mlp.experts.7.up_proj.weight'
    """
    if name == "head.weight":
        return ["lm_head.weight"]
    parts = name.split(".")
    if parts[0] == "mtp":
        layer = str(config.num_hidden_layers + int(parts[1]))
        rest = ["shared_head", "norm", *parts[3:]] if parts[2] == "shared_norm" else parts[2:]
        parts = ["layers", layer, *(rest[1:] if rest[0] == "block" else rest)]
    if parts[-1] in _EXPERT:
        stem = ".".join(["model", *parts[:-1]])
        return [f"{stem}.{expert}.{_EXPERT[parts[-1]]}.weight" for expert in range(config.n_routed_experts)]
    return [".".join(["model", *parts])]


def load_config(folder: str | Path) -> ModelConfig:
    """The ``config.json`` of ``folder``.

    Raises:
        CheckpointError: the file is missing or is no JSON object.
        ConfigError: it asks for what this code does not compute.
    """
    return _config_and_blocks(Path(folder) / "config.json")[0]


def load_folder(
    path: str | Path, *, dtype: Dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Transformer, ModelConfig]:
    """(model with weights of ``dtype`` on ``device``, its config) from a Hugging Face folder or id.

    MTP modules that the config announces but the files do not hold are left out, as transformers saves them so.

    Args:
        dtype: "auto" is bfloat16 where the checkpoint is bfloat16 or FP8, else float32.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape or unknown, a file is torn, or memory is short.
        ConfigError: see ``load_config``.
    """
    folder = hub.resolve(path)
    config, blocks = _config_and_blocks(folder / "config.json")
    model = (checkpoint := open_checkpoint(folder, config)).model
    reader = StateDictReader(model, checkpoint.expected, checkpoint.shards, blocks)
    reader.check(checkpoint.redundant.keys(), folder)
    checkpoint.warn_of_differing()
    state = reader.read(checkpoint.own_dtype() if dtype == "auto" else dtype, torch.device(device))
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.head.weight = model.embed_tokens.weight
    return model, model.config


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose headers were read and no weight yet.

    Attributes:
        model: on the meta device, as the files have it (``model.config`` too): prediction modules, a head of its own.
        expected: our name -> its names on disk; of a stacked tensor one for each expert, else one in all.
        redundant: tensors that the model does not need -> whether they differ from what they repeat.
    """

    folder: Path
    model: Transformer
    shards: Shards
    expected: dict[str, list[str]]
    redundant: dict[str, Callable[[], bool]]

    def warn_of_differing(self) -> None:
        """Name the tensors that the model does not need and that are not what they repeat."""
        for name in [name for name, differs in self.redundant.items() if differs()]:
            _warn(self.folder, f"tensor {name!r} is not what config.json and the other tensors say, and is not used")

    def own_dtype(self) -> torch.dtype:
        """bfloat16 where the embedding is, else float32."""
        narrow = self.shards.entries[self.expected["embed_tokens.weight"][0]].dtype == torch.bfloat16
        return torch.bfloat16 if narrow else torch.float32


def open_checkpoint(folder: Path, config: ModelConfig) -> Checkpoint:
    """What a model of ``config`` finds in the files of ``folder``.

    Raises:
        CheckpointError: a file is missing or torn, or the config asks for more than the files can hold.
    """
    shards = Shards(weight_files(folder))
    mtp_stem = f"model.layers.{config.num_hidden_layers}."
    if config.num_nextn_predict_layers and not any(name.startswith(mtp_stem) for name in shards.entries):
        config = config.replace(num_nextn_predict_layers=0)
    if config.tie_word_embeddings and {EMBEDDING, HEAD} <= shards.entries.keys():
        config = config.replace(tie_word_embeddings=shards.equal(EMBEDDING, HEAD))
        if not config.tie_word_embeddings:
            _warn(folder, f"{HEAD!r} is not the embedding, though tie_word_embeddings says so; it is used as it is")
    model = meta_model(config, [entry.shape for entry in shards.entries.values()], folder)
    expected = {name: disk_names(name, config) for name in _own_names(model)}
    if config.tie_word_embeddings and EMBEDDING not in shards.entries:
        expected["embed_tokens.weight"] = [HEAD]  # either name will do for what is one tensor
    return Checkpoint(folder, model, shards, expected, redundant_tensors(config, shards))


def save_folder(model: Transformer, path: str | Path) -> None:
    """Write ``model`` as a Hugging Face folder; all files are written whole before the first takes its place.

    Raises:
        MachineError: the disk is full or closed to us; what was there is untouched.
    """
    write_folder(model.config, disk_tensors(model.config, model.state_dict()), path)


def disk_tensors(config: ModelConfig, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names on disk -> tensors of a dense state dict, with the copies that published MTP layers carry."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if config.tie_word_embeddings and name == "head.weight":
            continue
        parts = tensor.unbind(0) if is_stack(name) else [tensor]
        names = disk_names(name, config)
        tensors |= {disk: part.detach().cpu().contiguous() for disk, part in zip(names, parts, strict=True)}
    for depth in range(config.num_nextn_predict_layers):
        stem = f"model.layers.{config.num_hidden_layers + depth}"
        tensors[f"{stem}.embed_tokens.weight"] = own["embed_tokens.weight"].detach().cpu().clone()
        tensors[f"{stem}.shared_head.head.weight"] = own["head.weight"].detach().cpu().clone()
    return tensors


def write_folder(
    config: ModelConfig, tensors: dict[str, Tensor], path: str | Path, *, quantization: dict[str, Any] | None = None
) -> None:
    """Write ``tensors`` and what ``config`` says of them; all files are written whole before the first takes its place.

    Args:
        tensors: by their names on disk.
        quantization: the ``quantization_config`` of config.json.

    Raises:
        MachineError: the disk is full or closed to us; what was there is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(path)
    dtype = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    table = config.to_hf() | {"torch_dtype": dtype, "dtype": dtype}
    table |= {} if quantization is None else {"quantization_config": quantization}
    ids = {key: table[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if table[key] is not None}
    files: dict[str, Callable[[Path], object]] = {
        WEIGHTS: lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}),
        "generation_config.json": _json({"_from_model_config": True, **ids}),
        "config.json": _json(table),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, files)
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(sign in str(error) for sign in _FULL)
        what = "the disk is full" if full else f"cannot write the model: {getattr(error, 'strerror', None) or error}"
        todo = "free some space and save again" if full else "choose a folder that you may write to"
        raise MachineError(what, where=str(folder), todo=todo) from None


def is_stack(name: str) -> bool:
    """Whether our tensor ``name`` holds all experts of a layer."""
    return name.rpartition(".")[2] in _EXPERT


def _own_names(model: Transformer) -> list[str]:
    """Our tensors, without the head where it is the embedding."""
    tied = model.config.tie_word_embeddings
    return [name for name in model.state_dict() if not (tied and name == "head.weight")]


def _config_and_blocks(path: Path) -> tuple[ModelConfig, tuple[int, int] | None]:
    """The config, and rows and columns of an FP8 block where the file announces FP8 weights."""
    table = read_json_object(path)
    how = table.get("quantization_config")
    blocks = None
    if isinstance(how, dict) and how.get("quant_method") == fp8.METHOD:
        blocks = fp8.parse_config(how, f"{path}: quantization_config")
        del table["quantization_config"]
    return ModelConfig.from_hf(table, where=str(path)), blocks


def weight_files(folder: Path) -> list[Path]:
    """The one safetensors file of ``folder``, which goes first as in transformers, or those that its index names.

    Raises:
        CheckpointError: one is missing, or the index cannot be read.
    """
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        files = {folder / WEIGHTS}
    else:
        table = read_json_object(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
            raise CheckpointError("the index has no weight_map", where=str(folder / INDEX), todo="fetch it again")
        files = {folder / Path(file).name for file in table.values()}
    for file in sorted(files):
        if not file.is_file():
            pickled = sorted(path.name for end in ("bin", "pt", "pth") for path in folder.glob(f"*.{end}"))
            if pickled:
                todo = "save the model again as safetensors (save_pretrained of transformers does), or fetch those"
                raise CheckpointError(f"{pickled[0]} is a pickle, which is not read", where=str(folder), todo=todo)
            raise CheckpointError("a weight file is missing", where=str(file), todo="fetch or save the model again")
    return sorted(files)


def _json(table: dict[str, Any]) -> Callable[[Path], object]:
    """Writes ``table`` to a file."""
    text = json.dumps(table, indent=2, sort_keys=True) + "\n"
    return lambda temporary: temporary.write_text(text, encoding="utf-8")


def _write(folder: Path, files: dict[str, Callable[[Path], object]]) -> None:
    """Let each of ``files`` be written beside its place and made durable, then put all of them in place."""
    temporaries: dict[str, Path] = {}
    try:
        for name, fill in files.items():
            descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            os.close(descriptor)
            temporaries[name] = Path(temporary)
            fill(temporaries[name])
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, 0o644)
        for name, path in temporaries.items():
            os.replace(path, folder / name)
        remove_other_weights(folder)
    finally:
        for path in temporaries.values():
            path.unlink(missing_ok=True)


def _warn(folder: Path, what: str) -> None:
    """Name what a folder says and the model does not follow."""
    warnings.warn(f"{folder}: {what}", stacklevel=4)

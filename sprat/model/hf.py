"""Hugging Face folders in and out: ``config.json``, safetensors, ``generation_config.json``.

Names on disk are exactly those of the published checkpoints. Inside, two things differ: the experts of a layer
are stacked into three tensors, and MTP modules (``model.layers.{n}`` and up, on disk) stand apart from the
decoder layers. ``disk_names`` is the whole mapping; loading and saving both walk it. The copies of embedding
and head that published MTP layers carry are written, and ignored when read, since ours are shared.

Weights are read tensor by tensor from memory-mapped files, so a load never holds two copies of a model. No
pickle is read and no code from a folder is run.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError
from sprat.model.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_EXPERT = {"w_gate_EFD": "gate_proj", "w_up_EFD": "up_proj", "w_down_EDF": "down_proj"}
_DERIVED = re.compile(r"rotary_emb\.inv_freq$|^model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight$")


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
        place = str(config.num_hidden_layers + int(parts[1]))
        rest = ["shared_head", "norm", *parts[3:]] if parts[2] == "shared_norm" else parts[2:]
        parts = ["layers", place, *(rest[1:] if rest[0] == "block" else rest)]
    if parts[-1] in _EXPERT:
        stem = ".".join(["model", *parts[:-1]])
        return [f"{stem}.{expert}.{_EXPERT[parts[-1]]}.weight" for expert in range(config.n_routed_experts)]
    return [".".join(["model", *parts])]


def resolve(id_or_path: str | Path) -> Path:
    """A local folder: ``id_or_path`` itself, or the hub's snapshot of that id where ``huggingface_hub`` is installed.

    Raises:
        CheckpointError: no such folder, and the hub cannot help.
    """
    path = Path(id_or_path).expanduser()
    if path.is_dir():
        return path
    missing = CheckpointError("no such model folder", where=str(id_or_path), todo="give a folder with a config.json")
    if path.is_absolute() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(id_or_path)):
        raise missing
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise missing from None
    try:
        return Path(snapshot_download(str(id_or_path), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise CheckpointError(
            f"the hub could not give {id_or_path!r}: {error}", where="huggingface_hub", todo="give a local folder"
        ) from None


def load_config(folder: str | Path) -> ModelConfig:
    """The ``config.json`` of ``folder``.

    Raises:
        CheckpointError: the file is missing or is no JSON object.
        ConfigError: it asks for what this code does not compute.
    """
    path = Path(folder) / "config.json"
    return ModelConfig.from_hf(_read_json(path), where=str(path))


def load_folder(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Transformer, ModelConfig]:
    """(model with weights of ``dtype`` on ``device``, its config) from a Hugging Face folder or id.

    MTP modules that the config announces but the files do not hold are left out, as transformers saves them so.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape or unknown, or a file is torn.
        ConfigError: see ``load_config``.
    """
    folder = resolve(path)
    config = load_config(folder)
    files = _tensor_files(folder)
    mtp_stem = f"model.layers.{config.num_hidden_layers}."
    if config.num_nextn_predict_layers and not any(name.startswith(mtp_stem) for name in files):
        config = config.replace(num_nextn_predict_layers=0)
    with torch.device("meta"):
        model = Transformer(config, seed=None)
    expected = {name: disk_names(name, config) for name in _own_names(model)}
    known = {disk for names in expected.values() for disk in names}
    if config.tie_word_embeddings:
        known.add("lm_head.weight")
    unknown = sorted(name for name in files if name not in known and not _DERIVED.search(name))
    missing = sorted(name for names in expected.values() for name in names if name not in files)
    if missing or unknown:
        name, what = (missing[0], "missing") if missing else (unknown[0], "not part of this model")
        count = len(missing or unknown)
        raise CheckpointError(
            f"tensor {name!r} is {what}" + (f", as are {count - 1} more" if count > 1 else ""),
            where=str(folder),
            todo="check that config.json and the weights belong together",
        )
    state = _read_state(model, expected, files, dtype, device)
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.head.weight = model.embed_tokens.weight
    return model, config


def save_folder(model: Transformer, path: str | Path) -> None:
    """Write ``model`` as a Hugging Face folder; each file appears whole or not at all.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder, config = Path(path), model.config
    own = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for name in _own_names(model):
        names = disk_names(name, config)
        parts = own[name].unbind(0) if name.rpartition(".")[2] in _EXPERT else [own[name]]
        tensors |= {disk: part.detach().cpu().contiguous() for disk, part in zip(names, parts, strict=True)}
    for depth in range(len(model.mtp)):
        stem = f"model.layers.{config.num_hidden_layers + depth}"
        tensors[f"{stem}.embed_tokens.weight"] = own["embed_tokens.weight"].detach().cpu().clone()
        tensors[f"{stem}.shared_head.head.weight"] = own["head.weight"].detach().cpu().clone()
    table = {**config.to_hf(), "torch_dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch.")}
    ids = {key: table[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if table[key] is not None}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / WEIGHTS, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
        _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
        _write_json(folder / "config.json", table)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the model: {error.strerror or error}", where=str(folder), todo="check space and permissions"
        ) from None


def _own_names(model: Transformer) -> list[str]:
    """Our tensors, without the head where it is the embedding."""
    tied = model.config.tie_word_embeddings
    return [name for name in model.state_dict() if not (tied and name == "head.weight")]


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it, from the index, or from the one file."""
    from safetensors import SafetensorError, safe_open

    if (folder / INDEX).is_file():
        table = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict):
            raise CheckpointError("the index has no weight_map", where=str(folder / INDEX), todo="fetch it again")
        files = {str(name): folder / Path(str(file)).name for name, file in table.items()}
    else:
        files = {"": folder / WEIGHTS}
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise CheckpointError("a weight file is missing", where=str(file), todo="fetch or save the model again")
    held: dict[str, Path] = {}
    for file in sorted(set(files.values())):
        try:
            with safe_open(file, framework="pt") as opened:
                held |= dict.fromkeys(opened.keys(), file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"not a whole safetensors file: {error}", where=str(file), todo="fetch it again"
            ) from None
    return held


def _read_state(
    model: Transformer,
    expected: dict[str, list[str]],
    files: dict[str, Path],
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Our state dict from disk; shapes are checked tensor by tensor."""
    from contextlib import ExitStack

    from safetensors import safe_open

    shapes = {name: tensor for name, tensor in model.state_dict().items() if name in expected}
    state: dict[str, Tensor] = {}
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in set(files.values())}
        for name, names in expected.items():
            stacked = name.rpartition(".")[2] in _EXPERT
            want = tuple(shapes[name].shape[1:] if stacked else shapes[name].shape)
            target = torch.float32 if name.endswith("e_score_correction_bias") else dtype
            out = torch.empty(shapes[name].shape, dtype=target, device=device)
            for place, disk in enumerate(names):
                tensor = opened[files[disk]].get_tensor(disk)
                if tuple(tensor.shape) != want:
                    raise CheckpointError(
                        f"tensor {disk!r} has shape {tuple(tensor.shape)}, expected {want}",
                        where=str(files[disk]),
                        todo="check that config.json and the weights belong together",
                    )
                (out[place] if stacked else out).copy_(tensor)
            state[name] = out
    return state


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("a file is missing", where=str(path), todo="give the folder of a model") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"not readable as JSON: {error}", where=str(path), todo="fetch it again") from None
    if not isinstance(table, dict):
        raise CheckpointError("not a JSON object", where=str(path), todo="fetch it again")
    return table


def _write_json(path: Path, table: dict[str, Any]) -> None:
    """Write ``table`` to ``path``, whole or not at all."""
    text = json.dumps(table, indent=2, sort_keys=True) + "\n"
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _write(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a temporary file beside ``path``, make it durable, then put it in place."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        fill(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

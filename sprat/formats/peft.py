# size: adapters in and out, each key and tensor checked, are one noun
"""Adapters in and out in PEFT's layout: ``adapter_config.json`` beside ``adapter_model.safetensors``.

Tensors are called ``base_model.model.<module>.lora_A.weight`` [r, in], ``.lora_B.weight`` [out, r] and, with DoRA,
``.lora_magnitude_vector`` [out], where ``<module>`` is that of the published checkpoint (``disk_names``). Experts of a
layer, which are stacks here, are written one by one: ``model.layers.1.mlp.experts.7.up_proj``. transformers 5 has
stacks of its own, for which PEFT (0.21.2) converts them as it loads; of what it then leaves out ``save_peft`` warns.

The header of ``adapter_model.safetensors`` has the digest of the base, which PEFT does not read: over other weights an
adapter that fits by its shapes means nothing, so ``load_peft`` says it.

Everything that the config says is read, means nothing by its value (null, false, empty), or is named as not understood.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sprat.config.base import parse
from sprat.config.model import LoRAConfig
from sprat.errors import CheckpointError, ConfigError, MachineError
from sprat.files.atomic import replace_file
from sprat.formats.hf import disk_names
from sprat.formats.safetensors import Shards, read_json_object, sort_metadata
from sprat.model import Transformer
from sprat.model.lora import (
    ALL_LINEAR,
    EXPERT_PROJECTIONS,
    adapters,
    add_lora,
    check_plain,
    load_lora_state_dict,
    target_names,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BASE_KEY, _DIGEST_ROWS = "base_digest", 8
_PREFIX = "base_model.model."
_SUFFIXES = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "lora_magnitude_vector": ".lora_magnitude_vector",
}
_OURS = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "use_dora": "dora"}
# Read by ``_parse_config`` and ``_check_targets``.
_READ = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "init_lora_weights",
    "target_modules", "layers_to_transform",
}  # fmt: skip
# What says nothing about what is computed from the tensors, and settings of what has to be switched on by another key.
_SILENT = {
    "inference_mode", "lora_dropout", "peft_version", "revision", "task_type", "megatron_core", "qalora_group_size",
}  # fmt: skip
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base as well
_FAMILIES = {  # a word in the name of a base -> who may be called so; GGUF files and many others call Mistral a Llama
    "llama": ("llama",),
    "mistral": ("mistral", "llama"),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3",),
    "deepseek-v": ("deepseek_v2", "deepseek_v3"),
    "deepseekv": ("deepseek_v2", "deepseek_v3"),
    "gemma": (),
}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ADVICE = "load the base model that the adapter was made for"


def save_peft(model: Transformer, path: str | Path, *, base_model: str | None = None) -> None:
    """Write the adapters of ``model`` to the folder ``path``; both files are written whole before one takes its place.

    Args:
        base_model: name or path of the base, for ``base_model_name_or_path``.

    Raises:
        ConfigError: the model has no adapters.
        CheckpointError: a number of them is not finite.
        MachineError: the disk is full or closed to us; what was there is untouched.
    """
    folder, own = Path(path), adapters(model)
    if not own:
        raise ConfigError("the model has no adapters", where="save_peft", todo="add some (add_lora), or save the model")
    tensors: dict[str, Tensor] = {}
    for target, adapter in own.items():
        modules = _disk_modules(model, target)
        for leaf, parameter in adapter.named_parameters():
            value = parameter.detach().cpu()
            parts = value.unbind(0) if _is_stack(target) else (value,)
            tensors |= {_disk_name(m, leaf): part.contiguous() for m, part in zip(modules, parts, strict=True)}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            todo = "go back to a checkpoint of before the training diverged"
            raise CheckpointError(f"tensor {name!r} is not finite", where=str(folder), todo=todo)
    config = next(iter(own.values())).config
    _warn_of_peft(model, config, own.keys(), folder)
    table = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": _target_modules(model, list(own)),
        "use_dora": config.dora,
        "use_rslora": config.rslora,
    }
    text = json.dumps(table, indent=2, sort_keys=True) + "\n"
    try:
        with replace_file(folder / CONFIG) as config_file, replace_file(folder / WEIGHTS) as weights_file:
            save_file(tensors, weights_file, metadata={"format": "pt", _BASE_KEY: _base_digest(model)})
            sort_metadata(weights_file)
            config_file.write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise MachineError(
            f"cannot write the adapter: {error}", where=str(folder), todo="choose another folder"
        ) from None


def load_peft(model: Transformer, path: str | Path) -> None:
    """Put the adapter in the folder ``path`` into ``model``, in place, ready to be used, trained or merged.

    Which modules are adapted, the tensors say; the config has to agree. ``lora_dropout`` is not used.

    Raises:
        CheckpointError: a file is missing or torn; a tensor is missing, has no place in this model, has another shape
            or dtype, or is not finite. Nothing is changed, here and below.
        ConfigError: the config asks for what is not understood, or is of another kind of base; the model is quantized
            or has adapters already.
    """
    check_plain(model)
    config, state = read_peft(model, path)
    with safe_open(Path(path) / WEIGHTS, framework="pt") as file:
        expected = (file.metadata() or {}).get(_BASE_KEY)
    if expected is not None and expected != _base_digest(model):
        warnings.warn(f"{path}: the adapter was trained on other weights than this base has; {_ADVICE}", stacklevel=2)
    add_lora(model, config)
    load_lora_state_dict(model, state)


def _base_digest(model: Transformer) -> str:
    """SHA-256 (hex) of the first rows of each matrix of ``model``, without its adapters, if there are any."""
    sha = hashlib.sha256()
    for name, value in sorted((name.replace(".base.", "."), value) for name, value in model.state_dict().items()):
        if value.dim() > 1 and "lora_" not in name:
            rows = value.detach().reshape(-1, value.shape[-1])[:_DIGEST_ROWS].float().cpu().contiguous()
            sha.update(f"{name} {tuple(value.shape)}\n".encode() + rows.numpy().tobytes())
    return sha.hexdigest()


def read_peft(model: Transformer, path: str | Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The adapter in the folder ``path`` for a plain ``model`` (of which only the shape counts): as it is, checked.

    Returns:
        its config, whose targets are named in full, and its tensors (float32) as ``lora_state_dict`` names them.

    Raises:
        CheckpointError, ConfigError: see ``load_peft``.
    """
    folder = Path(path)
    table = read_json_object(folder / CONFIG)
    config = _parse_config(table, model, str(folder / CONFIG))
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        todo = "save the adapter again with safe_serialization"
        raise CheckpointError("the adapter is a pickle, which is not read", where=str(folder), todo=todo)
    shards = Shards([folder / WEIGHTS])
    targets = _find_targets(model, config, shards, folder / WEIGHTS)
    _check_targets(table, model, targets, str(folder / CONFIG))
    state: dict[str, Tensor] = {}
    for target in targets:
        for leaf, shape in _shapes(model, config, target).items():
            parts = [_read(shards, _disk_name(module, leaf), shape) for module in _disk_modules(model, target)]
            state[f"{target}.{leaf}"] = torch.stack(parts) if _is_stack(target) else parts[0]
    return config.replace(targets=tuple(targets)), state


def _warn_of_peft(model: Transformer, config: LoRAConfig, targets: Collection[str], folder: Path) -> None:
    """Name what PEFT on transformers 5 reads otherwise: to it gate, up and down are routed experts alone."""
    if not model.config.n_routed_experts:
        return
    stacks = [target for target in targets if _is_stack(target)]
    lost = [t for t in targets if t.rpartition(".")[2] in EXPERT_PROJECTIONS and not _is_stack(t)]
    way = "rslora" if config.rslora else "dora" if config.dora else ""
    if lost or (stacks and way):
        what = f"the adapter of {lost[0]}" if lost else f"{way} of experts"
        advice = "merge it, or adapt attention and routed experts alone, without rslora and dora, if it is to go there"
        warnings.warn(f"{folder}: PEFT on transformers 5 does not read {what}; {advice}", stacklevel=3)


def _parse_config(table: dict[str, Any], model: Transformer, where: str) -> LoRAConfig:
    """The config that ``table`` stands for, but for its targets; all its keys are looked at.

    Raises:
        ConfigError: see ``load_peft``.
    """
    merge = "merge it with PEFT (merge_and_unload) and load the merged model"
    if table.get("peft_type") != "LORA":
        raise ConfigError(f"peft_type {table.get('peft_type')!r} is not known", where=where, todo="use a LoRA adapter")
    for key, value in table.items():
        if value and value != "none" and key not in _OURS.keys() | _READ | _SILENT:
            raise ConfigError(f"{key} = {value!r} is not understood", where=where, todo=merge)
    if (init := table.get("init_lora_weights")) not in _INITS:
        raise ConfigError(f"init_lora_weights = {init!r} changes the base, too", where=where, todo=merge)
    architecture, mapping = model.config.architecture, table.get("auto_mapping")
    name = str(table.get("base_model_name_or_path") or "").rstrip("/").rpartition("/")[2]
    for text in (name, str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""):
        families = [own for word, own in _FAMILIES.items() if word in text.lower()]
        if families and not any(architecture in own for own in families):
            raise ConfigError(
                f"the adapter is for {text!r}, and the model is {architecture}", where=where, todo=_ADVICE
            )
    if table.get("lora_dropout"):
        warnings.warn(f"{where}: lora_dropout is not used; adapters train without dropout here", stacklevel=3)
    settings = {"r": 8, "lora_alpha": 8} | {key: table[key] for key in _OURS if table.get(key) is not None}
    return parse(LoRAConfig, {_OURS[key]: value for key, value in settings.items()}, where=where, lenient=True)


def _find_targets(model: Transformer, config: LoRAConfig, shards: Shards, where: Path) -> list[str]:
    """What of ``model`` the tensors adapt, by ``target_names``.

    Raises:
        CheckpointError: one of them is missing, or has no place.
    """
    entries, targets, expected = shards.entries.keys(), [], set[str]()
    for target in target_names(model):
        leaves = _shapes(model, config, target)
        names = {_disk_name(module, leaf) for module in _disk_modules(model, target) for leaf in leaves}
        if names & entries:
            targets.append(target)
            expected |= names
    for names, what in ((entries - expected, "has no place in this model"), (expected - entries, "is missing")):
        if names:
            more = f", nor have {len(names) - 1} more" if what.startswith("has") else f", as are {len(names) - 1} more"
            fault = f"tensor {min(names)!r} {what}" + (more if len(names) > 1 else "")
            raise CheckpointError(fault, where=str(where), todo=_ADVICE)
    if not targets:
        raise CheckpointError("the adapter holds no tensors", where=str(where), todo="fetch or save it again")
    return targets


def _check_targets(table: dict[str, Any], model: Transformer, targets: list[str], where: str) -> None:
    """Refuse tensors of other modules than the config names. Its regular expressions are not run.

    MTP modules and routed experts, which transformers leaves out or stacks in its own way, may be missing.

    Raises:
        ConfigError: they differ.
    """
    named, layers = table.get("target_modules"), table.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if not isinstance(named, list | str | None) or not isinstance(layers, list | None):
        key = "layers_to_transform" if isinstance(named, list | str | None) else "target_modules"
        raise ConfigError(f"{key} = {table[key]!r} is no list", where=where, todo="fetch or save the adapter again")
    if named is None or (isinstance(named, str) and named != ALL_LINEAR):
        return
    for target in target_names(model):
        module = _disk_modules(model, target)[0]
        is_named = named == ALL_LINEAR or any(f".{module}".endswith(f".{end}") for end in named)
        is_named = is_named and (layers is None or int(module.split(".")[2]) in layers)
        may_be_missing = _is_stack(target) or target.startswith("mtp.")
        if (target in targets) != is_named and not (is_named and may_be_missing):
            what = f"{module!r} is adapted by the tensors alone" if target in targets else f"{module!r} has no tensors"
            raise ConfigError(what, where=f"{where}: target_modules", todo=_ADVICE)


def _read(shards: Shards, name: str, shape: tuple[int, ...]) -> Tensor:
    """Tensor ``name`` in float32.

    Raises:
        CheckpointError: it has another shape, is no float, is not finite, or cannot be read.
    """
    entry = shards.entries[name]
    if entry.shape != shape or entry.dtype not in _FLOATS:
        actual = f"{str(entry.dtype).removeprefix('torch.')} {entry.shape}"
        raise CheckpointError(f"tensor {name!r} is {actual}, not {shape}", where=str(entry.file), todo=_ADVICE)
    value = shards.read(name).float()
    if not bool(torch.isfinite(value).all()):
        todo = "use an adapter whose training did not diverge"
        raise CheckpointError(f"tensor {name!r} is not finite", where=str(entry.file), todo=todo)
    return value


def _shapes(model: Transformer, config: LoRAConfig, target: str) -> dict[str, tuple[int, ...]]:
    """The tensors of one module, one expert's of a stack."""
    outputs, inputs = model.get_parameter(_weight_name(target)).shape[-2:]
    shapes: dict[str, tuple[int, ...]] = {"lora_A": (config.rank, inputs), "lora_B": (outputs, config.rank)}
    return shapes | ({"lora_magnitude_vector": (outputs,)} if config.dora else {})


def _is_stack(target: str) -> bool:
    """Whether ``target`` is the projection of all experts of a layer."""
    return target.split(".")[-2:-1] == ["experts"]


def _weight_name(target: str) -> str:
    """The matrix of ``target`` in a plain model's state dict."""
    stem, _, projection = target.rpartition(".")
    return f"{stem}.{EXPERT_PROJECTIONS[projection]}" if _is_stack(target) else f"{target}.weight"


def _disk_modules(model: Transformer, target: str) -> list[str]:
    """The modules of the published checkpoint that ``target`` is: one, or one for each expert."""
    return [name.removesuffix(".weight") for name in disk_names(_weight_name(target), model.config)]


def _disk_name(module: str, leaf: str) -> str:
    return f"{_PREFIX}{module}{_SUFFIXES[leaf]}"


def _target_modules(model: Transformer, own: list[str]) -> list[str]:
    """The last parts of the adapted names if they say it all, else the names of the modules in full."""
    ends = {target.rpartition(".")[2] for target in own}
    if set(own) == {target for target in target_names(model) if target.rpartition(".")[2] in ends}:
        return sorted(ends)
    return [module for target in own for module in _disk_modules(model, target)]

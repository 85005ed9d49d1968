# size: one layout, out and in: what is written beside what is read
"""``pack-quantized``: INT4 and INT8 weights in the layout of compressed-tensors, which vLLM and transformers load.

A matrix ``<module>.weight`` [N, I] is stored as

- ``<module>.weight_packed`` int32 [N, I · bits / 32]: codes without sign (code + 2^(bits − 1)), the first lowest;
- ``<module>.weight_scale`` [N, G], one for each group of input channels; float32 here, so that nothing is rounded;
- ``<module>.weight_shape`` int64 [2]: N and I;
- where codes have a zero, ``<module>.weight_zero_point`` int32 [N · bits / 32, G], packed along the rows.

and means ``scale · (code − zero)``. ``quantization_config`` of config.json says so in ``config_groups``, and names in
``ignore`` what stays dense. One group covers a model here: matrices whose codes are of another kind than most, or
whose rows are no whole groups, are written dense, to the same numbers; so are embedding, head, and what runtimes fuse
with one that is dense. Our minimums are ``−scale · zero`` where that holds to the last bit, and else refused.

What is read: the tensors say how each matrix is packed, and one of the config's groups has to say the same. Everything
else that the config says is named and refused. Differences ``code − zero`` that our minimums cannot hold to the last
bit become INT8.
"""

# N rows, I columns, G groups of a row, E experts of a layer

from __future__ import annotations

import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError, ConfigError
from sprat.formats import fp8, hf
from sprat.formats.memory import check_available_memory
from sprat.formats.safetensors import read_json_object
from sprat.formats.state_dict import StateDictReader
from sprat.model import Embedding, Transformer
from sprat.model.layers import matrix_names
from sprat.quant import QuantizedTensor, dequantize_model, quantized_weights
from sprat.quant.int4 import pack_int4, unpack_int4
from sprat.quant.layers import replace_with_quantized

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
_LEAVES = (PACKED, SCALE, SHAPE, ZERO)
_ADVICE = "check that config.json and the weights belong together"
# Keys and the values of theirs that are understood; () is any: they change nothing of what is computed.
_CONFIG_KEYS: dict[str, tuple[Any, ...]] = {
    "quant_method": (METHOD,), "format": (FORMAT,), "quantization_status": ("compressed", "frozen"),
    "config_groups": (), "ignore": (), "global_compression_ratio": (), "version": (), "sparsity_config": ({},),
    "transform_config": ({},),
}  # fmt: skip
_GROUP_KEYS: dict[str, tuple[Any, ...]] = {"targets": (), "weights": (), "format": (FORMAT,)}
_WEIGHT_KEYS: dict[str, tuple[Any, ...]] = {
    "num_bits": (4, 8), "type": ("int",), "symmetric": (True,), "strategy": ("group", "channel"), "group_size": (),
    "actorder": ("static", "weight"), "observer": (), "observer_kwargs": (), "scale_dtype": (), "zp_dtype": (),
}  # fmt: skip


class Scheme(NamedTuple):
    """How a matrix is packed; ``group`` 0 is a scale for each row."""

    bits: int
    group: int
    symmetric: bool


def is_compressed(folder: Path) -> bool:
    """Whether the config.json of ``folder`` speaks of compressed-tensors."""
    path = folder / "config.json"
    how = read_json_object(path).get("quantization_config") if path.is_file() else None
    return isinstance(how, dict) and how.get("quant_method") == METHOD


def encode_model(model: Transformer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by their names on disk, ``quantization_config``) of a quantized ``model``.

    Raises:
        CheckpointError: the model is not quantized, or nothing of it can be packed; a minimum is no multiple of its
            scale.
    """
    config, weights = model.config, {name: each.to_tensor() for name, each in quantized_weights(model).items()}
    if not weights:
        todo = "quantize it first (sprat quantize MODEL), or export it dense"
        raise CheckpointError("the model is not quantized", where=FORMAT, todo=todo)
    schemes = {name: scheme for name, tensor in weights.items() if (scheme := _scheme_of(name, tensor)) is not None}
    if not schemes:
        todo = "quantize it in groups of 32, 64 or 128 that divide its rows, or export it dense"
        raise CheckpointError("no matrix of the model can be packed", where=FORMAT, todo=todo)
    scheme = Counter(schemes.values()).most_common(1)[0][0]
    packed = {name for name, own in schemes.items() if own == scheme}
    packed -= {name for name in packed if not _siblings(name, weights.keys()) <= packed}
    _warn_of_dense({name for name, each in weights.items() if each.bits <= 8 and not _stays_dense(name)}, packed)
    tensors = hf.disk_tensors(config, dequantize_model(model).state_dict())
    for name in packed:
        codes = _split(weights[name]) if hf.is_stack(name) else [weights[name]]
        for disk, each in zip(hf.disk_names(name, config), codes, strict=True):
            del tensors[disk]
            tensors |= _pack(disk, each)
    linears = {disk for name in matrix_names_of(config) for disk in hf.disk_names(name, config)}
    ignore = sorted(disk.removesuffix(".weight") for disk in linears & tensors.keys())
    ignore += [f"{disk.removesuffix('.weight')}" for disk in tensors if disk.endswith(".mlp.gate.weight")]
    if "lm_head" not in ignore:
        ignore.append("lm_head")  # one tensor with the embedding
    return tensors, _config_of(scheme, ignore)


def _warn_of_dense(names: set[str], packed: set[str]) -> None:
    """Say which of the matrices ``names``, whose codes were meant to be small, are written dense."""
    if dense := sorted(names - packed):
        shown = ", ".join(dense[:3]) + (", …" if len(dense) > 3 else "")
        why = "their rows are no whole groups, their codes not as most, or they go with one that is dense"
        warnings.warn(
            f"{FORMAT}: {len(dense)} of {len(names)} matrices are written dense, since {why}: {shown}", stacklevel=4
        )


def matrix_names_of(config: ModelConfig) -> list[str]:
    """The matrices of a dense model of ``config`` but for the embedding, by our names."""
    with torch.device("meta"):
        names = matrix_names(Transformer(config, seed=None))
    return [name for name in names if name != "embed_tokens.weight"]


def _config_of(scheme: Scheme, ignore: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a model whose packed matrices are all of ``scheme``."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group or None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _stays_dense(name: str) -> bool:
    """Whether no runtime has the matrix ``name`` in codes."""
    return name in ("embed_tokens.weight", "head.weight") or name.endswith(".eh_proj.weight")


def _scheme_of(name: str, tensor: QuantizedTensor) -> Scheme | None:
    """How a matrix can be packed; None where it must be dense."""
    if _stays_dense(name) or tensor.bits > 8:
        return None
    group = tensor.group if tensor.group in (32, 64, 128) or tensor.group < tensor.width else 0
    if tensor.width % 32 or (group and tensor.width % group):
        return None
    return Scheme(tensor.bits, group, tensor.minimums is None)


def _siblings(name: str, names: Any) -> set[str]:
    """What runtimes fuse with the matrix ``name``: itself among them; all matrices of its layer's experts."""
    if hf.is_stack(name):
        return {other for other in names if other.rpartition(".")[0] == name.rpartition(".")[0]}
    return fp8.fused(name) & set(names)


def _split(stack: QuantizedTensor) -> list[QuantizedTensor]:
    """The experts of a stack one by one."""
    minimums = [None] * len(stack.codes) if stack.minimums is None else list(stack.minimums.unbind(0))
    rows = zip(stack.codes.unbind(0), stack.scales.unbind(0), minimums, strict=True)
    return [QuantizedTensor(codes, scales, stack.bits, stack.group, stack.width, lows) for codes, scales, lows in rows]


def _pack(disk: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors on disk of the matrix ``disk``."""
    stem, codes = disk.removesuffix("weight"), tensor.codes.detach().cpu().contiguous().view(torch.uint8)
    if tensor.minimums is None:  # two's complement plus 2^(bits - 1) turns one bit over
        codes = codes ^ (0x88 if tensor.bits == 4 else 0x80)
    table = {
        stem + PACKED: codes.view(torch.int32),
        stem + SCALE: tensor.scales.detach().cpu().float(),
        stem + SHAPE: torch.tensor([codes.shape[0], tensor.width]),
    }
    if tensor.minimums is not None:
        zeros = _zeros(disk, tensor)
        by_group = torch.nn.functional.pad(zeros.T, (0, -zeros.shape[0] % 8)).to(torch.int8)  # eight rows to a word
        table[stem + ZERO] = pack_int4(by_group).flatten().view(torch.int32).unflatten(0, (len(by_group), -1)).T
        table[stem + ZERO] = table[stem + ZERO].contiguous()
    return table


def _zeros(disk: str, tensor: QuantizedTensor) -> Tensor:
    """The whole number [N, G] of 0 … 15 that each minimum is, in negative scales.

    Raises:
        CheckpointError: one is none.
    """
    assert tensor.minimums is not None
    scales, minimums = tensor.scales.detach().cpu().float(), tensor.minimums.detach().cpu().float()
    zeros = torch.where(scales == 0, 0.0, -minimums / scales).round_().clamp_(0, 15)
    if not torch.equal(-zeros * scales + 0.0, minimums + 0.0):
        what = f"the minimums of {disk!r} are no whole multiples of its scales, as a zero point has to be"
        raise CheckpointError(what, where=FORMAT, todo="export the model dense, or quantize its dense weights anew")
    return zeros


def load(path: str | Path, *, dtype: hf.Dtype = torch.float32, materialize: bool = True) -> Transformer:
    """The quantized model of a folder in ``pack-quantized``: the same codes, scales and zeros.

    Args:
        dtype: of what is dense in the folder; see ``hf.load_folder``.
        materialize: see ``quantize_model``.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape or unknown; a scale is none that float16 holds; a
            difference of code and zero is none that INT8 holds; memory is short.
        ConfigError: config.json asks for what is not understood.
    """
    folder = Path(path)
    table, where = read_json_object(folder / "config.json"), str(folder / "config.json")
    schemes = parse_config(table.pop("quantization_config", None), f"{where}: quantization_config")
    checkpoint = hf.open_checkpoint(folder, ModelConfig.from_hf(table, where=where))
    entries, model = checkpoint.shards.entries, checkpoint.model
    check_available_memory(sum(entry.nbytes for entry in entries.values()), folder)
    stems = {name: [d.removesuffix("weight") for d in names] for name, names in checkpoint.expected.items()}
    packed = {name for name, disks in stems.items() if any(stem + PACKED in entries for stem in disks)}
    dense = {name: names for name, names in checkpoint.expected.items() if name not in packed}
    known = {stem + leaf for name in packed for stem in stems[name] for leaf in _LEAVES}
    reader = StateDictReader(model, dense, checkpoint.shards, None)
    reader.check(known | checkpoint.redundant.keys(), folder)
    checkpoint.warn_of_differing()
    source = _Source(checkpoint, schemes)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    read = {name: source.read(stems[name], shapes[name], stacked=hf.is_stack(name)) for name in sorted(packed)}
    state = reader.read(checkpoint.own_dtype() if dtype == "auto" else dtype, torch.device("cpu"))
    for name in [name for name in state if hf.is_stack(name)]:  # experts of a layer are all of one class
        if any(other.rpartition(".")[0] == name.rpartition(".")[0] for other in packed):
            codes = state.pop(name).float()
            read[name] = QuantizedTensor(
                codes, torch.empty(0, dtype=torch.float16), 32, codes.shape[-1], codes.shape[-1]
            )
    model.load_state_dict(state, strict=False, assign=True)
    replace_with_quantized(model, read.get, materialize=materialize)
    if model.config.tie_word_embeddings and isinstance(model.embed_tokens, Embedding):
        model.head.weight = model.embed_tokens.weight
    return model


class _Source:
    """The packed matrices of a folder."""

    def __init__(self, checkpoint: hf.Checkpoint, schemes: set[Scheme]) -> None:
        self.shards, self.folder, self.schemes = checkpoint.shards, checkpoint.folder, schemes

    def read(self, stems: list[str], shape: tuple[int, ...], *, stacked: bool) -> QuantizedTensor:
        """The tensor of ``shape`` whose matrices on disk are ``stems``, one for each expert of a stack."""
        parts = [self._read_matrix(stem, shape[-2:]) for stem in stems]
        if not stacked:
            return parts[0]
        if len({(part.bits, part.group, part.minimums is None) for part in parts}) > 1:
            if all(part.bits <= 8 and part.group == parts[0].group for part in parts):
                parts = [_as_int8(part) for part in parts]
            else:
                raise self._fault(f"the experts of {stems[0]!r} are not packed alike")
        minimums = [part.minimums for part in parts if part.minimums is not None]
        return QuantizedTensor(
            torch.stack([part.codes for part in parts]),
            torch.stack([part.scales for part in parts]),
            parts[0].bits,
            parts[0].group,
            parts[0].width,
            torch.stack(minimums) if minimums else None,
        )

    def _read_matrix(self, stem: str, shape: tuple[int, ...]) -> QuantizedTensor:
        """One matrix, checked against ``shape`` and the config."""
        rows, width = shape
        packed, scales = self._tensor(stem + PACKED), self._tensor(stem + SCALE)
        if self._tensor(stem + SHAPE).tolist() != [rows, width] or packed.dtype != torch.int32 or packed.dim() != 2:
            raise self._fault(f"{stem + PACKED!r} is no int32 matrix of {rows} × {width} codes")
        bits = next((bits for bits in (4, 8) if tuple(packed.shape) == (rows, -(-width * bits // 32))), 0)
        groups = scales.shape[1] if scales.dim() == 2 else 0
        group = -(-width // groups) if groups else 0
        scheme = Scheme(bits, 0 if groups == 1 else group, stem + ZERO not in self.shards.entries)
        one_group = Scheme(bits, width, scheme.symmetric) if groups == 1 else scheme
        if not bits or tuple(scales.shape) != (rows, groups) or not {scheme, one_group} & self.schemes:
            raise self._fault(f"{stem!r} is packed as {scheme._asdict()}, which no group of the config describes")
        narrow = scales.to(torch.float16)
        if not torch.equal(narrow.float(), scales.float()):
            todo = "load it where it was made, and save it with scales in float16"
            raise self._fault(f"{stem + SCALE!r} has scales that float16 does not hold", todo)
        codes = packed.view(torch.uint8)
        if scheme.symmetric:
            codes = codes ^ (0x88 if bits == 4 else 0x80)
            codes = pack_int4(unpack_int4(codes, width)) if bits == 4 else codes[:, :width].view(torch.int8)
            return QuantizedTensor(codes.contiguous(), narrow, bits, group, width)
        return self._with_zeros(stem, codes, narrow, bits, group, width)

    def _with_zeros(
        self, stem: str, codes: Tensor, scales: Tensor, bits: int, group: int, width: int
    ) -> QuantizedTensor:
        """Codes and zeros as minimums where these hold it exactly, else as the INT8 of their differences."""
        rows, groups = scales.shape
        zeros, want = self._tensor(stem + ZERO), (-(-rows * bits // 32), groups)
        if zeros.dtype != torch.int32 or tuple(zeros.shape) != want:
            raise self._fault(f"{stem + ZERO!r} is not int32 {want}")
        by_group = zeros.T.flatten().view(torch.uint8).unflatten(0, (groups, -1))
        wide = (unpack_int4(by_group, rows) & 15 if bits == 4 else by_group[:, :rows]).T.int()  # [N, G]
        minimums = -(wide * scales.float())
        narrow = minimums.to(torch.float16)
        unsigned = (unpack_int4(codes, width) & 15 if bits == 4 else codes[:, :width]).int()
        if bits == 4 and torch.equal(narrow.float(), minimums):
            return QuantizedTensor(pack_int4(unsigned.to(torch.int8)), scales, 4, group, width, narrow)
        differences = unsigned - wide.repeat_interleave(group, 1)[:, :width]
        if int(differences.min()) < -128 or int(differences.max()) > 127:
            raise self._fault(f"{stem!r} has codes farther from their zero than INT8 reaches", "use a symmetric one")
        return QuantizedTensor(differences.to(torch.int8).contiguous(), scales, 8, group, width)

    def _tensor(self, name: str) -> Tensor:
        if name not in self.shards.entries:
            raise self._fault(f"tensor {name!r} is missing")
        tensor = self.shards.read(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise self._fault(f"tensor {name!r} is not finite")
        return tensor

    def _fault(self, what: str, todo: str = _ADVICE) -> CheckpointError:
        return CheckpointError(what, where=str(self.folder), todo=todo)


def _as_int8(part: QuantizedTensor) -> QuantizedTensor:
    """The same weights with codes of eight bits: INT4 with minimums beside experts that needed them."""
    if part.bits == 8:
        return part
    codes = unpack_int4(part.codes, part.width)
    if part.minimums is not None:
        scales = part.scales.float()
        zeros = torch.where(scales == 0, 0.0, -part.minimums.float() / scales).round_().to(torch.int8)
        codes = (codes & 15) - zeros.repeat_interleave(part.group, 1)[:, : part.width]
    return QuantizedTensor(codes.contiguous(), part.scales, 8, part.group, part.width)


def parse_config(how: Any, where: str) -> set[Scheme]:
    """The schemes of a ``quantization_config``.

    Raises:
        ConfigError: a key, or its value, is not understood; the sentence names it.
    """
    schemes = set()
    table = _checked(how, _CONFIG_KEYS, where)
    groups = table.get("config_groups")
    if table.get("format") != FORMAT or not isinstance(groups, dict) or not groups:
        what = "there are no config_groups" if table.get("format") == FORMAT else f"format={table.get('format')!r}"
        raise ConfigError(what, where=where, todo=f"use a checkpoint in {FORMAT}")
    for name, group in groups.items():
        scope = f"{where}.config_groups.{name}"
        weights = _checked(_checked(group, _GROUP_KEYS, scope).get("weights"), _WEIGHT_KEYS, f"{scope}.weights")
        bits, size, strategy = (weights.get(key) for key in ("num_bits", "group_size", "strategy"))
        size = 0 if strategy == "channel" and size in (None, -1) else size
        if bits not in (4, 8) or type(size) is not int or size < 0 or (strategy == "group") != (size > 0):
            what = f"num_bits={bits}, strategy={strategy!r}, group_size={size} is not understood"
            raise ConfigError(what, where=f"{scope}.weights", todo="use INT4 or INT8 in groups, or one a row")
        schemes.add(Scheme(bits, size, weights.get("symmetric") is not False))
    return schemes


def _checked(table: Any, known: dict[str, tuple[Any, ...]], where: str) -> dict[str, Any]:
    """``table``, all of whose keys say what is understood."""
    if not isinstance(table, dict):
        raise ConfigError("it is no table", where=where, todo="fetch the folder again")
    for key, value in table.items():
        if value in (None, False) or (key in known and (not known[key] or value in known[key])):
            continue
        text = re.sub(r"\s+", " ", str(value))[:60]
        raise ConfigError(f"{key}={text} is not understood", where=where, todo="load it with the program that made it")
    return table

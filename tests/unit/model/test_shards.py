"""Safetensors headers that lie are one sentence; FP8 blocks, shards and narrow dtypes come in as they are meant."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sprat.errors import CheckpointError, ConfigError
from sprat.model import Transformer, load_folder, save_folder
from sprat.model.shards import HEADER_BYTES, Shards, read_header

from .conftest import tiny

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def put(path: Path, table: Any, data: int = 32, length: int | None = None) -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return path


def test_every_dtype_is_read_as_it_was_written(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    plain = torch.randn(5, 7, generator=draw) * 9
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8]
    held = {str(kind): plain.abs().to(kind) for kind in kinds} | {"none": torch.zeros(0, 3), "one": torch.tensor(4.0)}
    save_file(held, tmp_path / "x.safetensors")
    shards = Shards([tmp_path / "x.safetensors"])
    for name, tensor in held.items():
        read = shards.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read.double(), tensor.double())
    narrow = torch.empty(5, 7, dtype=torch.bfloat16)
    shards.read_into("torch.float32", narrow)
    assert torch.equal(narrow, plain.abs().bfloat16())


LIES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "short": (b"", {"data": 0, "length": 0}, "no JSON"),
    "length": ({}, {"length": 1 << 60}, "claims"),
    "long": (b" " * 10, {"length": HEADER_BYTES + 1}, "claims"),
    "not json": (b"{", {}, "no JSON"),
    "deep": (b"[" * 100_000, {}, "no JSON"),
    "list": ([], {}, "no JSON object"),
    "twice": (b'{"a": {}, "a": {}}', {}, "stands in it twice"),
    "dtype": ({"a": {**A, "dtype": "F7"}, "b": B}, {}, "tensor 'a' has dtype 'F7'"),
    "negative": ({"a": {**A, "shape": [-2, -3]}, "b": B}, {}, "tensor 'a' has no sound shape"),
    "float": ({"a": {**A, "shape": [2.0, 3]}, "b": B}, {}, "tensor 'a' has no sound shape"),
    "huge": ({"a": {**A, "shape": [1 << 62, 1 << 62]}, "b": B}, {}, "tensor 'a' has no sound shape"),
    "row": ({"a": 3, "b": B}, {}, "tensor 'a' has dtype None"),
    "bytes": ({"a": {**A, "shape": [2, 4]}, "b": B}, {}, "takes 32 bytes, not 24"),
    "overlap": ({"a": A, "b": {**B, "data_offsets": [20, 28]}}, {}, "tensor 'b' begins at byte"),
    "gap": ({"a": A, "b": {**B, "data_offsets": [25, 33]}}, {}, "tensor 'b' begins at byte"),
    "beyond": ({"a": A, "b": B}, {"data": 31}, "its tensors end at byte"),
    "more": ({"a": A, "b": B}, {"data": 33}, "its tensors end at byte"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named(lie: str, tmp_path: Path) -> None:
    table, how, words = LIES[lie]
    path = put(tmp_path / "x.safetensors", table, **how)
    with pytest.raises(CheckpointError, match="not a whole safetensors file") as caught:
        read_header(path)
    assert words in caught.value.what and caught.value.where == str(path)


def sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    """Replace the one file of ``folder`` by two and an index."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    table = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def to_fp8(tensors: dict[str, Tensor], block: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors as DeepSeek publishes them, the float32 matrices that they stand for), by plain loops over blocks."""
    narrow, exact = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if weight.dim() != 2 or any(part in name for part in ("embed", "head", "mlp.gate.")):
            continue
        codes, back = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
        factors = torch.empty(-(-weight.shape[0] // block), -(-weight.shape[1] // block))
        for row in range(factors.shape[0]):
            for column in range(factors.shape[1]):
                place = (slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block))
                factors[row, column] = weight[place].abs().max() / 448
                codes[place] = (weight[place] / factors[row, column]).to(torch.float8_e4m3fn)
                back[place] = codes[place].float() * factors[row, column]
        narrow |= {name: codes, f"{name}_scale_inv": factors}
        exact[name] = back
    return narrow, exact


@pytest.fixture
def fp8(tmp_path: Path) -> tuple[Path, Path]:
    """(a sharded FP8 folder with odd block edges, the float32 folder that it stands for)."""
    for name in ("narrow", "exact"):
        save_folder(Transformer.create(tiny(), 7), tmp_path / name)
    narrow, exact = to_fp8(load_file(tmp_path / "exact" / "model.safetensors"), 10)
    sharded(narrow, tmp_path / "narrow")
    save_file(exact, tmp_path / "exact" / "model.safetensors")
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    how = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [10, 10], "activation_scheme": "dynamic"}
    (tmp_path / "narrow" / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    return tmp_path / "narrow", tmp_path / "exact"


def test_fp8_blocks_are_multiplied_out(fp8: tuple[Path, Path]) -> None:
    narrow, exact = (load_folder(folder)[0].state_dict() for folder in fp8)
    assert narrow.keys() == exact.keys() and all(torch.equal(narrow[name], exact[name]) for name in narrow)


def test_fp8_without_its_factors_is_named(fp8: tuple[Path, Path]) -> None:
    index = fp8[0] / "model.safetensors.index.json"
    for file in sorted(fp8[0].glob("model-*.safetensors")):
        tensors = load_file(file)
        gone = [name for name in tensors if name.endswith("o_proj.weight_scale_inv")]
        save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, file)
    assert index.is_file()
    with pytest.raises(CheckpointError, match="o_proj.weight_scale_inv' is missing"):
        load_folder(fp8[0])


@pytest.mark.parametrize("how", [{"fmt": "e5m2"}, {"weight_block_size": None}, {"weight_block_size": [0, 1]}])
def test_fp8_of_another_form_is_refused(fp8: tuple[Path, Path], how: dict[str, Any]) -> None:
    path = fp8[0] / "config.json"
    table = json.loads(path.read_text())
    table["quantization_config"] |= how
    path.write_text(json.dumps(table))
    with pytest.raises(ConfigError, match="FP8 of the form"):
        load_folder(fp8[0])


def test_fp8_that_the_config_does_not_announce_is_refused(fp8: tuple[Path, Path]) -> None:
    path = fp8[0] / "config.json"
    table = json.loads(path.read_text())
    del table["quantization_config"]
    path.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="which config.json does not announce"):
        load_folder(fp8[0])


def test_a_tensor_in_two_shards_is_named(fp8: tuple[Path, Path]) -> None:
    first, second = sorted(fp8[0].glob("model-*.safetensors"))
    one = load_file(first)
    name = sorted(one)[0]
    save_file({**load_file(second), name: one[name]}, second)
    with pytest.raises(CheckpointError, match="also stands in"):
        load_folder(fp8[0])


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**9), ("n_routed_experts", 10**9)])
def test_a_config_of_a_billion_layers_is_refused_at_once(key: str, value: int, tmp_path: Path) -> None:
    save_folder(Transformer.create(tiny(), 7), tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**table, key: value}))
    with pytest.raises(CheckpointError, match=f"{key}=1000000000 is more"):
        load_folder(tmp_path)


def test_the_dtype_of_the_file_is_kept_where_asked(tmp_path: Path) -> None:
    model = Transformer.create(tiny(), 7)
    save_folder(model.bfloat16(), tmp_path)
    kept, _ = load_folder(tmp_path, dtype="auto")
    assert kept.head.weight.dtype == torch.bfloat16 and load_folder(tmp_path)[0].head.weight.dtype == torch.float32
    save_folder(Transformer.create(tiny(), 7), tmp_path)
    assert load_folder(tmp_path, dtype="auto")[0].head.weight.dtype == torch.float32

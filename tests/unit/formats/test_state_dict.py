"""FP8 blocks, shards and narrow dtypes of a folder come in as they are meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sprat.errors import CheckpointError, ConfigError
from sprat.formats.hf import load_folder, save_folder
from sprat.model import Transformer
from tests.unit.model.conftest import tiny


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

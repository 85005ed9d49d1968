"""FP8 in DeepSeek's blocks: what is written means scale times number, ragged blocks too, and comes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sprat
from sprat.errors import CheckpointError, ConfigError
from sprat.formats import fp8
from sprat.formats.export import Form, export_model
from sprat.formats.hf import load_folder, save_folder
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.unit.model.conftest import tiny

SHAPES = [(128, 128), (576, 256), (130, 129), (1, 300), (64, 5)]


def e4m3(byte: int) -> float:
    """The number that a byte means (arXiv 2209.05433, table 1): 4 bits of exponent, 3 of mantissa, no infinities."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def weight_dequant(codes: Tensor, scales: Tensor, size: int = 128) -> np.ndarray[Any, Any]:
    """The formula of the published inference code (``weight_dequant``), in NumPy and block by block."""
    table = np.array([e4m3(byte) for byte in range(256)], dtype=np.float32)
    values, factors = table[codes.view(torch.uint8).numpy()], scales.numpy()
    out = np.empty(values.shape, dtype=np.float32)
    for row in range(0, values.shape[0], size):
        for column in range(0, values.shape[1], size):
            place = slice(row, row + size), slice(column, column + size)
            out[place] = values[place] * factors[row // size, column // size]
    return out


def random(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Weights whose blocks are of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).mul(9).exp2() / 99
    weight[: min(128, shape[0]), : min(128, shape[1])] *= seed % 2
    return weight


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_means_number_times_scale(shape: tuple[int, int]) -> None:
    weight = random(shape)
    codes, scales = fp8.quantize_fp8(weight)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == weight.shape
    assert scales.dtype == torch.float32 and scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    back = fp8.dequantize_fp8(codes, scales)
    assert np.array_equal(back.numpy(), weight_dequant(codes, scales))
    # three bits of mantissa: half a step of 1/8, or of the least number, 2^-9
    assert bool(((back - weight).abs() <= weight.abs() / 16 + back.abs().max() / 448 * 2**-10 * 1.01 + 1e-9).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_what_was_eight_bits_is_written_as_it_came(shape: tuple[int, int], seed: int) -> None:
    codes, scales = fp8.quantize_fp8(random(shape, seed))
    again, same = fp8.quantize_fp8(fp8.dequantize_fp8(codes, scales))
    assert torch.equal(codes.view(torch.uint8), again.view(torch.uint8)) and torch.equal(scales, same)


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        fp8.quantize_fp8(torch.full((2, 2), torch.nan))


def v3(**changes: Any) -> Transformer:
    """A model of whole blocks, but for the latents (160 rows, as V3's 576) and the second layer's experts (200)."""
    shape: dict[str, Any] = {
        "vocab_size": 460, "hidden_size": 128, "q_lora_rank": 128, "kv_lora_rank": 128, "intermediate_size": 256,
        "moe_intermediate_size": 200, "num_attention_heads": 4, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32, "v_head_dim": 32,
    }  # fmt: skip
    return Transformer.create(tiny(**{**shape, **changes}), 3)


def test_a_folder_has_the_published_layout_and_comes_back(tmp_path: Path) -> None:
    """Names, dtypes and what stays: those of deepseek-ai/DeepSeek-V3's index and config.json."""
    model, tokenizer = v3(), Tokenizer.train(["12 + 13 = 25"], 460)
    sprat.save(model, tokenizer, tmp_path / "model")
    with pytest.warns(UserWarning, match=r"kv_a_proj_with_mqa.weight' ends in a ragged block"):
        export_model(tmp_path / "model", tmp_path / "fp8", Form("fp8"))
    table = json.loads((tmp_path / "fp8" / "config.json").read_text())
    how = table["quantization_config"]
    published = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip
    assert {key: how[key] for key in published} == published and how.keys() - published == {"modules_to_not_convert"}
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    eight = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    whole = {f"model.layers.{layer}.self_attn.{part}.weight" for layer in range(3) for part in attention}
    assert eight == whole | {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert {f"{name}_scale_inv" for name in eight} == {name for name in tensors if name.endswith("_scale_inv")}
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (2, 1)  # 160 × 128
    skipped = {f"{name}.weight" for name in how["modules_to_not_convert"]}
    assert {name for name in tensors if "expert" in name} == skipped - {"lm_head.weight"}
    loaded = load_folder(tmp_path / "fp8")[0].state_dict()
    name = "self_attn.kv_a_proj_with_mqa.weight"
    scales = tensors[f"model.layers.1.{name}_scale_inv"]
    assert np.array_equal(loaded[f"layers.1.{name}"].numpy(), weight_dequant(tensors[f"model.layers.1.{name}"], scales))
    with pytest.warns(UserWarning, match="ragged"):
        export_model(tmp_path / "fp8", tmp_path / "again", Form("fp8"))
    first, second = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("fp8", "again"))
    assert first == second


@pytest.mark.parametrize("key", ["fmt", "activation_scheme", "scale_fmt", "weight_block_size", "kv_cache_scheme"])
def test_what_the_config_says_beside_it_is_named(key: str) -> None:
    silent = {"scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"]}
    assert fp8.parse_config({**fp8.CONFIG, **silent}, "x") == (128, 128)
    with pytest.raises(ConfigError, match=f"{key}='other'"):
        fp8.parse_config({**fp8.CONFIG, key: "other"}, "config.json")


def test_transformers_reads_whole_blocks_as_we_do_and_ragged_ones_otherwise() -> None:
    """Its blocks are rows divided by blocks: 160 rows become twice 80 (5.23), where 128 and 32 were meant."""
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    read = module.Fp8Dequantize(None)._dequantize_one
    codes, scales = fp8.quantize_fp8(random((256, 128)))
    assert torch.equal(read(codes, scales, torch.float32), fp8.dequantize_fp8(codes, scales))
    codes, scales = fp8.quantize_fp8(random((160, 128), 1))
    if torch.equal(read(codes, scales, torch.float32), fp8.dequantize_fp8(codes, scales)):
        pytest.skip("this transformers reads ragged blocks")
    assert np.array_equal(fp8.dequantize_fp8(codes, scales).numpy(), weight_dequant(codes, scales))
    codes, scales = fp8.quantize_fp8(random((576, 128), 1))
    with pytest.raises(ValueError, match="not divisible"):
        read(codes, scales, torch.float32)


def test_a_scale_that_was_changed_changes_the_weight(tmp_path: Path) -> None:
    save_folder(v3(), tmp_path)
    with pytest.warns(UserWarning, match="ragged"):
        tensors, how = fp8.encode_tensors(load_file(tmp_path / "model.safetensors"), "here")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[f"{name}_scale_inv"] *= 2
    save_file(tensors, tmp_path / "model.safetensors")
    table = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**table, "quantization_config": how}))
    loaded = load_folder(tmp_path)[0].state_dict()["layers.0.mlp.up_proj.weight"]
    assert np.array_equal(loaded.numpy(), weight_dequant(tensors[name], tensors[f"{name}_scale_inv"]))


def test_what_is_fused_is_in_one_format() -> None:
    whole, ragged = torch.ones(128, 128), torch.ones(64, 128)
    tensors = {f"a.{part}_proj.weight": whole for part in "qo"} | {f"a.{part}_proj.weight": ragged for part in "kv"}
    encoded, how = fp8.encode_tensors(tensors, "here")
    assert encoded.keys() == tensors.keys() | {"a.o_proj.weight_scale_inv"}
    assert how["modules_to_not_convert"] == ["a.k_proj", "a.q_proj", "a.v_proj", "lm_head"]
    with pytest.raises(CheckpointError, match="no matrix of the model has whole blocks"):
        fp8.encode_tensors({"a.k_proj.weight": ragged}, "here")

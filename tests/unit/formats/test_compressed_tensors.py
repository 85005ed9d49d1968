"""``pack-quantized`` as compressed-tensors publishes it: out and in to the last bit, or refused by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sprat
from sprat.config import QuantConfig
from sprat.config.quant import QuantizeConfig
from sprat.config.sizes import size
from sprat.errors import CheckpointError, ConfigError
from sprat.formats import compressed_tensors, hf
from sprat.formats.export import Form, export_model
from sprat.model import Transformer
from sprat.quant import QuantExperts, QuantizedTensor, dequantize_model, quantize_model, quantized_weights
from sprat.quant.layers import replace_with_quantized
from sprat.tokens import Tokenizer

Array = np.ndarray[Any, Any]
WIDTHS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 460, "initializer_range": 0.1}
DENSE: dict[str, Any] = {**WIDTHS, "dense": True, "num_key_value_heads": 1, "head_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**WIDTHS, "moe_intermediate_size": 64, "q_lora_rank": 32, "num_nextn_predict_layers": 1},
    "llama": {**DENSE, "architecture": "llama", "tie_word_embeddings": True},
    "qwen2": {**DENSE, "architecture": "qwen2", "attention_bias": True},
    "qwen3": {**DENSE, "architecture": "qwen3"},
}


def unpacked(words: Array, bits: int, count: int) -> Array:
    """Numbers without sign from int32 words [.., W], the first in the low bits, by shifts alone."""
    each = 32 // bits
    shifts = np.arange(each, dtype=np.uint32) * bits
    return (words.astype(np.uint32)[..., None] >> shifts & (1 << bits) - 1).reshape(*words.shape[:-1], -1)[..., :count]


def weight(tensors: dict[str, Tensor], stem: str, bits: int) -> Array:
    """What the format says of a matrix: scale times (code minus zero), the zero 2^(bits - 1) where none is given."""
    rows, columns = tensors[f"{stem}.weight_shape"].tolist()
    codes = unpacked(tensors[f"{stem}.weight_packed"].numpy(), bits, columns).astype(np.int64)
    scales = tensors[f"{stem}.weight_scale"].float().numpy()
    zeros = np.full(scales.shape, 1 << bits - 1)
    if f"{stem}.weight_zero_point" in tensors:
        zeros = unpacked(tensors[f"{stem}.weight_zero_point"].numpy().T, bits, rows).T.astype(np.int64)
    group = columns // scales.shape[1]
    return ((codes - zeros.repeat(group, 1)).astype(np.float32) * scales.repeat(group, 1)).astype(np.float32)


def written(model: Transformer, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the ``quantization_config`` of ``model``, put into ``folder``."""
    tensors, how = compressed_tensors.encode_model(model)
    hf.write_folder(model.config, tensors, folder, quantization=how)
    return tensors, how


def same_weights(one: Transformer, other: Transformer) -> bool:
    mine, theirs = dequantize_model(one).state_dict(), dequantize_model(other).state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("name", "bits", "group"), [("deepseek_v3", 4, 32), ("llama", 8, 64), ("qwen2", 4, 64), ("qwen3", 8, 128)]
)
def test_what_is_written_means_our_weights_and_comes_back(name: str, bits: int, group: int, tmp_path: Path) -> None:
    shape = {**MODELS[name], **({"hidden_size": 128} if group == 128 else {})}
    config = QuantConfig.model_validate({"bits": bits, "group": group})
    model = quantize_model(Transformer.create(size("pico", **shape), 1), config)
    tensors, how = written(model, tmp_path)
    dense = hf.disk_tensors(model.config, dequantize_model(model).state_dict())
    stems = {key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")}
    assert stems and not {f"{stem}.weight" for stem in stems} & tensors.keys()
    for key, value in dense.items():
        stem = key.removesuffix(".weight")
        if stem in stems:
            assert tensors[f"{stem}.weight_packed"].dtype == torch.int32
            assert np.array_equal(weight(tensors, stem, bits), value.numpy()), key
        else:
            assert torch.equal(tensors[key], value), key
            assert value.dim() < 2 or stem in how["ignore"] or "embed_tokens" in key or "shared_head" in key
    weights = how["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (bits, group, True)
    again = compressed_tensors.load(tmp_path)
    assert same_weights(again, model)
    assert written(again, tmp_path / "again")[0].keys() == tensors.keys()
    first, second = (tmp_path / part / "model.safetensors" for part in ("", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_what_runtimes_fuse_is_packed_alike(tmp_path: Path) -> None:
    """vLLM makes one matrix of q, k and v, and one of gate and up: all of them packed or none."""
    dense = Transformer.create(size("pico", **MODELS["llama"]), 1)
    mixed = quantize_model(dense)
    other = quantize_model(dense, QuantConfig(bits=8))
    for part in ("layers.0.self_attn.v_proj", "layers.1.mlp.up_proj"):
        mixed.set_submodule(part, other.get_submodule(part))
    _, how = written(mixed, tmp_path)
    plain = {f"model.layers.0.self_attn.{each}_proj" for each in "qkv"}
    plain |= {f"model.layers.1.mlp.{each}_proj" for each in ("gate", "up")}
    assert set(how["ignore"]) == plain | {"lm_head"}
    assert same_weights(compressed_tensors.load(tmp_path), mixed)


def with_minimums(model: Transformer, exact: bool) -> Transformer:
    """``model`` with INT4 codes of 0 … 15 and minimums, whole multiples of the scales or not."""
    generator = torch.Generator().manual_seed(5)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def codes(name: str) -> QuantizedTensor | None:
        if name in ("embed_tokens.weight", "head.weight"):
            return None
        *outer, width = shapes[name]
        scales = torch.randint(1, 9, (*outer, width // 32), generator=generator).half() / 64
        zeros = torch.randint(0, 16, scales.shape, generator=generator).half()
        packed = torch.randint(0, 256, (*outer, width // 2), dtype=torch.uint8, generator=generator)
        return QuantizedTensor(packed, scales, 4, 32, width, -scales * zeros + (0 if exact else 1 / 256))

    return replace_with_quantized(model, codes, materialize=False)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3"])
def test_minimums_become_zero_points_where_they_are(name: str, tmp_path: Path) -> None:
    model = with_minimums(Transformer.create(size("pico", **MODELS[name]), 1), exact=True)
    tensors, how = written(model, tmp_path)
    assert how["config_groups"]["group_0"]["weights"]["symmetric"] is False
    stem = "model.layers.0.self_attn.o_proj"
    want = dequantize_model(model).state_dict()["layers.0.self_attn.o_proj.weight"]
    assert np.array_equal(weight(tensors, stem, 4), want.numpy())
    assert same_weights(compressed_tensors.load(tmp_path), model)


def test_minimums_that_are_no_zero_points_are_refused() -> None:
    model = with_minimums(Transformer.create(size("pico", **MODELS["qwen3"]), 1), exact=False)
    with pytest.raises(CheckpointError, match=r"minimums of 'model\..*no whole multiples"):
        compressed_tensors.encode_model(model)
    with pytest.raises(CheckpointError, match="not quantized"):
        compressed_tensors.encode_model(Transformer.create(size("pico", **MODELS["qwen3"]), 1))


def foreign(folder: Path, bits: int, group: int, seed: int = 3) -> dict[str, Tensor]:
    """A folder as another program writes it: zero points, scales in bfloat16; its tensors."""
    model = Transformer.create(size("pico", **MODELS["deepseek_v3"]), 1)
    hf.save_folder(model, folder)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(seed)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    plain = ("embed", "head", "mlp.gate.", "eh_proj")
    for key in [key for key, value in tensors.items() if value.dim() == 2 and not any(w in key for w in plain)]:
        (rows, columns), stem = tensors.pop(key).shape, key.removesuffix("weight")
        groups = columns // group if group else 1
        tensors[f"{stem}weight_packed"] = words(rows, columns * bits // 32)
        if bits == 8:  # near enough to the zero that differences fit into eight bits
            spread = torch.randint(90, 160, (rows, columns), generator=generator).to(torch.uint8)
            tensors[f"{stem}weight_packed"] = spread.view(torch.int32)
        tensors[f"{stem}weight_scale"] = (torch.rand(rows, groups, generator=generator) / 8 + 0.01).bfloat16()
        tensors[f"{stem}weight_shape"] = torch.tensor([rows, columns])
        zeros = torch.randint(100, 150, (groups, -(-rows // 4) * 4), generator=generator).to(torch.uint8)
        packed = zeros.view(torch.int32).T if bits == 8 else words(-(-rows // 8), groups)
        tensors[f"{stem}weight_zero_point"] = packed.contiguous()
    save_file(tensors, folder / "model.safetensors")
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group" if group else "channel",
               "group_size": group or None, "observer": "mse", "dynamic": False}  # fmt: skip
    how = {"quant_method": "compressed-tensors", "format": "pack-quantized", "version": "0.12.2", "ignore": ["lm_head"],
           "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": how}))
    return tensors


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 0), (8, 32), (8, 0)])
def test_zero_points_of_others_come_in_to_the_last_bit(bits: int, group: int, tmp_path: Path) -> None:
    tensors = foreign(tmp_path, bits, group)
    state = dequantize_model(compressed_tensors.load(tmp_path)).state_dict()
    for stem in ("model.layers.0.self_attn.q_b_proj", "model.layers.2.mlp.shared_experts.up_proj"):
        ours = stem.replace("model.layers.2", "mtp.0.block").removeprefix("model.")
        assert np.array_equal(state[f"{ours}.weight"].numpy(), weight(tensors, stem, bits)), stem
    experts = state["layers.1.mlp.experts.w_down_EDF"].numpy()
    for expert in range(len(experts)):
        theirs = weight(tensors, f"model.layers.1.mlp.experts.{expert}.down_proj", bits)
        assert np.array_equal(experts[expert], theirs)


CHANGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda how: how.update(format="nvfp4-pack-quantized"), "format=nvfp4-pack-quantized"),
    (lambda how: how.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme="),
    (lambda how: how.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config="),
    (lambda how: how.update(tomorrow=1), "tomorrow=1"),
    (lambda how: how["config_groups"]["group_0"].update(input_activations={"num_bits": 8}), "input_activations="),
    (lambda how: how["config_groups"]["group_0"]["weights"].update(actorder="group"), "actorder=group"),
    (lambda how: how["config_groups"]["group_0"]["weights"].update(num_bits=3), "num_bits=3"),
    (lambda how: how["config_groups"]["group_0"]["weights"].update(type="float"), "type=float"),
    (lambda how: how["config_groups"]["group_0"]["weights"].update(group_size=None), "group_size=None"),
    (lambda how: how.update(config_groups={}), "no config_groups"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_what_the_config_asks_for_beside_it_is_named(
    change: Callable[[dict[str, Any]], object], said: str, tmp_path: Path
) -> None:
    _, how = written(quantize_model(Transformer.create(size("pico", **MODELS["llama"]), 1)), tmp_path)
    compressed_tensors.parse_config(how, "config.json")
    change(how)
    with pytest.raises(ConfigError, match=said):
        compressed_tensors.parse_config(how, "config.json")


STEM = "model.layers.0.mlp.up_proj"
FAULTS: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
    (lambda t: t.pop(f"{STEM}.weight_scale"), "up_proj.weight_scale' is missing"),
    (lambda t: t.pop(f"{STEM}.weight_shape"), "up_proj.weight_shape' is missing"),
    (lambda t: t.update({f"{STEM}.weight_g_idx": torch.zeros(64)}), "weight_g_idx' is not part"),
    (lambda t: t.update({f"{STEM}.weight_shape": torch.tensor([128, 60])}), "no int32 matrix"),
    (lambda t: t.update({f"{STEM}.weight_scale": torch.ones(128, 4)}), "no group of the config"),
    (
        lambda t: t.update({f"{STEM}.weight_scale": torch.full_like(t[f"{STEM}.weight_scale"], 1 / 3)}),
        "float16 does not hold",
    ),
    (lambda t: t.update({f"{STEM}.weight_scale": torch.full_like(t[f"{STEM}.weight_scale"], torch.nan)}), "not finite"),
    (lambda t: t.pop(f"{STEM}.weight_packed"), "missing|not part"),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS)
def test_a_folder_that_does_not_hold_together_is_named(
    fault: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    tensors, _ = written(quantize_model(Transformer.create(size("pico", **MODELS["llama"]), 1)), tmp_path)
    fault(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        compressed_tensors.load(tmp_path)


def test_sprat_load_keeps_the_codes(tmp_path: Path) -> None:
    model = quantize_model(Transformer.create(size("pico", **MODELS["deepseek_v3"]), 1))
    sprat.save(model, Tokenizer.train(["12 + 13 = 25"], 460), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "theirs", Form("pack-quantized"))
    mine, theirs = (sprat.load(tmp_path / folder)[0] for folder in ("ours", "theirs"))
    assert any(isinstance(part, QuantExperts) for part in theirs.modules()) and same_weights(mine, theirs)
    own, came = quantized_weights(mine), quantized_weights(theirs)
    assert came.keys() == own.keys() - {"embed_tokens.weight", "head.weight", "mtp.0.eh_proj.weight"}
    assert all(torch.equal(came[name].codes, own[name].codes) for name in came)


@pytest.mark.parametrize(
    ("width", "changes", "dense", "of"),
    [
        (
            96,
            {"group": 64},
            "10 of 14",
            "layers.0.mlp.gate_proj.weight",
        ),  # inputs of 96, as SmolLM2: 576 in groups of 128
        (128, {"eight_bits": ("v_proj",)}, "6 of 14", "layers.0.self_attn.k_proj.weight"),  # q and k go with v
        (128, {}, "", ""),
    ],
)
def test_what_was_meant_to_be_small_and_is_written_dense_is_said(
    width: int, changes: dict[str, Any], dense: str, of: str
) -> None:
    """An export of 447 MB of a model of 83 MB once came without a word."""
    shape = {**MODELS["llama"], "hidden_size": width}
    model = quantize_model(Transformer.create(size("pico", **shape), 1), QuantizeConfig(**changes))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compressed_tensors.encode_model(model)
    said = [str(each.message) for each in caught]
    if dense:
        assert len(said) == 1 and f"{dense} matrices are written dense" in said[0] and of in said[0]
    else:
        assert said == []

"""What the user gains: a model leaves as one file that has every number it had, where llama.cpp looks for it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sprat
from sprat import quant
from sprat.config.model import ModelConfig
from sprat.config.recipe import QuantConfig
from sprat.engine.request import eos_token_ids
from sprat.errors import CheckpointError, MachineError
from sprat.formats import gguf as ours
from sprat.formats.gguf import weights
from sprat.formats.gguf.header import Header
from sprat.formats.gguf.tokenizer import read_tokenizer
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.gguf_files import Reader, converter_keys, decoded_here, gguf, tensors, torch_of, vocabulary
from tests.unit.files.test_atomic import small_disk

DENSE: dict[str, Any] = {
    "vocab_size": 70, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 128,
}  # fmt: skip
MLA: dict[str, Any] = {
    "vocab_size": 70, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 32,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "initializer_range": 0.2, "max_position_embeddings": 128,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0}
GREEDY: dict[str, Any] = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CONFIGS = {
    "llama": ModelConfig(architecture="llama", **DENSE),
    "llama, biases, tied": ModelConfig(
        architecture="llama", attention_bias=True, tie_word_embeddings=True, rope_scaling=LLAMA3, **DENSE
    ),
    "mistral": ModelConfig(architecture="mistral", **DENSE),
    "qwen2": ModelConfig(architecture="qwen2", attention_bias=True, rope_scaling=YARN, **DENSE),
    "qwen3": ModelConfig(
        architecture="qwen3", head_dim=32, rope_scaling={"rope_type": "linear", "factor": 2.0}, **DENSE
    ),
    "deepseek_v2": ModelConfig(architecture="deepseek_v2", routed_scaling_factor=2.0, **MLA, **GREEDY),
    "deepseek_v3": ModelConfig(
        architecture="deepseek_v3", q_lora_rank=32, routed_scaling_factor=2.5, n_group=2, topk_group=1,
        rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, **MLA,
    ),
    "deepseek_v3, dense": ModelConfig(
        architecture="deepseek_v3", **{**MLA, "n_routed_experts": 0, "n_shared_experts": 0, "num_experts_per_tok": 0}
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def reading_without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start of the reading process would be most of what a tiny file costs."""
    monkeypatch.setattr(weights, "subprocess", SimpleNamespace(run=decoded_here, TimeoutExpired=TimeoutError))


@functools.cache
def words() -> Tokenizer:
    """A byte-level vocabulary of 64 tokens, fewer than the models have ids."""
    return read_tokenizer(Header(Path("x.gguf"), vocabulary(64), {}))


def made(name: str, **changes: Any) -> Transformer:
    """A model of CONFIGS, with random values also for what starts at zero or one."""
    model = Transformer.create(CONFIGS[name].replace(**changes) if changes else CONFIGS[name], 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() == 1:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20) % model.config.vocab_size)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_float_file_comes_back_with_equal_logits(name: str, tmp_path: Path) -> None:
    model = made(name)
    ours.save(model, words(), tmp_path / "model.gguf", kind="f32")
    again, tokenizer = sprat.load(tmp_path / "model.gguf")
    assert torch.equal(logits(again), logits(model))
    assert tokenizer.encode("abc dab") == words().encode("abc dab") and tokenizer.special_ids == words().special_ids
    said = set(DENSE if "deepseek" not in name else MLA) - {"initializer_range"}
    if "dense" in name:
        said -= {"moe_intermediate_size", "first_k_dense_replace"}
    assert all(getattr(again.config, key) == getattr(model.config, key) for key in said)


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_and_keys_are_those_of_llama_cpps_converter(name: str, tmp_path: Path) -> None:
    model = made(name)
    ours.save(model, words(), tmp_path / "model.gguf", kind="f32")
    reader = Reader(tmp_path / "model.gguf")
    held = {tensor.name: torch_of(gguf.quants.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    expected = tensors(model)
    assert held.keys() - {"rope_freqs.weight"} == expected.keys()
    assert all(torch.equal(held[key], tensor) for key, tensor in expected.items())
    arch = str(reader.fields["general.architecture"].contents())
    for key, value in converter_keys(model, arch, True).items():
        unlimited = key.startswith("deepseek2.expert_group") and not model.config.limits_groups
        if value is not None and not unlimited and not key.endswith("leading_dense_block_count"):
            assert reader.fields[key].contents() == pytest.approx(value), key
    assert {key.partition(".")[0] for key in reader.fields} <= {arch, "general", "tokenizer", "GGUF"}


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "deepseek_v3"])
def test_quantized_files_hold_what_ggml_makes_of_each_tensor(name: str, kind: Any, tmp_path: Path) -> None:
    model = made(name, intermediate_size=80)  # rows of which are no whole blocks
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours.save(model, words(), tmp_path / "model.gguf", kind=kind)
    assert [str(each.message) for each in said if "F16, as their rows" in str(each.message)] or kind == "f16"
    reader, expected = Reader(tmp_path / "model.gguf"), tensors(model)
    for tensor in reader.tensors:
        array = expected[tensor.name].detach().numpy()
        assert tensor.tensor_type.name == _ggml_type(tensor.name, array.shape, kind), tensor.name
        assert gguf.quants.quantize(array, tensor.tensor_type).tobytes() == tensor.data.tobytes(), tensor.name
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
    again, _ = sprat.load(tmp_path / "model.gguf")
    assert (logits(again) - logits(model)).abs().max() < {"f16": 0.05, "q8_0": 0.5, "q4_0": 20}[kind]


def _ggml_type(name: str, shape: tuple[int, ...], kind: str) -> str:
    """As convert_hf_to_gguf decides; embedding and head of Q4_0 stay at eight bits."""
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return "F32"
    if kind != "f16" and shape[-1] % 32:
        return "F16"
    return "Q8_0" if kind == "q4_0" and name in ("token_embd.weight", "output.weight") else kind.upper()


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_codes_that_we_have_are_kept(name: str, group: int, kind: Any, tmp_path: Path) -> None:
    model = quant.quantize_model(made(name), QuantConfig(group=group))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours.save(model, words(), tmp_path / "model.gguf", kind=kind)
    twice = [str(each.message) for each in said if "second time" in str(each.message)]
    assert bool(twice) == (name != "llama") and all("attn_k_b" in text for text in twice)
    again, _ = sprat.load(tmp_path / "model.gguf")
    kept = quant.dequantize_model(again).state_dict()
    for key, weight in quant.dequantize_model(model).state_dict().items():
        if "kv_b_proj" in key:  # half of it lies across its groups, and is rounded to eight bits
            assert (kept[key] - weight).abs().max() <= weight.abs().max() / 200
        else:
            assert torch.equal(kept[key], weight), key


def test_codes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = quant.quantize_model(made("llama"), QuantConfig(bits=8))
    with pytest.warns(UserWarning, match="rounded a second time: 14 tensors .blk.0.attn_q"):
        ours.save(model, words(), tmp_path / "model.gguf", kind="q4_0")
    ours.save(model, words(), tmp_path / "exact.gguf", kind="f32")
    assert torch.equal(logits(sprat.load(tmp_path / "exact.gguf")[0]), logits(quant.dequantize_model(model)))


def test_every_token_that_ends_an_answer_goes_along(tmp_path: Path) -> None:
    model = made("llama", eos_token_id=[0, 1, 7])
    ours.save(model, words(), tmp_path / "model.gguf", kind="f32")
    loaded, tokenizer = sprat.load(tmp_path / "model.gguf")
    assert eos_token_ids(loaded.config, tokenizer) == {0, 1}


def test_prediction_modules_are_left_out_and_named(tmp_path: Path) -> None:
    model = made("deepseek_v3", num_nextn_predict_layers=1)
    with pytest.warns(UserWarning, match="multi-token prediction are left out"):
        ours.save(model, words(), tmp_path / "model.gguf", kind="f32")
    again, _ = sprat.load(tmp_path / "model.gguf")
    assert again.config.num_nextn_predict_layers == 0 and torch.equal(logits(again), logits(model))


def spoilt(name: str, change: Callable[[Transformer], object]) -> Transformer:
    model = made(name)
    with torch.no_grad():
        change(model)
    return model


FAULTS: list[tuple[Callable[[], Transformer], str, str]] = [
    (lambda: made("llama"), "q5_0", "no kind 'q5_0'"),
    (lambda: made("mistral", sliding_window=64), "f32", "sliding_window=64"),
    (lambda: made("qwen3", attention_bias=True), "f32", "attention_bias of qwen3"),
    (lambda: made("qwen2", head_dim=32), "f32", "head_dim of qwen2"),
    (lambda: made("qwen3", rope_scaling=LLAMA3), "f32", "llama3 is known there for llama only"),
    (lambda: made("qwen2", rope_scaling={**YARN, "truncate": False}), "f32", "YaRN without truncate"),
    (lambda: made("deepseek_v3", attention_bias=True), "f32", "attention_bias of deepseek"),
    (lambda: made("deepseek_v3", rope_interleave=False), "f32", "rope_interleave=false"),
    (lambda: made("deepseek_v3", rms_norm_eps=1e-5), "f32", "rms_norm_eps=1e-05 beside"),
    (lambda: made("deepseek_v3", rope_scaling=YARN), "f32", "mscale is not mscale_all_dim"),
    (lambda: made("deepseek_v3", rope_scaling={"rope_type": "linear", "factor": 2.0}), "f32", "linear in latent"),
    (lambda: made("deepseek_v3", n_shared_experts=0), "f32", "n_shared_experts=0"),
    (
        lambda: made("deepseek_v2", topk_method="group_limited_greedy", n_group=2),
        "f32",
        "ranks a group by its best expert",
    ),
    (lambda: spoilt("llama", lambda m: m.layers[1].mlp.up_proj.weight.fill_(torch.nan)), "f32", "blk.1.ffn_up.weight"),
    (lambda: spoilt("llama", lambda m: m.norm.weight.fill_(torch.inf)), "q8_0", "output_norm.weight"),
    (lambda: spoilt("llama", lambda m: m.head.weight.fill_(1e5)), "f16", "too large for the type"),
    (lambda: spoilt("llama", lambda m: m.layers[0].mlp.set_submodule("up_proj", torch.nn.Identity())), "f32", "merge"),
    (
        lambda: spoilt("llama", lambda m: m.layers[0].mlp.up_proj.register_parameter("lora_A", m.norm.weight)),
        "f32",
        "merge",
    ),
    (lambda: made("llama", vocab_size=50), "f32", "64 ids, the model only 50"),
]


@pytest.mark.parametrize(
    ("model", "kind", "text"), FAULTS, ids=[f"{at} {text[:30]}" for at, (*_, text) in enumerate(FAULTS)]
)
def test_what_llama_cpp_would_not_compute_is_refused_by_name(
    model: Callable[[], Transformer], kind: Any, text: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        ours.save(model(), words(), tmp_path / "model.gguf", kind=kind)
    assert caught.value.where and caught.value.todo and not list(tmp_path.iterdir())


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a folder stands there"):
        ours.save(made("llama"), words(), tmp_path, kind="f32")


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    model = made("llama")
    with small_disk(40_000), pytest.raises(MachineError, match="the disk is full"):
        ours.save(model, words(), tmp_path / "model.gguf", kind="f32")
    assert not list(tmp_path.iterdir())

"""What users get: a GGUF file computes here what the model that it was made from computes in transformers."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import sprat
from sprat import quant
from sprat.config.model import HF_CLASS, ModelConfig
from sprat.errors import CheckpointError
from sprat.formats import gguf as sprat_gguf
from sprat.formats.gguf import weights
from sprat.formats.gguf.header import Header
from sprat.formats.gguf.metadata import check_config
from sprat.formats.gguf.tokenizer import read_tokenizer
from sprat.formats.hf import load_folder, save_folder
from sprat.model import Transformer
from tests.gguf_files import Reader, decoded_here, gguf, torch_of, vocabulary, write
from tests.parity.test_transformers import FAMILY, LLAMA3, disturb

transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-3
check = functools.partial(
    settings,
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def oracle(config: ModelConfig, folder: Path, model: Transformer) -> Any:
    """The same weights in transformers."""
    save_folder(model, folder)
    kind = getattr(transformers, HF_CLASS[config.architecture])
    return kind.from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def apart(ours: Transformer, theirs: Any, seed: int) -> float:
    """The largest difference of logits on random tokens."""
    tokens = torch.randint(ours.config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(seed))
    return float((ours(tokens) - theirs(input_ids=tokens).logits.float()).abs().max())


def writable(config: ModelConfig) -> ModelConfig:
    """What a GGUF file can say: interleaved pairs, one mscale, biases of llama and qwen2, groups that limit."""
    scaling = config.rope_scaling
    if scaling and scaling.get("rope_type") == "llama3":
        scaling = None
    if scaling and "mscale" in scaling:
        both = {"mscale", "mscale_all_dim"}
        scaling = {key: value for key, value in scaling.items() if key not in both}
        scaling |= dict.fromkeys(both, config.rope_scaling["mscale_all_dim"]) if config.is_mla else {}
    bias = config.architecture == "qwen2" or (config.attention_bias and config.architecture == "llama")
    plain = {"rope_interleave": True, "sliding_window": None, "layer_types": None}
    if config.topk_method == "greedy":
        plain |= {"n_group": 1, "topk_group": 1}
    return config.replace(**plain, rope_scaling=scaling, attention_bias=bias)


@pytest.mark.parametrize("kind", list(HF_CLASS))
def test_a_float_file_computes_what_transformers_computes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "subprocess", SimpleNamespace(run=decoded_here, TimeoutExpired=TimeoutError))

    @check()
    @given(config=FAMILY[kind].map(writable))
    def run(config: ModelConfig) -> None:
        model = Transformer.create(config, 3)
        disturb(model, 4)
        with TemporaryDirectory() as folder:
            theirs = oracle(config, Path(folder), model)
            for split in (True, False) if config.is_mla else (True,):
                ours, tokenizer = sprat.load(write(model, Path(folder) / "model.gguf", split=split))
                assert tokenizer.vocab_size <= config.vocab_size
                assert apart(ours, theirs, 5) <= TOLERANCE, ours.config

    run()


DENSE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_file_with_equal_logits(architecture: str, kind: str, tmp_path: Path) -> None:
    bias = architecture == "qwen2"
    model = Transformer.create(ModelConfig(architecture=architecture, attention_bias=bias, **DENSE), 1)
    disturb(model, 2)
    path = write(model, tmp_path / "model.gguf", kind=lambda name: kind)
    ours, _ = sprat.load(path)
    assert apart(ours, as_transformers_reads(path, model.config), 3) <= TOLERANCE


def as_transformers_reads(path: Path, ours: ModelConfig) -> Any:
    """The model that transformers makes of a GGUF file."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    table = load_gguf_checkpoint(path, return_tensors=False)["config"]
    table = {**table, "head_dim": ours.attention_head_dim}  # which transformers does not read for qwen3
    table.pop("model_type")
    config = transformers.AutoConfig.for_model(ours.architecture, **table)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    held = load_gguf_checkpoint(path, return_tensors=True, model_to_load=theirs)
    theirs.load_state_dict({name: tensor.float() for name, tensor in held["tensors"].items()}, strict=False)
    return theirs


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_what_we_export_transformers_reads_with_equal_logits(architecture: str, kind: Any, tmp_path: Path) -> None:
    bias = architecture == "qwen2"
    model = Transformer.create(ModelConfig(architecture=architecture, attention_bias=bias, **DENSE), 1)
    disturb(model, 2)
    path = tmp_path / "model.gguf"
    sprat_gguf.save(model, read_tokenizer(Header(path, vocabulary(64), {})), path, kind=kind)
    theirs = as_transformers_reads(path, model.config)
    assert apart(sprat.load(path)[0], theirs, 3) <= TOLERANCE
    assert kind != "f32" or apart(model, theirs, 3) <= TOLERANCE


def exportable(config: ModelConfig) -> bool:
    """Whether llama.cpp computes such a model."""
    try:
        check_config(config)
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize("kind", list(HF_CLASS))
def test_a_folder_of_transformers_becomes_a_file_with_equal_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "subprocess", SimpleNamespace(run=decoded_here, TimeoutExpired=TimeoutError))
    tokenizer = read_tokenizer(Header(Path("x.gguf"), vocabulary(7), {}))

    @check()
    @given(config=FAMILY[kind].map(writable).filter(exportable))
    def run(config: ModelConfig) -> None:
        model = Transformer.create(config, 3)
        disturb(model, 4)
        with TemporaryDirectory() as folder:
            theirs = oracle(config, Path(folder) / "ours", model)
            theirs.save_pretrained(Path(folder) / "theirs")
            held, _ = load_folder(Path(folder) / "theirs")
            sprat_gguf.save(held, tokenizer, Path(folder) / "model.gguf", kind="f32")
            ours, _ = sprat.load(Path(folder) / "model.gguf")
            assert apart(ours, theirs, 5) <= TOLERANCE, ours.config

    run()


def test_the_divisors_of_llama_3_become_its_four_numbers(tmp_path: Path) -> None:
    from sprat.model.rope import inverse_frequencies

    scaling = {**LLAMA3, "original_max_position_embeddings": 8192}
    model = Transformer.create(ModelConfig(architecture="llama", rope_scaling=scaling, rope_theta=5e5, **DENSE), 1)
    stretched, _ = inverse_frequencies(model.config)
    plain, _ = inverse_frequencies(model.config.replace(rope_scaling=None))
    path = write(model, tmp_path / "model.gguf", extra={"rope_freqs.weight": plain / stretched})
    ours, _ = sprat.load(path)
    assert ours.config.rope_scaling == scaling
    assert apart(ours, oracle(model.config, tmp_path, model), 1) <= TOLERANCE


EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")  # others are rounded anew, and a router takes another expert for it


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        *((kind, split) for kind in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K") for split in (True, False)),
        *(("Q5_0", True), ("Q5_1", False), ("Q2_K", True), ("Q3_K", False), ("Q5_K", True)),
    ],
)
def test_a_quantised_file_computes_what_its_dequantised_weights_compute(kind: str, split: bool, tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, moe_intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, q_lora_rank=256, kv_lora_rank=256, qk_nope_head_dim=32, qk_rope_head_dim=32,
        v_head_dim=128, n_routed_experts=4 if kind in EXACT else 0, n_shared_experts=1, num_experts_per_tok=2,
        first_k_dense_replace=1, initializer_range=0.05,
    )  # fmt: skip
    model = Transformer.create(config, 1)

    def chosen(name: str) -> str:
        return "F32" if "ffn_gate_inp" in name or "attn_k_b" in name else kind

    path = write(model, tmp_path / "model.gguf", kind=chosen, split=split)
    ours, _ = sprat.load(path)
    assert {packed.bits for packed in quant.quantized_weights(ours).values()} == {4 if "4" in kind else 8}
    put_back(model, path)
    tokens = torch.randint(64, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (ours(tokens) - model(tokens)).abs().max() / model(tokens).abs().max()
    assert difference <= (TOLERANCE if kind in EXACT else 0.03), difference


@torch.no_grad()
def put_back(model: Transformer, path: Path) -> None:
    """Set ``model``'s weights to what the ``gguf`` package reads from ``path``."""
    config, own = model.config, model.state_dict()
    held = {
        tensor.name: torch_of(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in Reader(path).tensors
    }
    from sprat.formats.gguf.names import file_name

    for name, tensor in own.items():
        there = file_name(name, config)
        if there in held:
            tensor.copy_(held[there].view_as(tensor))
        else:
            keys, values = (held[there.replace("attn_kv_b", part)] for part in ("attn_k_b", "attn_v_b"))
            tensor.copy_(torch.cat((keys.transpose(1, 2), values), 1).view_as(tensor))


def test_prediction_modules_come_along(tmp_path: Path) -> None:
    from sprat.formats.gguf.names import file_name

    config = ModelConfig(
        vocab_size=40, hidden_size=32, intermediate_size=24, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, num_nextn_predict_layers=1,
        initializer_range=0.3,
    )  # fmt: skip
    model = Transformer.create(config, 5)
    disturb(model, 6)
    later = {file_name(name, config): weight for name, weight in model.state_dict().items() if name.startswith("mtp.")}
    keys = {"deepseek2.block_count": 3, "deepseek2.nextn_predict_layers": 1}
    own = {"embed_tokens": model.embed_tokens.weight, "shared_head_head": model.head.weight}
    own = {f"blk.2.nextn.{leaf}.weight": weight for leaf, weight in own.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, _ = sprat.load(write(model, tmp_path / "whole.gguf", split=False, extra=later | own, keys=keys))
    other = later | own | {"blk.2.nextn.shared_head_head.weight": model.head.weight + 1}
    with pytest.warns(UserWarning, match="not copies: blk.2.nextn.shared_head_head.weight"):
        sprat.load(write(model, tmp_path / "other.gguf", split=False, extra=other, keys=keys))
    bare, _ = sprat.load(write(model, tmp_path / "bare.gguf", keys=keys))  # announced, and left out
    assert "blk.2.nextn.eh_proj.weight" in later and len(bare.mtp) == 0
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        drafted = ours.mtp_hidden(ours.hidden(tokens), tokens).x_BTD
        assert torch.equal(drafted, model.mtp_hidden(model.hidden(tokens), tokens).x_BTD)
        assert torch.allclose(bare(tokens), model(tokens), atol=1e-5)


def scaled(path: Path, keys: dict[str, Any], **changes: Any) -> tuple[Transformer, ModelConfig]:
    """(the model of a file with ``keys``, its config as transformers would have it)."""
    config = ModelConfig(architecture="llama", max_position_embeddings=256, **{**DENSE, **changes})
    table = {f"llama.rope.{key}": value for key, value in keys.items()}
    return sprat.load(write(Transformer.create(config, 1), path / "model.gguf", keys=table))[0], config


YARN = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64}


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # as llama.cpp's oldest files have it
        ({"scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # llama.cpp's default type
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.type": "yarn", "scaling.factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}),
        (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        (
            YARN | {"scaling.attn_factor": 0.9, "scaling.yarn_ext_factor": 1.0},
            {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                "attention_factor": 0.9 * 1.1386294,  # of 1 + ln(4) / 10
            },
        ),
    ],
)  # fmt: skip
def test_every_way_to_stretch_positions_is_followed(
    keys: dict[str, Any], scaling: dict[str, Any] | None, tmp_path: Path
) -> None:
    ours, plain = scaled(tmp_path, keys)
    expected = plain.replace(rope_scaling=scaling)
    assert apart(ours, oracle(expected, tmp_path, Transformer.create(expected, 1)), 1) <= TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "held"), [("llama", ("q", "k", "v")), ("qwen2", ()), ("qwen3", ("q", "k", "v")), ("llama", ("v",))]
)
def test_biases_that_a_file_leaves_out_are_zero(architecture: str, held: tuple[str, ...], tmp_path: Path) -> None:
    model = Transformer.create(ModelConfig(architecture=architecture, attention_bias=True, **DENSE), 1)
    disturb(model, 2)
    with torch.no_grad():
        for layer in model.layers:
            for name in {"q", "k", "v", "o"} - {*held}:
                bias = getattr(layer.self_attn, f"{name}_proj").bias
                if bias is not None:
                    bias.zero_()
    left_out = [rf"attn_{name}\.bias" for name in {"q", "k", "v", "output"} - {*held}]
    ours, _ = sprat.load(write(model, tmp_path / "model.gguf", without="|".join(left_out)))
    assert apart(ours, oracle(model.config, tmp_path, model), 3) <= TOLERANCE

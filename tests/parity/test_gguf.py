"""What users get: a GGUF file computes here what the model that it was made from computes in transformers."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import sprat
from sprat import quant
from sprat.config.model import HF_CLASS, ModelConfig
from sprat.model import Transformer, save_folder
from tests.gguf_files import gguf, torch_of, write
from tests.parity.test_transformers import FAMILY, LLAMA3, disturb

transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-3
check = functools.partial(
    settings,
    max_examples=12,
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
    """What a GGUF file can say: interleaved pairs, whole heads that turn, one mscale, biases of qwen2 only."""
    scaling = config.rope_scaling
    if scaling and scaling.get("rope_type") == "llama3":
        scaling = None
    if scaling and "mscale" in scaling:
        both = {"mscale", "mscale_all_dim"}
        scaling = {key: value for key, value in scaling.items() if key not in both}
        scaling |= dict.fromkeys(both, config.rope_scaling["mscale_all_dim"]) if config.is_mla else {}
    bias = config.architecture == "qwen2" or (config.attention_bias and config.architecture == "llama")
    return config.replace(rope_interleave=True, rope_scaling=scaling, attention_bias=bias)


@pytest.mark.parametrize("kind", list(HF_CLASS))
def test_a_float_file_computes_what_transformers_computes(kind: str) -> None:
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
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    table = load_gguf_checkpoint(path, return_tensors=False)["config"]
    table = {**table, "head_dim": model.config.attention_head_dim}  # which transformers does not read for qwen3
    table.pop("model_type")
    config = transformers.AutoConfig.for_model(architecture, **table)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    held = load_gguf_checkpoint(path, return_tensors=True, model_to_load=theirs)
    theirs.load_state_dict({name: tensor.float() for name, tensor in held["tensors"].items()}, strict=False)
    assert apart(ours, theirs, 3) <= TOLERANCE


def test_the_divisors_of_llama_3_become_its_four_numbers(tmp_path: Path) -> None:
    from sprat.model.rope import frequencies

    scaling = {**LLAMA3, "original_max_position_embeddings": 8192}
    model = Transformer.create(ModelConfig(architecture="llama", rope_scaling=scaling, rope_theta=5e5, **DENSE), 1)
    stretched, _ = frequencies(model.config)
    plain, _ = frequencies(model.config.replace(rope_scaling=None))
    path = write(model, tmp_path / "model.gguf", extra={"rope_freqs.weight": plain / stretched})
    ours, _ = sprat.load(path)
    assert ours.config.rope_scaling == scaling
    assert apart(ours, oracle(model.config, tmp_path, model), 1) <= TOLERANCE


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("split", [True, False])
def test_a_quantised_file_computes_what_its_dequantised_weights_compute(kind: str, split: bool, tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, moe_intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, q_lora_rank=256, kv_lora_rank=256, qk_nope_head_dim=32, qk_rope_head_dim=32,
        v_head_dim=128, n_routed_experts=0 if "K" in kind else 4, n_shared_experts=1, num_experts_per_tok=2,
        first_k_dense_replace=1, initializer_range=0.05,
    )  # fmt: skip
    model = Transformer.create(config, 1)

    def chosen(name: str) -> str:
        return "F32" if "ffn_gate_inp" in name or "attn_k_b" in name else kind

    path = write(model, tmp_path / "model.gguf", kind=chosen, split=split)
    ours, _ = sprat.load(path)
    assert {packed.bits for packed in quant.packed_tensors(ours).values()} == {4 if "4" in kind else 8}
    put_back(model, path)
    tokens = torch.randint(64, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (ours(tokens) - model(tokens)).abs().max() / model(tokens).abs().max()
    assert difference <= (TOLERANCE if kind in ("Q4_0", "Q4_1", "Q8_0") else 0.02), difference


@torch.no_grad()
def put_back(model: Transformer, path: Path) -> None:
    """Set ``model``'s weights to what the ``gguf`` package reads from ``path``."""
    config, own = model.config, model.state_dict()
    held = {
        tensor.name: torch_of(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(path).tensors
    }
    from sprat.gguf.names import file_name

    for name, tensor in own.items():
        there = file_name(name, config)
        if there in held:
            tensor.copy_(held[there].view_as(tensor))
        else:
            keys, values = (held[there.replace("attn_kv_b", part)] for part in ("attn_k_b", "attn_v_b"))
            tensor.copy_(torch.cat((keys.transpose(1, 2), values), 1).view_as(tensor))


def test_prediction_modules_come_along(tmp_path: Path) -> None:
    from sprat.gguf.names import file_name

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
    ours, _ = sprat.load(write(model, tmp_path / "whole.gguf", split=False, extra=later, keys=keys))
    bare, _ = sprat.load(write(model, tmp_path / "bare.gguf", keys=keys))  # announced, and left out
    assert "blk.2.nextn.eh_proj.weight" in later and len(bare.mtp) == 0
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        drafted = ours.mtp_hidden(ours.hidden(tokens), tokens).x_BTD
        assert torch.equal(drafted, model.mtp_hidden(model.hidden(tokens), tokens).x_BTD)
        assert torch.allclose(bare(tokens), model(tokens), atol=1e-5)

"""Files that do not hold together end in one sentence that names file and tensor, and leave nothing behind."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import sprat
from sprat import quant
from sprat.config.model import ModelConfig
from sprat.engine import Engine, Sampling
from sprat.engine.backends.torch import TorchBackend
from sprat.engine.request import eos_token_ids
from sprat.errors import CheckpointError
from sprat.formats.gguf import weights
from sprat.formats.gguf.decode import Job
from sprat.model import Transformer
from tests.gguf_files import vocabulary, write

ROOT = Path(__file__).resolve().parents[4]
SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def model(**changes: Any) -> Transformer:
    return Transformer.create(ModelConfig(architecture="llama", **{**SMALL, **changes}), 1)


def spoilt(change: Callable[[Transformer], object]) -> Transformer:
    found = model()
    with torch.no_grad():
        change(found)
    return found


def nan(found: Transformer) -> None:
    found.layers[1].mlp.up_proj.weight[3, 5] = torch.nan


def wide(found: Transformer) -> None:
    found.layers[0].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(64, 32))


NONSENSE = {"type": "yarn", "factor": 2.0, "original_context_length": 0}
FAULTS: list[tuple[Transformer, dict[str, Any], str]] = [
    (spoilt(nan), {}, "tensor 'blk.1.ffn_up.weight': it is not finite"),
    (spoilt(wide), {}, r"tensor 'blk.0.ffn_down.weight' has shape \(64, 32\), expected \(64, 96\)"),
    (model(), {"keys": {"general.architecture": "gpt2"}}, "general.architecture': 'gpt2' is not known"),
    (model(), {"keys": {"llama.block_count": 3}}, "tensor 'blk.2.attn_k.weight' is missing"),
    (model(), {"keys": {"llama.block_count": 1}}, "tensor 'blk.1.attn_k.weight' is not part"),
    (model(), {"keys": {"llama.block_count": 4_000_000_000}}, "num_hidden_layers=4000000000 is more"),
    (model(), {"keys": {"llama.embedding_length": None}}, "llama.embedding_length': it is missing"),
    (model(), {"keys": {"llama.embedding_length": "64"}}, "llama.embedding_length': 64 is no size"),
    (model(), {"keys": {"llama.attention.head_count": 0}}, "num_attention_heads"),
    (model(), {"keys": {"llama.attention.layer_norm_rms_epsilon": float("nan")}}, "rms_epsilon': it is no number"),
    (model(), {"keys": {"llama.rope.freq_base": float("inf")}}, "llama.rope.freq_base': it is no number"),
    (model(), {"keys": {"llama.rope.scaling.type": "longrope"}}, "'longrope' by 1.0 is not known"),
    (
        model(),
        {"keys": {f"llama.rope.scaling.{key}": value for key, value in NONSENSE.items()}},
        "rope_scaling of type 'yarn' has values that make no sense",
    ),
    (model(), {"keys": {"llama.expert_count": 8}}, "llama.expert_count': experts are known for deepseek2 only"),
    (model(), {"keys": {"llama.rope.dimension_count": 8}}, "heads of 16 must turn"),
    (model(), {"keys": {"llama.attention.sliding_window": 512}}, "attention.sliding_window': this is not supported"),
    (model(), {"keys": {"llama.attention.causal": False}}, "attention.causal': attention to later tokens"),
    (model(), {"keys": {"llama.use_parallel_residual": True}}, "use_parallel_residual': its value True is not under"),
    (model(), {"keys": {"llama.logit_scale": 0.5}}, "llama.logit_scale': its value 0.5"),
    (model(), {"keys": {"llama.attention.temperature_scale": 0.1}}, "temperature_scale': its value 0.1"),
    (model(), {"keys": {"llama.rope.dimension_sections": [8, 8, 0, 0]}}, "dimension_sections': its value"),
    (model(), {"keys": {"llama.rope.scaling.attn_factor": 1.3}}, "attn_factor': 1.3 is known with yarn only"),
    (model(), {"keys": {"qwen2.block_count": 2}}, "qwen2.block_count': this is not understood beside"),
    (model(), {"keys": {"general.type": "adapter"}}, "general.type': this is no model but 'adapter'"),
    (model(), {"keys": {"clip.has_vision_encoder": True}}, "clip.has_vision_encoder': this is not understood"),
    (model(), {"keys": {"general.quantization_version": 3}}, "quantization_version': version 3"),
    (model(), {"keys": {"split.count": 3}}, "split.count': this is one part"),
    (model(), {"extra": {"blk.0.mystery.weight": torch.zeros(2, 2)}}, "tensor 'blk.0.mystery.weight' is not part"),
    (model(), {"extra": {"rope_freqs.weight": torch.ones(3)}}, "rope_freqs.weight': these are not"),
    (model(vocab_size=30), {"keys": vocabulary(40)}, "40 ids, the model only 30"),
    (model(), {"keys": {"tokenizer.ggml.tokens": None}}, "tokenizer.ggml.tokens': it is missing"),
    (model(), {"keys": {"tokenizer.ggml.pre": "unheard-of"}}, "tokenizer.ggml.pre': the cut 'unheard-of'"),
    (model(), {"keys": {"tokenizer.ggml.model": "t5"}}, "tokenizer.ggml.model': a vocabulary of kind 't5'"),
    (model(), {"keys": {"tokenizer.ggml.merges": ["a b", "x"]}}, "tokenizer.ggml.merges': 'x' is no pair"),
    (model(), {"keys": {"tokenizer.ggml.merges": ["a q9"]}}, "out of vocabulary"),
    (model(), {"keys": {"tokenizer.ggml.eos_token_id": 999}}, "eos_token_id': 999 is no token"),
]


@pytest.mark.parametrize(("found", "how", "words"), FAULTS, ids=[words[:40] for *_, words in FAULTS])
def test_a_file_that_does_not_hold_together_is_named(
    found: Transformer, how: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = write(found, tmp_path / "model.gguf", **how)
    with pytest.raises(CheckpointError, match=words) as caught:
        sprat.load(path)
    assert str(path) in caught.value.where and caught.value.todo


def test_keys_that_ask_for_nothing_are_no_hindrance_and_unheard_of_ones_are_named(tmp_path: Path) -> None:
    nothing = {
        "llama.vocab_size": 64, "llama.attention.causal": True, "llama.attention.sliding_window": 4096,
        "llama.logit_scale": 1.0, "llama.pooling_type": 0, "llama.use_parallel_residual": False,
        "llama.rope.scaling.finetuned": False, "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0,
        "llama.expert_count": 0, "llama.expert_used_count": 2, "llama.tensor_data_layout": "Meta AI original pth",
        "general.name": "x", "general.type": "model", "general.quantization_version": 2, "general.file_type": 15,
        "tokenizer.ggml.add_space_prefix": False, "quantize.imatrix.entries_count": 224,
        "mradermacher.quantized_by": "x",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, _ = sprat.load(write(model(), tmp_path / "model.gguf", keys=nothing))
    assert loaded.config.rope_scaling is None
    odd = {"somebody.idea": 1, "tokenizer.ggml.new_rule": True, "tokenizer.ggml.add_eos_token": True}
    with pytest.warns(UserWarning, match=r"somebody\.idea, tokenizer\.ggml\.new_rule, tokenizer\.ggml\.add_eos_token"):
        sprat.load(write(model(), tmp_path / "odd.gguf", keys=odd))


def test_the_ends_of_turns_and_messages_end_an_answer(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 1}
    loaded, words = sprat.load(write(model(), tmp_path / "model.gguf", keys=keys))
    assert eos_token_ids(loaded.config, words) == {0, 1}


def test_a_file_cut_short_after_its_header_was_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(model(), tmp_path / "model.gguf")
    whole = path.read_bytes()
    planned = weights.LoadPlan

    def cut(*args: Any) -> weights.LoadPlan:
        path.write_bytes(whole[:-1000])
        return planned(*args)

    monkeypatch.setattr(weights, "LoadPlan", cut)
    with pytest.raises(CheckpointError, match="the file ends within it"):
        sprat.load(path)


def test_reading_is_held_to_its_memory_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(model(hidden_size=512, intermediate_size=4096), tmp_path / "model.gguf")
    monkeypatch.setattr(weights, "MEMORY", 1 << 20)
    with pytest.raises(CheckpointError, match="more memory than reading may"):
        sprat.load(path)
    monkeypatch.undo()
    monkeypatch.setattr(weights, "_SECONDS", 0)
    monkeypatch.setattr(weights, "_BYTES_A_SECOND", 1 << 40)
    with pytest.raises(CheckpointError, match="took too long"):
        sprat.load(path)


def test_the_reading_process_stops_itself_when_its_seconds_are_used(tmp_path: Path) -> None:
    rows, width = 100_000, 4096
    with open(tmp_path / "sparse", "w+b") as source, open(os.devnull, "wb") as nowhere:
        source.truncate(rows * width // 256 * 210)
        job = Job("x", "Q6_K", 256, 210, 0, rows, width, out={"codes": 0, "scales": 0})
        ends = (source.fileno(), nowhere.fileno())
        done = subprocess.run(
            [sys.executable, "-m", "sprat.formats.gguf.decode", *map(str, ends), str(1 << 30), "1"],
            input=json.dumps([asdict(job)]), text=True, pass_fds=ends, timeout=120, cwd=ROOT,
        )  # fmt: skip
    assert -done.returncode in (signal.SIGXCPU, signal.SIGKILL)


def test_a_model_too_large_for_this_machine_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(model(), tmp_path / "model.gguf")
    monkeypatch.setattr("sprat.formats.memory.available_bytes", lambda: 1 << 20)
    with pytest.raises(CheckpointError, match="GB of memory") as caught:
        sprat.load(path)
    assert caught.value.where == str(path)
    sprat.save(*loaded_elsewhere(monkeypatch, path), tmp_path / "folder")
    monkeypatch.setattr("sprat.formats.memory.available_bytes", lambda: 1 << 20)
    with pytest.raises(CheckpointError, match="GB of memory"):
        sprat.load(tmp_path / "folder")


def loaded_elsewhere(monkeypatch: pytest.MonkeyPatch, path: Path) -> tuple[Any, Any]:
    """The model of ``path`` with memory as it is."""
    monkeypatch.undo()
    return sprat.load(path)


@pytest.mark.parametrize("kinds", [{"": "Q4_1"}, {"": "Q4_0", "ffn_down": "Q8_0", "token_embd": "F16"}, {"": "F32"}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_is_saved_and_answers_as_before(kinds: dict[str, str], tied: bool, tmp_path: Path) -> None:
    def kind(name: str) -> str:
        return next((of for part, of in reversed(kinds.items()) if part in name), "F32")

    found, words = sprat.load(write(model(tie_word_embeddings=tied), tmp_path / "model.gguf", kind=kind))
    sprat.save(found, words, tmp_path / "saved")
    again, same = sprat.load(tmp_path / "saved")
    assert same.digest == words.digest
    mine, theirs = quant.quantized_weights(found), quant.quantized_weights(again)
    assert mine.keys() == theirs.keys() and bool(mine) == ("F32" not in kinds.values() or len(kinds) > 1)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(found(tokens), again(tokens))
    how = Sampling(temperature=0, max_tokens=5)
    assert Engine(again, same).generate(["ab"], how) == Engine(found, words).generate(["ab"], how)


def test_memory_grows_by_the_result_and_little_more(tmp_path: Path) -> None:
    path = write(
        model(hidden_size=512, intermediate_size=4096, vocab_size=700), tmp_path / "model.gguf", kind=lambda _: "Q8_0"
    )
    sprat.load(path)  # all that is imported, is
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = [sprat.load(path) for _ in range(3)]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    result = sum(quant.size_bytes(found) for found, _ in kept)
    assert result > 40e6 and grown <= 1.3 * result + 16e6, (grown, result)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="there is no memory by name here")
def test_an_engine_that_takes_the_codes_over_leaves_none_of_the_memory_that_they_came_in(tmp_path: Path) -> None:
    """Norms are in the same memory; one that is kept would keep all of it."""

    def blocks() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:sprat-weights")

    gc.collect()
    before = blocks()
    found, tokenizer = sprat.load(write(model(), tmp_path / "tiny.gguf", kind=lambda _: "Q4_0"))
    assert blocks() == before + 1
    engine = Engine(found, tokenizer, consume=True)
    if isinstance(engine.backend, TorchBackend):
        pytest.skip("no kernels here: torch computes with the codes as they are")
    gc.collect()
    assert blocks() == before
    assert engine.generate([[1, 2, 3]], Sampling(max_tokens=4, ignore_eos=True))[0].usage.completion_tokens == 4


def test_a_float_file_loads_in_bfloat16_where_asked(tmp_path: Path) -> None:
    path = write(model(), tmp_path / "model.gguf", kind=lambda _: "BF16")
    exact, narrow, auto = (sprat.load(path, dtype=dtype)[0] for dtype in ("float32", "bfloat16", "auto"))
    assert exact.head.weight.dtype == torch.float32 and narrow.head.weight.dtype == torch.bfloat16
    assert torch.equal(narrow.head.weight.float(), exact.head.weight)
    assert auto.head.weight.dtype == torch.bfloat16


def test_experts_may_mix_types_and_are_saved_so(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=40, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=4, v_head_dim=32,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1,
    )  # fmt: skip

    def kind(name: str) -> str:
        return {"ffn_gate_exps": "Q4_1", "ffn_up_exps": "Q8_0", "attn_output": "Q4_0"}.get(name.split(".")[-2], "F32")

    made = Transformer.create(config, 1)
    found, words = sprat.load(write(made, tmp_path / "model.gguf", kind=kind))
    assert {name.rpartition(".")[2]: packed.bits for name, packed in quant.quantized_weights(found).items()} == {
        "weight": 4, "w_gate_EFD": 4, "w_up_EFD": 8, "w_down_EDF": 32,
    }  # fmt: skip
    assert torch.equal(found.moe_layers()[0].experts.w_down_EDF, made.moe_layers()[0].experts.w_down_EDF)
    sprat.save(found, words, tmp_path / "saved")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(found(tokens), sprat.load(tmp_path / "saved")[0](tokens))

"""What users get: what a folder says is followed as transformers follows it, in the corners too."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sprat.config.model import ModelConfig
from sprat.engine import Engine, Sampling
from sprat.errors import EngineError
from sprat.formats.hf import load_folder, save_folder
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.unit.model.conftest import tiny_dense

transformers = pytest.importorskip("transformers")


def another_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    head = torch.randn(37, 24, generator=torch.Generator().manual_seed(3))
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})


def same_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})


def head_alone(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change", [another_head, same_head, head_alone])
def test_a_tied_config_beside_a_head_computes_what_transformers_computes(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    save_folder(Transformer.create(tiny_dense(tie_word_embeddings=True), 7), tmp_path)
    change(tmp_path)
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours, config = load_folder(tmp_path)
    named = [str(one.message) for one in told if "lm_head.weight' is not the embedding" in str(one.message)]
    assert len(named) == (change is another_head) and config.tie_word_embeddings == (change is not another_head)
    some = torch.arange(9)[None]
    with torch.no_grad():
        assert (ours(some) - theirs(input_ids=some).logits).abs().max() <= 1e-5


def test_qwen_s_layers_slide_as_its_config_says() -> None:
    base = tiny_dense(num_hidden_layers=4, architecture="qwen2", attention_bias=True).to_hf()
    for change in (
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 4},
        {"use_sliding_window": True, "sliding_window": 9},
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2},
        {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    ):
        table = {**base, **change}
        ours, theirs = ModelConfig.from_hf(table), transformers.Qwen2Config(**table)
        expected = [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]
        assert [ours.window(layer) for layer in range(4)] == expected, change
        again = transformers.Qwen2Config(**ours.to_hf())
        assert again.layer_types == theirs.layer_types
    mistral = tiny_dense(architecture="mistral").to_hf()
    for table in (mistral, {key: value for key, value in mistral.items() if key != "sliding_window"}):
        assert ModelConfig.from_hf(table).window(0) == transformers.MistralConfig(**table).sliding_window


def test_texts_beyond_the_old_context_are_read_where_yarn_stretches_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["12 + 13 = 25 and 7 + 8 = 15 are sums of two terms."], 460)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    config = tiny_dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=16, rope_scaling=None)
    save_folder(Transformer.create(config, 7), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"rope_scaling": yarn}))  # Qwen's recipe
    model, _ = load_folder(tmp_path)
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    prompt = list(range(100, 140))
    answer = Engine(model, tokenizer).generate([prompt], Sampling(temperature=0, max_tokens=8))[0]
    ids = torch.tensor([prompt + answer.token_ids])
    with torch.no_grad():
        assert answer.token_ids == theirs(input_ids=ids).logits[0, 39:-1].argmax(-1).tolist()
    with pytest.raises(EngineError):
        Engine(model, tokenizer).generate([[5] * 65], Sampling(max_tokens=1))

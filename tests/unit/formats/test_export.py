"""What is taken away is there whole or not at all, is never written over, and says what runtimes ask of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sprat
from sprat.config.sizes import size
from sprat.errors import CheckpointError, ConfigError, DataError
from sprat.formats import gguf
from sprat.formats.export import Form, export_model, new_folder
from sprat.formats.verify import verify_export
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.unit.model.conftest import tiny

# Keys of deepseek-ai/DeepSeek-V3's config.json; those of training (aux_loss_alpha, seq_aux) and of remote code
# (auto_map) say nothing to a runtime, and transformers_version nothing of the model.
PUBLISHED = {
    "architectures", "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "ep_size",
    "first_k_dense_replace", "hidden_act", "hidden_size", "initializer_range", "intermediate_size", "kv_lora_rank",
    "max_position_embeddings", "model_type", "moe_intermediate_size", "moe_layer_freq", "n_group", "n_routed_experts",
    "n_shared_experts", "norm_topk_prob", "num_attention_heads", "num_experts_per_tok", "num_hidden_layers",
    "num_key_value_heads", "num_nextn_predict_layers", "pretraining_tp", "q_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "quantization_config", "rms_norm_eps", "rope_scaling", "rope_theta", "routed_scaling_factor",
    "scoring_func", "tie_word_embeddings", "topk_group", "topk_method", "torch_dtype", "use_cache", "v_head_dim",
    "vocab_size",
}  # fmt: skip
PUBLISHED_ROPE = {
    "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim", "original_max_position_embeddings", "type",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["12 + 13 = 25"], 460)


@pytest.fixture(scope="module")
def source(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 in miniature, as it was trained: no ids in its config."""
    folder = tmp_path_factory.mktemp("export") / "model"
    yarn = {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    shape = {"hidden_size": 128, "intermediate_size": 128}
    sprat.save(Transformer.create(tiny(vocab_size=460, rope_scaling=yarn, **shape), 1), tokenizer, folder)
    return folder


def table(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_config_says_what_the_published_one_says(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    export_model(source, tmp_path / "out", Form("fp8"))
    config = table(tmp_path / "out" / "config.json")
    assert PUBLISHED - config.keys() == set()
    want = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 1.5, "n_group": 4, "topk_group": 2,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "torch_dtype": "float32",
        "dtype": "float32", "rope_theta": 10000.0, "bos_token_id": tokenizer.special_ids.bos,
    }  # fmt: skip
    assert {key: config[key] for key in want} == want
    assert config["rope_scaling"].keys() >= PUBLISHED_ROPE and config["rope_scaling"]["type"] == "yarn"
    transformers = pytest.importorskip("transformers")
    read = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    scaling = {**config["rope_scaling"], "rope_theta": 10000.0}
    assert {key: read.rope_parameters.get(key) for key in scaling} == scaling


def test_runtimes_are_told_where_an_answer_ends(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    export_model(source, tmp_path / "out", Form())
    ends = table(tmp_path / "out" / "generation_config.json")["eos_token_id"]
    assert {*([ends] if isinstance(ends, int) else ends)} == tokenizer.eos_token_ids
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "12 + 13"}]
    text = theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    from sprat.tokens import Message, render

    ours = render(tokenizer, [Message("user", "12 + 13")])
    assert theirs.encode(text, add_special_tokens=False) == ours
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.special_ids.bos, tokenizer.special_ids.eos)


def test_nothing_is_written_over(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name, form in [("full", Form()), ("file", Form("fp8")), ("file", Form("gguf", "f32")), ("full", Form("gguf"))]:
        with pytest.raises(ConfigError, match="there already|is a folder"):
            export_model(source, tmp_path / name, form)
    export_model(source, tmp_path / "empty", Form())
    assert [finding for finding in verify_export(tmp_path / "empty") if not finding.ok] == []
    assert (tmp_path / "file").read_text() == "mine" == (tmp_path / "full" / "mine.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_a_dense_model_is_not_packed_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="sprat quantize"):
        export_model(source, tmp_path / "out", Form("pack-quantized"))
    assert list(tmp_path.iterdir()) == []


def test_a_fault_names_the_folder_that_the_user_gave(tokenizer: Tokenizer, tmp_path: Path) -> None:
    small = Transformer.create(size("pico", vocab_size=tokenizer.vocab_size), 0)  # no side of 128
    sprat.save(small, tokenizer, tmp_path / "small")
    with pytest.raises(CheckpointError, match="whole blocks") as raised:
        export_model(tmp_path / "small", tmp_path / "small-fp8", Form("fp8"))
    assert raised.value.where == str(tmp_path / "small-fp8")
    with pytest.raises(DataError) as late, new_folder(tmp_path / "mine") as folder:
        raise DataError("no room", where=str(folder / "config.json"))
    assert str(late.value) == f"no room ({tmp_path / 'mine' / 'config.json'})."


def test_a_tokenizer_without_merges_is_named(tmp_path: Path) -> None:
    pieces = {letter: index for index, letter in enumerate("abc")} | {"<|endoftext|>": 3}
    text = {
        "version": "1.0",
        "model": {"type": "BPE", "vocab": pieces, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
        "added_tokens": [{"id": 3, "content": "<|endoftext|>", "special": True, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False}],
    }  # fmt: skip
    bare = Tokenizer(json.dumps(text), config={"eos_token": "<|endoftext|>"})
    model = Transformer.create(size("pico", vocab_size=bare.vocab_size), 1)
    with pytest.raises(CheckpointError, match="no merges.*save it as a folder"):
        gguf.save(model, bare, tmp_path / "x.gguf", kind="f32")
    assert list(tmp_path.iterdir()) == []


def test_a_cut_that_llama_cpp_does_not_know_names_the_flag(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--pre superbpe"):
        export_model(source, tmp_path / "x.gguf", Form("gguf", "f32"))
    with pytest.raises(CheckpointError, match="'nothing' is not known"):
        export_model(source, tmp_path / "x.gguf", Form("gguf", "f32", "nothing"))
    assert list(tmp_path.iterdir()) == []

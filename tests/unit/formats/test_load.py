"""Loading and saving: the same model comes back, and a bad folder is one clear sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sprat import quant
from sprat.config.model import LoRAConfig
from sprat.engine import Engine, Sampling
from sprat.errors import CheckpointError, SpratError
from sprat.formats.load import GGUF_FILE, load, load_dense, load_tokenizer, save
from sprat.formats.peft import save_peft
from sprat.model import Transformer
from sprat.model.lora import add_lora
from sprat.tokens import Tokenizer
from tests.gguf_files import write


@pytest.fixture(scope="module")
def folder(model: Transformer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model."""
    path = tmp_path_factory.mktemp("model") / "saved"
    save(model, tokenizer, path)
    return path


def test_a_saved_model_answers_as_before_also_from_a_run_folder(
    model: Transformer, tokenizer: Tokenizer, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "run" / "artefact")
    how = Sampling(temperature=0, max_tokens=12)
    expected = Engine(model, tokenizer).generate(["the cat"], how)[0]
    for path in (folder, str(tmp_path / "run")):
        again, words = load(path)
        assert words.digest == tokenizer.digest
        assert Engine(again, words).generate(["the cat"], how)[0] == expected


def test_a_run_that_exported_a_gguf_file_is_that_model(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "run" / "artefact").mkdir(parents=True)
    file = write(model, tmp_path / "run" / "artefact" / GGUF_FILE, kind=lambda _: "F32")
    tokens = torch.arange(1, 9)[None]
    for loader in (load, load_dense):
        assert torch.equal(loader(tmp_path / "run")[0](tokens), load(file)[0](tokens))
    assert load_tokenizer(tmp_path / "run").encode("abc") == load(file)[1].encode("abc")


def test_an_int4_model_loads_from_the_same_call(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    small = quant.quantize_model(model)
    save(small, tokenizer, tmp_path)
    again, words = load(tmp_path)
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens), small(tokens))
    how = Sampling(temperature=0, max_tokens=12)
    assert Engine(again, words).generate(["the cat"], how) == Engine(small, tokenizer).generate(["the cat"], how)


def test_bad_folders_are_refused_in_one_sentence(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def spoil(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    (spoil("no-config") / "config.json").unlink()
    (spoil("no-weights") / "model.safetensors").unlink()
    (spoil("no-tokenizer") / "tokenizer.json").unlink()
    torn = spoil("torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    (spoil("not-json") / "config.json").write_text("{")
    broken = spoil("nan") / "model.safetensors"
    tensors = load_file(broken)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, broken, metadata={"format": "pt"})
    lost = spoil("lost") / "model.safetensors"
    tensors.pop("model.norm.weight")
    save_file(tensors, lost, metadata={"format": "pt"})
    Tokenizer.train(["other words for a larger vocabulary " * 9], 900).save(spoil("vocab"))
    big = Tokenizer.load(tmp_path / "vocab")
    names = ["missing", "no-config", "no-weights", "no-tokenizer", "torn", "not-json", "nan", "lost"]
    for name in names + (["vocab"] if big.vocab_size > tokenizer.vocab_size + 7 else []):
        with pytest.raises(SpratError) as caught:
            load(tmp_path / name)
        assert caught.value.where and caught.value.todo and "\n" not in caught.value.what, name
    with pytest.raises(CheckpointError, match="not finite"):
        load(tmp_path / "nan")


def _shard(folder: Path) -> None:
    """Cut the weights of ``folder`` into two files with an index, as large models are published."""
    tensors = load_file(folder / "model.safetensors")
    names = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({name: tensors[name] for name, own in names.items() if own == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("earlier", ["shards", "int4"])
@pytest.mark.parametrize("later", ["dense", "int4"])
def test_what_is_saved_over_an_earlier_model_is_what_loads(
    earlier: str, later: str, model: Transformer, tokenizer: Tokenizer, folder: Path, tmp_path: Path
) -> None:
    if earlier == "shards":
        shutil.copytree(folder, tmp_path / "here")
        _shard(tmp_path / "here")
    else:
        save(quant.quantize_model(model), tokenizer, tmp_path / "here")
    (tmp_path / "here" / "generation_config.json").write_text('{"eos_token_id": 9}')
    (tmp_path / "here" / "chat_template.jinja").write_text("another model's")
    other = Transformer.create(model.config, 11)
    other = quant.quantize_model(other) if later == "int4" else other
    save(other, tokenizer, tmp_path / "here")
    again, words = load(tmp_path / "here")
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens), other(tokens))
    assert words.chat_format == tokenizer.chat_format
    assert 9 not in words.generation_config.eos_token_ids
    assert [path.name for path in (tmp_path / "here").glob("*.safetensors")] == ["model.safetensors"]


def test_one_file_of_weights_goes_before_an_index_as_in_transformers(
    model: Transformer, tokenizer: Tokenizer, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "both")
    _shard(tmp_path / "both")
    other = Transformer.create(model.config, 11)
    save(other, tokenizer, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "both")
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "both")[0](tokens), other(tokens))


def test_an_adapter_by_itself_is_called_one(folder: Path, tmp_path: Path) -> None:
    """It once was told to be a folder with config.json, which it never will be."""
    model, _ = load(folder)
    add_lora(model, LoRAConfig(rank=2, targets=("q_proj",)))
    save_peft(model, tmp_path)
    for read in (load, load_dense, load_tokenizer):
        with pytest.raises(CheckpointError, match="an adapter, and no model by itself.*sprat merge BASE ADAPTER"):
            read(tmp_path)

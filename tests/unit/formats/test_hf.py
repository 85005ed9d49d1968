"""What users get: folders that load or say why not, and are never half written."""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sprat
from sprat.errors import CheckpointError, ConfigError, MachineError
from sprat.formats.hf import load_folder, save_folder
from sprat.model import Transformer
from sprat.quant import quantize_model
from sprat.tokens import Tokenizer
from tests.unit.model.conftest import tiny, tiny_dense


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_folder(Transformer.create(tiny(), 7), tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_comes_back_bit_for_bit(folder: Path) -> None:
    model, config = load_folder(folder)
    assert config == tiny()
    for name, tensor in Transformer.create(tiny(), 7).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_saving_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    save_folder(load_folder(folder)[0], tmp_path / "again")
    for file in sorted(folder.iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_sharded_folders_load(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    places = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()
    some = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(load_folder(folder)[0](some), Transformer.create(tiny(), 7)(some))


def test_half_precision_keeps_the_router_bias_in_single(folder: Path) -> None:
    model, _ = load_folder(folder, dtype=torch.bfloat16)
    assert model.head.weight.dtype == torch.bfloat16
    assert model.moe_layers()[0].gate.e_score_correction_bias.dtype == torch.float32
    assert model(torch.arange(6)[None]).dtype == torch.float32


def test_announced_but_absent_prediction_modules_are_left_out(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if ".layers.2." not in n}, folder / "model.safetensors")
    model, config = load_folder(folder)
    assert config.num_nextn_predict_layers == 0 and len(model.mtp) == 0


def drop(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def reshape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(3, 24)
    save_file(tensors, folder / "model.safetensors")


def add(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.9.mystery": torch.zeros(1)}, folder / "model.safetensors")


def tear(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def garble(folder: Path) -> None:
    (folder / "config.json").write_text("{")


# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
INDEX = "model.safetensors.index.json"
FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (drop, "experts.5.up_proj.weight' is missing"),
    (reshape, r"lm_head.weight' has shape \(3, 24\), expected \(37, 24\)"),
    (add, "mystery' is not part"),
    (tear, "not a whole safetensors file"),
    (garble, "not readable as JSON"),
    (lambda folder: (folder / "config.json").unlink(), "config.json"),
    (lambda folder: (folder / "model.safetensors").unlink(), "weight file is missing"),
    (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle",
    ),
    (lambda folder: (folder / "model.safetensors").write_text(LFS_POINTER), "pointer of Git LFS.*git lfs pull"),
    (lambda folder: (folder / "model.safetensors").rename(folder / INDEX).write_text("{}"), "weight_map"),
]


@pytest.mark.parametrize(("fault", "word"), FAULTS)
def test_a_broken_folder_is_named_in_words(folder: Path, fault: Callable[[Path], object], word: str) -> None:
    fault(folder)
    with pytest.raises(CheckpointError, match=word):
        load_folder(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_folder(tmp_path / "nowhere")


def test_a_config_of_another_family_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="gpt2"):
        load_folder(folder)


@pytest.mark.parametrize("writer", ["safetensors.torch.save_file", "pathlib.Path.write_text"])  # weights, config
def test_an_interrupted_save_leaves_the_old_folder(writer: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, full)
    with pytest.raises(MachineError, match="the disk is full"):
        save_folder(Transformer.create(tiny(), 8), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(small_disk: Path, quantized: bool) -> None:
    tokenizer = Tokenizer.train(["12 + 13 = 25"], 460)
    model = Transformer.create(tiny_dense(vocab_size=460), 8)
    sprat.save(quantize_model(model) if quantized else model, tokenizer, small_disk)
    before = {file.name: file.read_bytes() for file in small_disk.iterdir()}
    larger = Transformer.create(tiny_dense(vocab_size=30_000), 9)
    with pytest.raises(MachineError, match="the disk is full"):
        sprat.save(quantize_model(larger) if quantized else larger, tokenizer, small_disk)
    assert {file.name: file.read_bytes() for file in small_disk.iterdir()} == before
    some = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(sprat.load(small_disk)[0](some), (quantize_model(model) if quantized else model)(some))


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("model.layers.2.embed_tokens.weight", None),
        ("model.layers.2.shared_head.head.weight", None),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.tensor([1.0, 0.01])),
    ],
)
def test_a_tensor_that_is_not_needed_is_compared_and_named(
    name: str, right: torch.Tensor | None, tmp_path: Path
) -> None:
    save_folder(Transformer.create(tiny(rope_scaling=None), 7), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = tensors[name] if right is None else right  # 10000 ** (-i / 2)
    save_file(tensors, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_folder(tmp_path)
    tensors[name] = tensors[name] * 1.1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=name):
        load_folder(tmp_path)

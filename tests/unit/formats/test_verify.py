"""An export is proved, or what was changed in it is named: every byte of every kind of file counts."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sprat
from sprat.config import LoRAConfig
from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError, ConfigError
from sprat.formats import peft
from sprat.formats.export import Form, export_model
from sprat.formats.verify import verify_export
from sprat.model import Transformer
from sprat.model.lora import add_lora
from sprat.quant import quantize_model
from sprat.tokens import Tokenizer

FORMS = {
    "dense": Form(),
    "fp8": Form("fp8"),
    "pack-quantized": Form("pack-quantized"),
    "f32": Form("gguf", "f32", "superbpe"),
    "f16": Form("gguf", "f16", "superbpe"),
    "q8_0": Form("gguf", "q8_0", "superbpe"),
    "q4_0": Form("gguf", "q4_0", "superbpe"),
}
SHAPE = {
    "architecture": "llama", "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small INT4 model."""
    folder = tmp_path_factory.mktemp("verify") / "model"
    tokenizer = Tokenizer.train(["12 + 13 = 25"], 460)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE)  # type: ignore[arg-type]
    sprat.save(quantize_model(Transformer.create(config, 1)), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def exports(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """It in every form."""
    folder = tmp_path_factory.mktemp("exports")
    paths = {name: folder / (f"{name}.gguf" if form.format == "gguf" else name) for name, form in FORMS.items()}
    for name, path in paths.items():
        export_model(source, path, FORMS[name])
    return paths


def copied(path: Path, to: Path, *, manifest: bool) -> Path:
    """A copy of an export, with its manifest or without."""
    if path.is_dir():
        copy = Path(shutil.copytree(path, to / path.name))
        if not manifest:
            (copy / "export.json").unlink()
        return copy
    for each in [path, path.with_name(f"{path.name}.export.json")][: 1 + manifest]:
        shutil.copy(each, to / each.name)
    return to / path.name


def faults(path: Path, against: Path | None = None) -> list[str]:
    return [str(finding) for finding in verify_export(path, against=against) if not finding.ok]


@pytest.mark.parametrize("name", FORMS)
def test_what_was_exported_is_proved(name: str, exports: dict[str, Path], source: Path, tmp_path: Path) -> None:
    assert faults(exports[name]) == [] and faults(exports[name], source) == []
    bare = copied(exports[name], tmp_path, manifest=False)
    assert faults(bare, source) == []
    with pytest.raises(ConfigError, match="--against MODEL"):
        verify_export(bare)


def test_another_model_is_not_that_model(exports: dict[str, Path], source: Path, tmp_path: Path) -> None:
    model, tokenizer = sprat.load(source, dequantize=True)
    with torch.no_grad():
        model.get_parameter("layers.0.mlp.up_proj.weight")[3, 5] += 0.25
    sprat.save(model, tokenizer, tmp_path / "other")
    for name in ("dense", "fp8", "f32", "f16", "q8_0", "q4_0"):
        [fault] = faults(exports[name], tmp_path / "other")
        assert "_up.weight' differs" in fault or "up_proj.weight' differs" in fault or name in ("q8_0", "q4_0")


def change_tensor(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[key].view(-1)[0:1].view(torch.uint8)[0] ^= 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def change_json(file: str, key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        table = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**table, key: value}, indent=2, sort_keys=True))

    return change


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_template(folder: Path) -> None:
    table = json.loads((folder / "tokenizer_config.json").read_text())
    table["chat_template"] = table["chat_template"][:-1] + "?"
    (folder / "tokenizer_config.json").write_text(json.dumps(table, ensure_ascii=False, indent=2))


UP = "model.layers.0.mlp.up_proj.weight"
CHANGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "weight": ("dense", change_tensor(UP), f"tensor '{UP}' differs"),
    "norm": ("dense", change_tensor("model.norm.weight"), "tensor 'model.norm.weight' differs"),
    "fp8 code": ("fp8", change_tensor(UP), f"tensor '{UP}' differs"),
    "fp8 scale": ("fp8", change_tensor(f"{UP}_scale_inv"), f"tensor '{UP}_scale_inv' differs"),
    "codes": ("pack-quantized", change_tensor(f"{UP}_packed"), f"tensor '{UP}_packed' differs"),
    "scale": ("pack-quantized", change_tensor(f"{UP}_scale"), f"tensor '{UP}_scale' differs"),
    "shape": ("pack-quantized", change_tensor(f"{UP}_shape"), f"tensor '{UP}_shape' differs"),
    "missing": ("dense", drop_tensor, "tensor 'model.norm.weight' is missing"),
    "config": ("dense", change_json("config.json", "rms_norm_eps", 1e-5), "config.json: key rms_norm_eps differs"),
    "new key": ("dense", change_json("config.json", "rope", 1), "config.json: key rope differs"),
    "template": ("dense", change_template, "tokenizer_config.json: key chat_template differs"),
    "file": ("dense", lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: it is missing"),
    "more": ("dense", lambda folder: (folder / "chat_template.jinja").write_text("x"), "chat_template.jinja"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_change_is_named(change: str, exports: dict[str, Path], source: Path, tmp_path: Path) -> None:
    name, act, said = CHANGES[change]
    path = copied(exports[name], tmp_path, manifest=True)
    act(path)
    by_manifest = faults(path)
    assert len(by_manifest) == 1 and by_manifest[0].split(":")[0] == said.split(":")[0] or "tensor" in said
    (path / "export.json").unlink()
    [against] = faults(path, source)
    assert said in against


@pytest.mark.parametrize("name", [*list(FORMS)[1:], pytest.param("dense", marks=pytest.mark.slow)])
def test_any_byte_that_is_flipped_is_seen(name: str, exports: dict[str, Path], source: Path, tmp_path: Path) -> None:
    """Fifty random bytes of each kind of file by the manifest, the manifest's own among them."""
    path = copied(exports[name], tmp_path, manifest=True)
    files = list(path.iterdir()) if path.is_dir() else list(tmp_path.iterdir())
    chance = random.Random(name)
    for file in files:
        content = file.read_bytes()
        for _ in range(50 if file.suffix in (".gguf", ".safetensors") or name == "dense" else 3):
            at, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
            file.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
            assert faults(path), (file.name, at, bit)
        file.write_bytes(content)
    assert faults(path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "fp8", "pack-quantized", "f16", "q4_0"])
def test_any_byte_that_is_flipped_is_seen_without_a_manifest(
    name: str, exports: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    path = copied(exports[name], tmp_path, manifest=False)
    chance = random.Random(name)
    for file in list(path.iterdir()) if path.is_dir() else [path]:
        content = file.read_bytes()
        for _ in range(6):
            at = chance.randrange(len(content))
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
            assert faults(path, source), (file.name, at)
        file.write_bytes(content)


def test_an_adapter_is_held_against_its_run(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=64, **SHAPE)  # type: ignore[arg-type]
    model = Transformer.create(config, 1)
    add_lora(model, LoRAConfig(rank=2))
    peft.save_peft(model, tmp_path / "run" / "artefact" / "adapter")
    shutil.copytree(tmp_path / "run" / "artefact" / "adapter", tmp_path / "mine")
    assert faults(tmp_path / "mine", tmp_path / "run") == []
    chance = random.Random(0)
    for file in (tmp_path / "mine").iterdir():
        content = file.read_bytes()
        for _ in range(50):
            at = chance.randrange(len(content))
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
            assert faults(tmp_path / "mine", tmp_path / "run"), (file.name, at)
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match="no adapter"):
        verify_export(tmp_path / "mine", against=tmp_path)

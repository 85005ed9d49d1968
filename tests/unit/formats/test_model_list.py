"""Which models are on a disk: named, measured, and removed from the cache only, never while one is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from sprat.errors import CheckpointError, MachineError
from sprat.files import lock
from sprat.files.lock import is_held
from sprat.formats import fetch
from sprat.formats.load import load, locate, save
from sprat.formats.model_list import list_models, remove_model
from sprat.model import Transformer
from sprat.quant import quantize_model
from tests.gguf_files import write
from tests.lucky import lucky_shape, lucky_tokenizer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of one's own: Sprat's and the hub's below it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _model(seed: int = 0) -> Transformer:
    return Transformer.create(lucky_shape(lucky_tokenizer()), seed)


def _snapshot(cache: Path, repository: str = "org/fish") -> Path:
    """A repository as huggingface_hub lays it out: blobs, and a snapshot of links."""
    place = cache / "huggingface" / "hub" / f"models--{repository.replace('/', '--')}"
    folder, blobs = place / "snapshots" / ("a" * 40), place / "blobs"
    save(_model(), lucky_tokenizer(), folder)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    return folder


def test_models_of_all_kinds_are_named_and_measured(cache: Path, tmp_path: Path) -> None:
    runs, model, tokenizer = tmp_path / "runs", _model(), lucky_tokenizer()
    save(model, tokenizer, runs / "dense" / "artefact")
    save(quantize_model(_model()), tokenizer, runs / "deep" / "small")
    write(model, runs / "fish.gguf", kind=lambda _: "F32")
    (runs / "broken").mkdir()
    (runs / "broken" / "config.json").write_text("{")
    found = {Path(entry.name).name: entry for entry in list_models(runs)}
    assert set(found) == {"dense", "small", "fish.gguf", "broken"}
    with safe_open(runs / "dense" / "artefact" / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    bias = sum(size for name, size in tensors.items() if name.endswith("e_score_correction_bias"))  # no parameter
    dense, small, gguf = found["dense"], found["small"], found["fish.gguf"]
    assert dense.parameters == small.parameters == sum(tensors.values()) - bias == gguf.parameters - bias
    assert (dense.architecture, dense.kind) == ("deepseek_v3", "float32") and "int4" in small.kind
    assert (gguf.architecture, gguf.kind) == ("deepseek2", "f32")
    assert dense.size == sum(path.stat().st_size for path in (runs / "dense").rglob("*") if path.is_file())
    assert found["broken"].fault and not any(entry.cached for entry in found.values())
    with pytest.raises(CheckpointError, match="no such folder"):
        list_models(tmp_path / "nowhere")


def test_a_cached_repository_is_removed_whole_and_nothing_else(cache: Path, tmp_path: Path) -> None:
    folder = _snapshot(cache)
    other = _snapshot(cache, "org/whale")
    outside = tmp_path / "outside"
    save(_model(), lucky_tokenizer(), outside)
    names = [entry.name for entry in list_models()]
    assert names == ["org/fish", "org/whale"]
    for name in (str(outside), "../outside", "org/nothing", "models--org--fish"):
        with pytest.raises(CheckpointError, match="no model of this name is in the cache.*org/fish"):
            remove_model(name)
    assert remove_model("org/fish", confirm=lambda entry: False) is None and folder.exists()
    removed = remove_model("org/fish")
    assert removed is not None and removed.size > 100_000
    assert [entry.name for entry in list_models()] == ["org/whale"] and (other / "config.json").exists()
    (cache / "huggingface" / "hub" / "models--org--link").symlink_to(outside)
    assert [entry.name for entry in list_models()] == ["org/whale"]  # a link out of the cache is no model in it


def test_what_is_cached_of_a_hub_is_loaded_by_its_id_without_a_network(cache: Path) -> None:
    pytest.importorskip("huggingface_hub")
    _snapshot(cache)
    for name in ("org/fish", f"org/fish@{'a' * 40}"):
        model, tokenizer = load(name)
        assert model.config.hidden_size == 32 and tokenizer.encode("7") == lucky_tokenizer().encode("7")
    with pytest.raises(MachineError, match="a process uses this model"):
        remove_model("org/fish")


def test_a_model_that_is_loaded_is_not_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch.cached_model_path("smol")
    path.parent.mkdir(parents=True)
    write(_model(), path, kind=lambda _: "F32")
    code = (
        "import sys; from pathlib import Path; from sprat.files.lock import hold_file; "
        "hold_file(Path(sys.argv[1])); print('holds', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout and process.stdout.readline() == "holds\n"
    with pytest.raises(MachineError, match="a process uses this model"):
        remove_model("smol")
    process.communicate("")
    assert not is_held(path) and remove_model("smol") is not None and not list(path.parent.iterdir())


def test_when_a_model_was_used_last_is_known(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch.cached_model_path("smol")
    path.parent.mkdir(parents=True)
    write(_model(), path, kind=lambda _: "F32")
    os.utime(path, (1e9, 1e9))
    [before] = list_models()
    monkeypatch.setattr(fetch, "download_model", lambda name: path)
    monkeypatch.setattr(lock, "hold_file", lambda file: None)
    locate("smol")
    [after] = list_models()
    assert before.last_used == 1e9 and abs(after.last_used - time.time()) < 60
    assert path.stat().st_mtime == 1e9  # which ``sprat fetch`` remembers the file by
    json.dumps(after.to_dict())
